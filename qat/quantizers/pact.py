"""PACT: activations whose clipping bound is learned, and only by what it clips.

Choi et al. 2018, arXiv:1805.06085, section 3: y = clip(x, 0, a), and dy/da = 1 where x >= a, else 0. The bound is
a = q_p s, and its parameter here the step size s: with the gradient scale 1 / q_p^2, SGD moves s to where it would move
a. The paper's L2 penalty on a is the optimizer's weight decay, which falls on these step sizes alone. Inputs that are
not behind a ReLU are clipped at both ends.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from .. import numerics
from ..numerics import broadcast, inside, stored_scale, summed_by_scale
from ..spec import QuantSpec
from .lsq import LearnedActivation
from .rounding import Rounding


class ActivationPACT(LearnedActivation):
    """Fake-quantizes an activation per tensor; its clipping bound is learned."""

    def rounding(self, x: Tensor) -> Rounding | None:
        """Return what ``forward`` does to x; None if x passes through, observed during calibration."""
        if self.passes(x):
            return None
        return Rounding(self.spec, self.step_size, 1 / self.spec.q_p**2, rule=sys.modules[__name__])


def fake_quantized(
    x: Tensor, step_size: Tensor, offset: None, spec: QuantSpec, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the fake-quantized x in ``dtype`` (its own), without gradients."""
    return numerics.arithmetic(x, step_size).fake_quantized(x, step_size, spec, dtype)


def gradients(
    grad_output: Tensor, x: Tensor, step_size: Tensor, offset: None, spec: QuantSpec, grad_scale: float
) -> tuple[Tensor, Tensor, None]:
    """Return the gradients of x and of the step size."""
    working = torch.promote_types(x.dtype, torch.float32)
    values, scale = broadcast(x.to(working), stored_scale(step_size, spec).to(working))
    ratio = values / scale
    low, high, grad = -spec.q_n, spec.q_p, grad_output.to(working)
    clipped = ratio.clamp(low, high)
    ratio.nan_to_num_(math.inf)  # which is not inside
    grad_x = inside(grad, ratio, low, high).to(x.dtype)
    clipped.sub_(inside(ratio, ratio, low, high))  # leaves 0 where nothing is clipped
    return grad_x, summed_by_scale(clipped.mul_(grad), step_size, grad_scale), None


def requantize_(
    grad_output: Tensor,
    x: Tensor,
    step_size: Tensor,
    offset: None,
    spec: QuantSpec,
    grad_scale: float,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """Return (fake-quantized x in ``dtype``, or None; the gradients): see ``qat.numerics.requantize_``."""
    y = None if dtype is None else fake_quantized(x, step_size, offset, spec, dtype)
    return y, *gradients(grad_output, x, step_size, offset, spec, grad_scale)
