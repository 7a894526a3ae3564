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


def losses(seed: int, fused: bool, steps: int, device: torch.device, width: int = 256) -> list[float]:
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
    """Yield the mean loss of the last tenth of the steps, and how far runs are apart over all steps."""
    steps, width = (4, 32) if small else (500, 256)
    runs = {
        "reference, seed 0": losses(0, False, steps, device, width),
        "reference, seed 1": losses(1, False, steps, device, width),
        "fused, seed 0": losses(0, True, steps, device, width),
        "fused, seed 0, again": losses(0, True, steps, device, width),
    }
    first = torch.tensor(runs["reference, seed 0"])
    for name, values in runs.items():
        found = torch.tensor(values)
        row = {
            "run": name,
            "steps": steps,
            "mean of the last tenth": round(found[-max(1, steps // 10) :].mean().item(), 4),
        }
        yield row | {"largest difference to reference, seed 0": round((found - first).abs().max().item(), 6)}
