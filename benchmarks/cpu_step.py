"""What quantization-aware training costs on a CPU: python -m benchmarks.cpu_step [--steps 9] [--threads 1]

A step of ResNet-20 (batch 64 of 32 x 32 images) and of a small decoder (4 x 256 tokens), prepared, over that of the
plain model: the median of as many ratios as there are steps, which are taken in turn, so that other work on the machine
falls on both. Beside the decoder: LSQ as one writes it down in torch, and torchao's QAT if it is installed.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from benchmarks.models import Decoder, training_step
from benchmarks.peers import straightforward_lsq, torchao_qat
from benchmarks.qat_step import quantize
from qat.broken_pipe import ends_quietly
from qat.models.resnet import resnet20

DECODER = {"hidden": 256, "layers": 4, "mlp": 1024, "vocabulary": 512, "heads": 4}


class Classifier(nn.Module):
    """ResNet-20 with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = resnet20(10)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy of (images, labels)."""
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)


def convolutions(batch, symmetric: bool = True, **fields) -> Callable[[nn.Module], nn.Module]:
    """Return what prepares a network in W4A4, with further fields of the policy; ``symmetric`` is that of inputs."""
    inputs = qat.QuantSpec(granularity="tensor", symmetric=symmetric)
    grids = {"weight": qat.QuantSpec(granularity="channel"), "activation": inputs}
    return lambda model: quantize(model, qat.QuantPolicy(**grids, **fields), batch)[0]


def linears(**fields) -> Callable[[nn.Module], nn.Module]:
    """Return what prepares a decoder in W4, groups of 128, but for its head."""
    head = {"match": "lm_head", "weight": None}
    policy = qat.QuantPolicy(weight=qat.QuantSpec(group_size=128), rules=[head], **fields)
    return lambda model: quantize(model, policy)[0]


def wanted(name: str) -> bool:
    """Return whether the peers prepare a decoder's layer."""
    return name != "lm_head"


def ratio(plain: nn.Module, prepare: Callable[[nn.Module], nn.Module], batch, steps: int) -> float:
    """Return the time of a prepared model's step over that of the plain one."""
    both = [training_step(copy.deepcopy(plain), batch), training_step(prepare(copy.deepcopy(plain)), batch)]
    ratios = []
    for _ in range(steps + 1):
        times = []
        for step in both:
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios[1:])


@ends_quietly()
def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    tokens = torch.randint(0, DECODER["vocabulary"], (4, 257))
    peers = {"LSQ in torch": straightforward_lsq, "torchao": torchao_qat}
    rows = [
        ("ResNet-20 W4A4", "LSQ", Classifier(), convolutions(images), images),
        ("ResNet-20 W4A4", "PACT", Classifier(), convolutions(images, activation_quantizer="pact"), images),
        ("ResNet-20 W4A4", "LSQ+", Classifier(), convolutions(images, symmetric=False), images),
    ]
    for what, fields in {"decoder W4": {}, "decoder W4A8": {"dynamic": "int8_token"}}.items():
        rows.append((what, "LSQ", Decoder(**DECODER), linears(**fields), tokens))
        for name, peer in peers.items():
            rows.append(
                (what, name, Decoder(**DECODER), partial(peer, wanted=wanted, round_input=bool(fields)), tokens)
            )
    machine = f"{platform.machine()}, {options.threads} thread{'s' * (options.threads > 1)}"
    print(f"{datetime.date.today()}, {machine}, torch {torch.__version__}: times the plain step")
    for what, name, plain, prepare, batch in rows:
        try:
            print(f"{what:16} {name:14} {ratio(plain, prepare, batch, options.steps):.2f}", flush=True)
        except ImportError:
            print(f"{what:16} {name:14} not installed")


if __name__ == "__main__":
    main()
