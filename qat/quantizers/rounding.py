"""What a quantizer does to a tensor in one forward, as a value: on which grid, with which step size."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import numerics
from ..spec import Dynamic, QuantSpec
from . import dynamic, rules


class Rounding(NamedTuple):
    """A grid and, where its step size is learned, what belongs to that.

    Attributes:
        grid: the grid.
        step_size: None where it follows from the values.
        grad_scale: of the gradients of step size and offset.
        offset: the zero point, or what the rule makes of it; None where 0 is the code of 0.
        rule: whose values and gradients they are (``quantizers.rules``); None for ``qat.numerics``.
        kept: where to keep the value; None to make it each time.
    """

    grid: QuantSpec | Dynamic
    step_size: Tensor | None = None
    grad_scale: float = 1.0
    offset: Tensor | None = None
    rule: ModuleType | None = None
    kept: dict | None = None

    def zero_point(self) -> Tensor | None:
        """Return the stored zero point: of a grid with whole ones, what an average of models left a little off is."""
        if self.offset is None or self.grid.zero_point_dtype is not None:
            return self.offset
        return self.offset.round()

    def __call__(self, x: Tensor) -> Tensor:
        """Return x rounded, in its own dtype, with gradients."""
        if self.step_size is None:
            return dynamic.round_dynamic(x, self.grid)
        if self.rule is None:
            return numerics.fake_quantize(x, self.step_size, self.grid, self.grad_scale, self.zero_point())
        return rules.fake_quantize(self.rule, x, self.step_size, self.offset, self.grid, self.grad_scale)

    def value(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x rounded, in ``dtype``, without gradients."""
        if self.step_size is None:
            return dynamic.arithmetic(x).rounded(x, self.grid, dtype)
        if self.rule is not None:
            return self.rule.fake_quantized(x, self.step_size, self.offset, self.grid, dtype)
        if self.kept is None:
            arithmetic = numerics.arithmetic(x, self.step_size)
            return arithmetic.fake_quantized(x, self.step_size, self.grid, dtype, self.zero_point())
        state = [None if tensor is None else _state(tensor) for tensor in (x, self.step_size, self.offset)]
        if self.kept.get(dtype, (None,))[0] != state:
            self.kept[dtype] = state, self._replace(kept=None).value(x, dtype)
        return self.kept[dtype][1]

    def backward_(
        self, grad: Tensor, x: Tensor, wanted: tuple[bool, bool, bool], dtype: torch.dtype | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return (the value again in ``dtype`` or None, gradient of x, step size and offset); ``grad`` is used up."""
        if self.step_size is None:
            return *dynamic.arithmetic(x).reround_(grad, x, self.grid, wanted[0], dtype), None, None
        how = self.grid, self.grad_scale, wanted, dtype
        if self.rule is None:
            arithmetic = numerics.arithmetic(x, self.step_size)
            return *arithmetic.requantize_(grad, x, self.step_size, *how, self.zero_point()), None
        again, *grads = self.rule.requantize_(grad, x, self.step_size, self.offset, *how)
        return again, *(grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True))

    def slopes(self, x: Tensor, wanted: tuple[bool, bool]) -> list[Tensor | None]:
        """Return what a gradient of 1 for each rounded element of x adds to those of step size and offset.

        It is the gradient of a step size that the element has to itself, float32 (or float64) and laid out as x.
        """
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        in_order = x.permute(order)
        flat = in_order.reshape(-1, 1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        tensors = self.step_size, self.offset
        own = [None if tensor is None else tensor.to(dtype).expand(len(flat), 1) for tensor in tensors]
        alone = self._replace(step_size=own[0], offset=own[1])
        made = alone.backward_(torch.ones_like(flat), flat, (False, *wanted), None)[2:]
        back = [order.index(axis) for axis in range(x.dim())]
        return [slope if slope is None else slope.view(in_order.shape).permute(back) for slope in made]


def _state(tensor: Tensor) -> tuple:
    """Return what differs where a tensor is another one, or has changed in place. It keeps the memory it names."""
    return tensor.untyped_storage(), tensor.storage_offset(), tensor.stride(), tensor._version
