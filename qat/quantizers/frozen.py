"""FrozenActivation: what an activation's quantizer becomes when the model is frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import fake_quantize, fake_quantized, scale_dtype
from ..spec import QuantSpec
from .fixed_dtype import FixedDtype


class FrozenActivation(FixedDtype):
    """The same integers as in training, from a scale that no longer learns.

    Attributes:
        scale: (1, 1) in ``spec.scale_dtype``.
        zero_point: int8 (1, 1), the code of 0; None on a symmetric grid.
    """

    def __init__(self, spec: QuantSpec, scale: Tensor | None = None, zero_point: Tensor | None = None) -> None:
        super().__init__()
        self.spec = spec
        if not spec.symmetric and zero_point is None:
            zero_point = torch.zeros(1, 1, dtype=torch.int8)
        self.register_buffer("scale", torch.empty(1, 1, dtype=scale_dtype(spec)) if scale is None else scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return dequantize(quantize(x)) in the dtype of x; where nothing is clipped, the gradient passes."""
        if torch.jit.is_tracing():  # a trace holds operators; fake_quantize is a Python function for its gradient
            return fake_quantized(x, self.scale, self.spec, zero_point=self.zero_point)
        return fake_quantize(x, self.scale, self.spec, zero_point=self.zero_point)
