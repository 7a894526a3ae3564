"""QALoraLinear: a low-rank update of zero points, which merges into codes without touching one: QA-LoRA.

    W' = (q - z') s        z' = round(z - scaling * (B A) / s)        A (r, G), B (N, r), G groups a row

A step of z' moves a whole group, so the update sees sums of inputs over groups: scaling * B A sum_group(x) (QA-LoRA,
arXiv:2309.14717, section 3.3). There the sum is added to the output and merged after training, which is exact in real
numbers. Here the forward multiplies by W' itself, with z' rounded to the float16 that it is stored in (straight
through): codes and scales stay, and what is deployed is the training forward's weight to the bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numerics import QuantizedTensor, stored_zero_point
from ..once import Function, no_view, once
from ..quantizers import FixedDtype
from ..spec import QuantSpec, ScaleDtype
from .linear import QuantLinear, match_dtypes
from .packed import Frozen, PackedWeight
from .product import rows, widened, without_autocast


class ZeroPointLora(FixedDtype):
    """The weight quantizer of a QALoraLinear.

    Attributes:
        lora_A, lora_B: float32 (r, G) and (N, r); B starts at zero.
        scaling: alpha / r.
        spec: of the weight that is deployed.
    """

    def __init__(self, weight: PackedWeight, rank: int, scaling: float) -> None:
        super().__init__()
        rows, groups = weight.shape[0], weight.scale.shape[1]
        self.spec = replace(weight.spec, symmetric=False, zero_point_dtype=ScaleDtype.float16)
        self.scaling, self._weight = scaling, (weight,)  # in a tuple: it is the layer's
        like = {"dtype": torch.float32, "device": weight.packed.device}
        self.lora_A = nn.Parameter(torch.empty(rank, groups, **like))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    @torch.no_grad()
    def zero_point(self) -> Tensor:
        """Return z', (N, G) float16."""
        (weight,) = self._weight
        parts = self.lora_A, self.lora_B, weight.scale, weight.zero_point, self.scaling
        if torch.compiler.is_dynamo_compiling():
            from .. import compiled  # keeps Inductor's own rounding out

            return compiled.moved_zero_point(*parts, self.spec)
        return moved_zero_point(*parts, self.spec)

    def quantize(self, weight: Tensor | None = None) -> QuantizedTensor:
        """Return the integers that the forward uses, with their zero points."""
        (packed,) = self._weight
        rows = packed.shape[0]
        return QuantizedTensor(packed.codes(), packed.scale.expand(rows, -1), self.spec, self.zero_point())


def moved_zero_point(
    a: Tensor, b: Tensor, scale: Tensor, zero_point: Tensor | None, scaling: float, spec: QuantSpec
) -> Tensor:
    """Return z - scaling B A / s, (N, G), rounded to the spec's dtype; a zero point of None is 0."""
    start = 0.0 if zero_point is None else zero_point.float()
    return stored_zero_point(start - scaling * (b @ a) / scale.float(), spec)


class QALoraLinear(Frozen, QuantLinear):
    """A linear layer of frozen codes and scales whose zero points train.

    Attributes:
        packed_weight: its codes and scales.
    """

    weight_quantizer: ZeroPointLora

    def forward(self, input: Tensor) -> Tensor:
        """Return the linear map of the weight with its trained zero points, in the input's dtype, or autocast's."""
        x = input if self.activation_quantizer is None else self.activation_quantizer(widened(input))
        x, bias = match_dtypes(x, self.bias)
        quantizer = self.weight_quantizer
        return _Product.apply(x, bias, quantizer.lora_A, quantizer.lora_B, quantizer)


def make_qa_lora_(layer: nn.Linear, rank: int, scaling: float) -> None:
    """Turn a frozen linear layer into a QALoraLinear, in place."""
    layer.__class__ = QALoraLinear
    layer.weight_quantizer = ZeroPointLora(layer.packed_weight, rank, scaling)


class _Product(Function):
    """Keeps x, A and B; the backward dequantizes again, and sums x over groups in place of a weight's gradient."""

    @staticmethod
    def forward(ctx, x, bias, a, b, quantizer: ZeroPointLora) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.quantizer = quantizer
        with without_autocast(x):
            return no_view(F.linear(x, quantizer.quantize().dequantize(x.dtype), bias))

    @staticmethod
    @once
    def backward(ctx, grad: Tensor):
        x, a, b = ctx.saved_tensors
        grad_x = grad @ ctx.quantizer.quantize().dequantize(x.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = rows(grad).sum(0) if ctx.needs_input_grad[1] else None
        sums = rows(x).unflatten(-1, (a.shape[1], -1)).sum(-1)
        update = ctx.quantizer.scaling * (rows(grad).t() @ sums).float()
        with without_autocast(grad):  # which a compiled backward would be in, as its forward was
            return grad_x, grad_bias, b.t() @ update, update @ a.t(), None
