"""LSQ+: activations with a learned offset, for inputs that are neither symmetric nor positive, as behind GELU or Swish.

Bhalgat et al. 2020, arXiv:2004.09576, equations 2 to 6: x_hat = clip(round((x - b) / s)) s + b. What differs from the
paper: the offset b is rounded to a whole number of steps inside the forward (straight through), so that 0 has a code
z = round(-b / s) - q_n of its own, padding is exact, and integer runtimes run what was trained.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from .. import backend, numerics
from ..numerics import bounds, broadcast, inside, stored_scale, summed_by_scale
from ..ranks import sum_over_ranks_
from ..spec import Init, QuantSpec
from .least_error import CANDIDATES
from .lsq import LearnedActivation, features
from .observer import ActivationStatistics
from .rounding import Rounding


class ActivationLSQPlus(LearnedActivation):
    """Fake-quantizes an activation per tensor on a signed grid; step size and offset are learned.

    Attributes:
        offset: float32 parameter (1, 1), in the units of x: the value of the lowest code, at most 0.
    """

    def __init__(self, spec: QuantSpec, device: torch.device, name: str, init: Init = Init.lsq) -> None:
        super().__init__(spec, device, name, init)
        self.offset = nn.Parameter(torch.zeros(1, 1, dtype=torch.float32, device=device))
        self._set_signed(True)

    def rounding(self, x: Tensor) -> Rounding | None:
        """Return what ``forward`` does to x; None if x passes through, observed during calibration."""
        if self.passes(x):
            return None
        grad_scale = 1 / math.sqrt(features(x) * (self.spec.q_n + self.spec.q_p))
        return Rounding(self.spec, self.step_size, grad_scale, self.offset, sys.modules[__name__])

    def zero_point(self) -> Tensor:
        """Return the code of 0, int8 (1, 1)."""
        return zero_point(self.scale(), self.offset, self.spec).to(torch.int8)

    def initialise(self, statistics: ActivationStatistics) -> None:
        """Start from the range that was seen, 0 included, or from the range of least squared error.

        Raises:
            StateError: nothing was observed, or NaN or infinity was.
        """
        _, negative, positive = self.observed(statistics)
        low, high = self.offset.new_tensor([[[-negative]], [[positive]]])
        if self.init is Init.mse:
            low, high = least_error_range(statistics.sampled(), low, high, self.spec)
        self.set_range(low, high)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Start from a range (1, 1) that holds 0."""
        self.offset.copy_(low)
        self.set_step_size(step_of(low, high, self.spec))

    @torch.no_grad()
    def start(self, scale: Tensor, zero_point: Tensor, signed: bool = True) -> None:
        """Start from a stored scale and zero point, as an artifact holds them."""
        self.set_step_size(scale)
        self.offset.copy_(-(zero_point.float() + self.spec.q_n) * scale.float())


def least_error_range(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the range (low, high) of least squared error, from two searches of each end in turn.

    Args:
        x: this rank's values, float32; the errors are those of all ranks' values.
        low, high: float32 (1, 1), the range that clips nothing, 0 included.
        spec: the grid.
    """

    def error(low: Tensor, high: Tensor) -> Tensor:
        return (fake_quantized(x, step_of(low, high, spec), low, spec) - x).square().sum().double()

    def best(candidates: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        errors = sum_over_ranks_(torch.stack([error(*candidate) for candidate in candidates]))
        return candidates[int(errors.argmin())]

    shares = [share / CANDIDATES for share in range(1, CANDIDATES + 1)]
    lowest, highest = low.to(x.device), high.to(x.device)
    low = lowest
    for _ in range(2):
        _, high = best([(low, highest * share) for share in shares])
        low, _ = best([(lowest * share, high) for share in [0.0, *shares]])
    return low, high


def step_of(low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Return the step size that spans a range."""
    return (high - low) / (spec.q_n + spec.q_p)


def zero_point(scale: Tensor, offset: Tensor, spec: QuantSpec) -> Tensor:
    """Return the code of 0, a whole float32, for a stored scale."""
    steps = (-offset.detach().float() / scale.float()).round()
    return (steps - spec.q_n).clamp(-spec.q_n, spec.q_p)


def fake_quantized(
    x: Tensor, step_size: Tensor, offset: Tensor, spec: QuantSpec, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the fake-quantized x in ``dtype`` (its own), without gradients."""
    if backend.fused(x, step_size):
        return _kernels().fake_quantized(x, step_size, spec, dtype, offset=offset)
    zero = zero_point(stored_scale(step_size, spec), offset, spec)
    return numerics.fake_quantized(x, step_size, spec, dtype, zero)


def gradients(
    grad_output: Tensor, x: Tensor, step_size: Tensor, offset: Tensor, spec: QuantSpec, grad_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, step size and offset (equations 3, 5 and 6), with LSQ's strict masks."""
    if backend.fused(x, step_size):
        how = spec, grad_scale, (True, True, True)
        return _kernels().fake_quantize_gradients(grad_output, x, step_size, *how, offset=offset)
    scale = stored_scale(step_size, spec)
    working = torch.promote_types(x.dtype, torch.float32)
    values, scale = broadcast(x.to(working), scale.to(working))
    ratio, zero = values / scale, zero_point(scale, offset.reshape(scale.shape), spec).to(working)
    low, high = bounds(-spec.q_n - zero, spec.q_p - zero)
    ratio.nan_to_num_(-math.inf)  # which is not inside, and has the lowest code
    grad = grad_output.to(working)
    passed = inside(grad, ratio, low, high)
    rounded = ratio.clamp(low, high).round_()
    slope = rounded.sub_(_or_low_(ratio, low, high))  # outside codes, counted from the lowest
    grad_step = summed_by_scale(slope.mul_(grad), step_size, grad_scale)
    grad_offset = summed_by_scale(torch.sub(grad, passed, out=slope), step_size, grad_scale)
    return passed.to(x.dtype), grad_step, grad_offset


def _or_low_(ratio: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Return the ratio where ``low < ratio < high``, strictly, and low elsewhere; in place where bounds are numbers.

    Two thresholds, the upper one of the negated ratio, take a tenth of the time of comparisons on a CPU.
    """
    if isinstance(low, Tensor):
        return torch.where((ratio > low) & (ratio < high), ratio, low)
    return torch.threshold_(torch.threshold_(ratio.neg_(), -high, -low).neg_(), low, low)


def requantize_(
    grad_output: Tensor,
    x: Tensor,
    step_size: Tensor,
    offset: Tensor,
    spec: QuantSpec,
    grad_scale: float,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """Return (fake-quantized x in ``dtype``, or None; the gradients): see ``qat.numerics.requantize_``."""
    if backend.fused(x, step_size):
        return _kernels().requantize_(grad_output, x, step_size, spec, grad_scale, wanted, dtype, offset=offset)
    y = None if dtype is None else fake_quantized(x, step_size, offset, spec, dtype)
    return y, *gradients(grad_output, x, step_size, offset, spec, grad_scale)


@cache
def _kernels() -> ModuleType:
    from qat.kernels import fake_quant  # loads Triton

    return fake_quant
