"""What a quantizer does to a tensor in one forward, as a value: on which grid, with which step size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import numerics
from ..spec import Dynamic, QuantSpec
from . import dynamic


class Rounding(NamedTuple):
    """A grid and, where it is learned, its step size and LSQ's gradient scale."""

    grid: QuantSpec | Dynamic
    step_size: Tensor | None = None
    grad_scale: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Return x rounded, in its own dtype, with gradients."""
        if self.step_size is None:
            return dynamic.round_dynamic(x, self.grid)
        return numerics.fake_quantize(x, self.step_size, self.grid, self.grad_scale)

    def value(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x rounded, in ``dtype``, without gradients."""
        if self.step_size is None:
            return dynamic.arithmetic(x).rounded(x, self.grid, dtype)
        return numerics.arithmetic(x, self.step_size).fake_quantized(x, self.step_size, self.grid, dtype)

    def backward_(
        self, grad: Tensor, x: Tensor, wanted: tuple[bool, bool], dtype: torch.dtype | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (the value again in ``dtype`` or None, gradient of x, of the step size); ``grad`` is used up."""
        if self.step_size is None:
            return *dynamic.arithmetic(x).reround_(grad, x, self.grid, wanted[0], dtype), None
        arithmetic = numerics.arithmetic(x, self.step_size)
        return arithmetic.requantize_(grad, x, self.step_size, self.grid, self.grad_scale, wanted, dtype)
