"""Linear: the fake-quant layer that trains and its frozen twin that ships."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..once import no_view
from ..quantizers import (
    DynamicActivation,
    FrozenActivation,
    LearnedWeight,
    WeightCodebook,
    WeightMinMax,
)
from ..quantizers.rounding import Rounding
from . import cpu_int4, int8_product
from .fake_quant import FakeQuant
from .packed import Frozen, PackedWeight
from .product import autocast_dtype, in_a_graph, product, rows, widened, without_autocast

if TYPE_CHECKING:
    from ..fusion import FusedProjections


class QuantLinear(FakeQuant, nn.Linear):
    """``nn.Linear`` with fake quantization."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the linear map of the fake-quantized input and weight."""
        x_rounding, weight, weight_rounding = roundings(self, input, self.weight)
        return product(input, weight, self.bias, x_rounding, weight_rounding)


class FrozenLinear(Frozen, nn.Linear):
    """A linear layer that holds packed codes instead of a weight.

    On a GPU, 4-bit weights run in the Triton kernels, with int8 inputs in integers where ``qat.backend`` says so. On a
    CPU, bf16 inputs run in torch's int4 operator where it takes the shape; everything else dequantizes on use.

    Attributes:
        activation_quantizer: None leaves the input alone.
        fused: the group that ``qat.fuse_projections`` put the layer in; None for a layer by itself.
    """

    activation_quantizer: FrozenActivation | DynamicActivation | None
    fused: FusedProjections | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the linear map in the dtype of the input (autocast's, where it is on)."""
        x, activation, bias, fused = input, self.activation_quantizer, self.bias, self.fused
        packed = self._modules.get("packed_weight")  # ten times as fast as the attribute
        if activation is not None:
            if int8_product.fits(x, activation, packed, bias):
                return self._in_integers(x, compute_dtype(x))
            x = activation(widened(x)) if fused is None else fused.rounded(self, x)
        if packed is None:
            return F.linear(x, self.weight, bias)
        x, bias = match_dtypes(x, bias)
        if not x.is_cuda and cpu_int4.fits(x, packed):
            return cpu_int4.int4_linear(x, packed, bias)
        operands = packed.gpu_operands.get(x.dtype)
        if operands is not None:
            if fused is not None:
                return fused(self, x)
            return packed.int4_linear(x, operands, bias)
        if torch.is_grad_enabled() and x.requires_grad and not in_a_graph():
            return _FrozenProduct.apply(x, bias, packed)
        return F.linear(x, packed.dequantize(x.dtype), bias)

    def _in_integers(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.fused is not None:
            return self.fused.in_integers(self, x, dtype)
        weight, bias = self.packed_weight, None if self.bias is None else self.bias.to(dtype)
        operands = weight.gpu_operands[torch.float32], weight.row_sums
        return int8_product.int8_linear(x, self.activation_quantizer, *operands, bias, dtype)


class _FrozenProduct(torch.autograd.Function):
    """Keeps the codes, and dequantizes them again in the backward: adapters train through many such layers."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, weight: PackedWeight) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        with without_autocast(x):
            return no_view(F.linear(x, weight.dequantize(x.dtype), bias))

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x = grad @ ctx.weight.dequantize(ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = rows(grad).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


def roundings(layer: nn.Module, x: Tensor, weight: Tensor) -> tuple[Rounding | None, Tensor, Rounding | None]:
    """Return what is done to a fake-quant layer's input (None for nothing), its weight, and what is done to that.

    The weight comes back rounded where that takes no step sizes, as with a codebook.
    """
    modules = layer._modules  # ten times as fast as the attributes
    activation, quantizer = modules.get("activation_quantizer"), modules.get("weight_quantizer")
    x_rounding = None if activation is None else activation.rounding(x)
    if quantizer is None:
        return x_rounding, weight, None
    if isinstance(quantizer, LearnedWeight):
        return x_rounding, weight, quantizer.rounding(weight)
    if isinstance(quantizer, WeightCodebook | WeightMinMax):  # one of the user's own is given the weight as it is
        weight = widened(weight)
    return x_rounding, quantizer(weight), None


def match_dtypes(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return x in the compute dtype, autocast's where that is on, and the bias in the same."""
    dtype = compute_dtype(x)
    if x.dtype != dtype:
        x = x.to(dtype)
    return x, bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of x, or autocast's where that is on."""
    dtype = autocast_dtype(x)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype
