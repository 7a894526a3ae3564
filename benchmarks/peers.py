"""What others do, for benchmarks: LSQ as one writes it down in torch, and torchao's QAT."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return ``value`` with the gradient of ``surrogate``."""
    return surrogate + (value - surrogate).detach()


class StraightforwardLSQ(nn.Linear):
    """LSQ (arXiv:1902.08153) by autograd over plain operators; inputs rounded to int8 per token if ``round_input``."""

    def start(self, group_size: int, bits: int, round_input: bool) -> None:
        """Add the step sizes."""
        self.q_n, self.q_p, self.round_input = 2 ** (bits - 1), 2 ** (bits - 1) - 1, round_input
        groups = self.weight.detach().float().reshape(self.out_features, -1, group_size)
        self.step_size = nn.Parameter(2 * groups.abs().mean(-1, keepdim=True) / math.sqrt(self.q_p))

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear map of the rounded x and weight."""
        groups = self.weight.float().reshape(self.out_features, -1, self.group)
        g = 1 / math.sqrt(groups.shape[-1] * self.q_p)
        step = straight_through(self.step_size, self.step_size * g)
        step = straight_through(step.bfloat16().float(), step)
        ratio = (groups / step).clamp(-self.q_n, self.q_p)
        weight = (straight_through(ratio.round(), ratio) * step).reshape(self.weight.shape).to(self.weight.dtype)
        if self.round_input:
            low, high = x.amin(-1, keepdim=True).clamp_max(0).float(), x.amax(-1, keepdim=True).clamp_min(0).float()
            scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
            zero_point = (-128 - low / scale).round().clamp(-128, 127)
            codes = ((x.float() / scale).round() + zero_point).clamp(-128, 127)
            x = straight_through(((codes - zero_point) * scale).to(x.dtype), x)
        return F.linear(x, weight, self.bias)

    @property
    def group(self) -> int:
        """The weights that share a step size."""
        return self.in_features // self.step_size.shape[1]


def straightforward_lsq(model: nn.Module, wanted: Callable[[str], bool], round_input: bool) -> nn.Module:
    """Turn linear layers into StraightforwardLSQ, 4 bits in groups of 128; in place."""
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and wanted(name):
            layer.__class__ = StraightforwardLSQ
            layer.start(min(128, layer.in_features), 4, round_input)
    return model


def torchao_qat(model: nn.Module, wanted: Callable[[str], bool], round_input: bool) -> nn.Module:
    """Prepare linear layers with torchao's QAT, 4 bits in groups of 128; in place. ImportError without torchao."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    if round_input:
        inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        weights = IntxFakeQuantizeConfig(torch.int4, group_size=128, is_symmetric=True)
        config = QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
    else:
        config = QATConfig(Int4WeightOnlyConfig(group_size=128), step="prepare")
    quantize_(model, config, filter_fn=lambda module, name: type(module) is nn.Linear and wanted(name))
    return model
