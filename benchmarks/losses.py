"""500 training steps on real text with fused kernels and with the torch reference: do the losses agree?"""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F

import qat
from qat import backend
from qat.models.gpt import gpt


def text(device: torch.device) -> torch.Tensor:
    """Return Python's own help topics as bytes."""
    from pydoc_data.topics import topics

    return torch.tensor(list("\n".join(topics[key] for key in sorted(topics)).encode()), device=device)


def losses(
    seed: int, fused: bool, steps: int, device: torch.device, width: int = 256, compiled: bool = False
) -> list[float]:
    """Train a small language model, W4 in groups of 32 and A8, and return the loss of every step."""
    data = text(device)
    torch.manual_seed(seed)
    model = gpt(width=width, depth=4, heads=4, context=128).to(device)
    policy = qat.QuantPolicy(
        weight=qat.QuantSpec(bits=4, group_size=32),
        activation={"bits": 8},
        rules=[{"match": "lm_head", "weight": None}],
    )
    generator = torch.Generator().manual_seed(seed)

    def batch() -> torch.Tensor:
        starts = torch.randint(len(data) - 129, (32,), generator=generator)
        return torch.stack([data[start : start + 129] for start in starts])

    with mock.patch.object(backend, "fused", backend.fused if fused else lambda *_: False):
        qat.calibrate(qat.prepare(model, policy, verbose=False), [batch()[:, :-1] for _ in range(2)])
        if compiled:
            model.compile(dynamic=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        for _ in range(steps):
            tokens = batch()
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
    return torch.stack(found).tolist()


def loss_rows(device: torch.device, small: bool) -> Iterator[dict]:
    """Yield the mean loss of the last tenth of the steps, and how far each run is from the reference with seed 0.

    The bar of a run is the distance of the reference with seed 1: the spread of two seeds.
    """
    steps, width = (4, 32) if small else (500, 256)
    runs = {
        "reference, seed 0": (0, False),
        "reference, seed 1": (1, False),
        "fused, seed 0": (0, True),
        "fused, seed 0, again": (0, True),
        "compiled, seed 0": (0, True),
    }
    first = spread = None
    for name, (seed, fused) in runs.items():
        torch._dynamo.reset()
        values = torch.tensor(losses(seed, fused, steps, device, width, "compiled" in name))
        last = values[-max(1, steps // 10) :].mean()
        first = (values, last) if first is None else first
        apart = (last - first[1]).abs().item()
        spread = apart if "seed 1" in name else spread
        row = {"run": name, "steps": steps, "mean of the last tenth": round(last.item(), 4), "apart": round(apart, 5)}
        row |= {"bar": round(spread, 5)} if spread is not None and "seed 1" not in name else {}
        yield row | {"largest difference of a step": round((values - first[0]).abs().max().item(), 6)}
