"""Learned step sizes on a grid with zero points, which stay as they start: asymmetric weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..numerics import MIN_SCALE, QuantizedTensor, quantize_tensor, scale_shape, stored_zero_point, zero_point_dtype
from ..spec import Init, QuantSpec
from .half_quadratic import half_quadratic
from .lsq import LearnedWeight
from .rounding import Rounding


class AsymmetricLSQ(LearnedWeight):
    """Fake-quantizes a weight per tensor, channel or group.

    It starts with the range of the weight's values, whatever the policy's init says of symmetric grids, but for HQQ,
    which moves real zero points from there; or with the scales and zero points of a model that is quantized already
    (``start``).

    Attributes:
        zero_point: buffer (rows, groups) that does not learn: float32, whole and in the range of the codes, or real, in
            the dtype that it is stored in.
    """

    def __init__(self, spec: QuantSpec, weight: Tensor, name: str, init: Init = Init.minmax) -> None:
        spec = replace(spec, signed=True)
        shape = scale_shape(weight.shape, spec)
        super().__init__(spec, shape, name, init, weight.device)
        dtype = torch.float32 if spec.zero_point_dtype is None else zero_point_dtype(spec)  # see ``LearnedStepSize``
        self.register_buffer("zero_point", torch.zeros(shape, dtype=dtype, device=weight.device))
        if not weight.is_meta:
            step_size, zero_point = range_of(weight, spec)
            if init is Init.hqq:
                zero_point = half_quadratic(weight, step_size, zero_point, spec)
            self.start(step_size, zero_point)

    @torch.no_grad()
    def start(self, step_size: Tensor, zero_point: Tensor) -> None:
        """Start from step sizes and zero points of the shape (rows, groups)."""
        self.zero_point.copy_(zero_point)
        self.set_step_size(step_size)

    def zero_points(self) -> Tensor:
        """Return the zero points."""
        return self.zero_point

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return the integers that ``forward`` uses."""
        zero_point = Rounding(self.spec, offset=self.zero_point).zero_point().to(zero_point_dtype(self.spec), copy=True)
        return quantize_tensor(weight, self.scale(), self.spec, zero_point)


def range_of(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the step size (rows, groups) that spans each block's values, and the zero point: float32.

    0 is spanned too with zero points among the codes, and in a block of one value, or of values so much nearer to each
    other than to 0 that no stored step size and real zero point reach them.
    """
    blocks = weight.detach().float().reshape(*scale_shape(weight.shape, spec), -1)
    low, high = blocks.amin(-1), blocks.amax(-1)
    with_zero = low.clamp_max(0), high.clamp_min(0)
    if spec.zero_point_dtype is None:
        low, high = with_zero
    else:
        width = (high - low) / (spec.q_n + spec.q_p)
        farthest = width * torch.finfo(zero_point_dtype(spec)).max
        reached = (width >= MIN_SCALE) & (torch.maximum(low.abs(), high.abs()) <= farthest)
        low, high = torch.where(reached, low, with_zero[0]), torch.where(reached, high, with_zero[1])
    step_size = (high - low) / (spec.q_n + spec.q_p)
    zero_point = torch.where(step_size > 0, -low / step_size, 0.0) - spec.q_n
    if spec.zero_point_dtype is not None:
        return step_size, stored_zero_point(zero_point, spec).float()
    return step_size, zero_point.round().clamp(-spec.q_n, spec.q_p)
