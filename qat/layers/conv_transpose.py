"""ConvTranspose1d, 2d and 3d: the fake-quant layers that train and their frozen twins that ship.

torch stores their weight (C_in, C_out / groups, ...). Quantizers, packed codes and specs see it with its outputs first,
(C_out, C_in / groups, ...), as of any convolution: one scale a channel is one an output channel.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizers import FrozenActivation
from .fake_quant import FakeQuant
from .linear import match_dtypes, roundings
from .packed import Frozen
from .product import widened

FUNCTIONS = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}  # by the weight's dimensions


class QuantConvTranspose(FakeQuant):
    """A transposed convolution with fake quantization."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution of the fake-quantized input and weight."""
        x_rounding, weight, weight_rounding = roundings(self, input, other_side_first(self.weight, self.groups))
        x = input if x_rounding is None else x_rounding(widened(input))
        weight = weight if weight_rounding is None else weight_rounding(widened(weight))
        return convolve(self, x, weight, self.bias, output_size)


class QuantConvTranspose1d(QuantConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with fake quantization."""


class QuantConvTranspose2d(QuantConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with fake quantization."""


class QuantConvTranspose3d(QuantConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with fake quantization."""


class FrozenConvTranspose(Frozen):
    """A transposed convolution that holds packed codes and dequantizes them on use.

    Attributes:
        activation_quantizer: None leaves the input alone.
    """

    activation_quantizer: FrozenActivation | None

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution in the dtype of the input (autocast's, where it is on)."""
        x = input if self.activation_quantizer is None else self.activation_quantizer(widened(input))
        if self.packed_weight is None:
            return convolve(self, x, other_side_first(self.weight, self.groups), self.bias, output_size)
        x, bias = match_dtypes(x, self.bias)
        return convolve(self, x, self.packed_weight.dequantize(x.dtype), bias, output_size)


class FrozenConvTranspose1d(FrozenConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with packed codes."""


class FrozenConvTranspose2d(FrozenConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with packed codes."""


class FrozenConvTranspose3d(FrozenConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with packed codes."""


def other_side_first(weight: Tensor, groups: int) -> Tensor:
    """Return a weight (C_in, C_out / groups, ...) as (C_out, C_in / groups, ...), and the other way round."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def convolve(
    layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None
) -> Tensor:
    """Return a layer's transposed convolution of x (B, C_in, ...) and a weight with its outputs first."""
    spatial = weight.dim() - 2
    padding = layer._output_padding(
        x, output_size, layer.stride, layer.padding, layer.kernel_size, spatial, layer.dilation
    )
    weight = other_side_first(weight, layer.groups)
    return FUNCTIONS[weight.dim()](x, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)
