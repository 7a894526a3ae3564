"""Learned step sizes on a grid with zero points, which stay as they start: asymmetric weights."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from ..numerics import (
    QuantizedTensor,
    dequantize,
    fake_quantize_gradients,
    quantize,
    quantize_tensor,
    scale_shape,
    stored_scale,
)
from ..spec import Init, QuantSpec
from . import rules
from .half_quadratic import half_quadratic
from .lsq import LearnedStepSize, gradient_scale


class AsymmetricLSQ(LearnedStepSize):
    """Fake-quantizes a weight per tensor, channel or group.

    It starts with the range of the weight's values, 0 included, which HQQ goes on from, whatever else the policy's init
    says of symmetric grids; or with the scales and zero points of a model that is quantized already (``start``).

    Attributes:
        zero_point: int8 buffer (rows, groups), in the range of the codes; it does not learn.
    """

    fix = "prepare the model with its weights in memory (not on the meta device), or load a trained checkpoint"

    def __init__(self, spec: QuantSpec, weight: Tensor, name: str, init: Init = Init.minmax) -> None:
        spec = replace(spec, signed=True)
        shape = scale_shape(weight.shape, spec)
        super().__init__(spec, shape, name, init, weight.device)
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int8, device=weight.device))
        if not weight.is_meta:
            start = range_of(weight, spec)
            self.start(*(half_quadratic(weight, *start, spec) if init is Init.hqq else start))

    @torch.no_grad()
    def start(self, step_size: Tensor, zero_point: Tensor) -> None:
        """Start from step sizes and zero points of the shape (rows, groups)."""
        self.zero_point.copy_(zero_point)
        self.set_step_size(step_size)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight in the weight's dtype."""
        if not self.enabled:
            return weight
        self.require_initialised()
        grad_scale = gradient_scale(weight.numel() // self.step_size.numel(), self.spec)
        rule = sys.modules[__name__]
        return rules.fake_quantize(rule, weight, self.step_size, self.zero_point, self.spec, grad_scale)

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return the integers that ``forward`` uses."""
        return quantize_tensor(weight, self.scale(), self.spec, self.zero_point.clone())


def range_of(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the step size (rows, groups) that spans each block's values and 0, and the zero point: float32."""
    blocks = weight.detach().float().reshape(*scale_shape(weight.shape, spec), -1)
    low, high = blocks.amin(-1).clamp_max(0), blocks.amax(-1).clamp_min(0)
    step_size = (high - low) / (spec.q_n + spec.q_p)
    zero_point = torch.where(step_size > 0, -low / step_size, 0.0).round() - spec.q_n
    return step_size, zero_point.clamp(-spec.q_n, spec.q_p)


def fake_quantized(x: Tensor, step_size: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return the fake-quantized x in its own dtype, without gradients."""
    scale = stored_scale(step_size, spec)
    return dequantize(quantize(x, scale, spec, zero_point), scale, x.dtype, zero_point)


def gradients(
    grad_output: Tensor, x: Tensor, step_size: Tensor, zero_point: Tensor, spec: QuantSpec, grad_scale: float
) -> tuple[Tensor, Tensor, None]:
    """Return the gradients of x and of the step size; the zero point has none."""
    how = (spec, grad_scale, (True, True), zero_point)
    return *fake_quantize_gradients(grad_output, x, step_size, *how), None
