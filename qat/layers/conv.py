"""Conv2d: the fake-quant layer that trains and its frozen twin that ships."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quantizers import FrozenActivation, OfInput, OfWeight
from ..spec import Granularity
from .linear import match_dtypes, roundings
from .packed import Frozen
from .product import Convolution, product


class QuantConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose weight, and input where asked for, pass through quantizers.

    Attributes:
        weight_quantizer: None leaves the weight alone.
        activation_quantizer: None leaves the input alone.
    """

    weight_quantizer: OfWeight | None
    activation_quantizer: OfInput | None

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of the fake-quantized input and weight."""
        x, x_rounding, weight, weight_rounding = roundings(self, x, self.weight)
        if x.dim() == 4 and self.padding_mode == "zeros" and not isinstance(self.padding, str):
            convolution = Convolution(self.stride, self.padding, self.dilation, self.groups)
            return product(x, weight, self.bias, x_rounding, weight_rounding, convolution)
        x = x if x_rounding is None else x_rounding(x)
        weight = weight if weight_rounding is None else weight_rounding(weight)
        return self._conv_forward(x, weight, self.bias)


class FrozenConv2d(Frozen, nn.Conv2d):
    """A convolution that holds packed codes and dequantizes them on use.

    Attributes:
        activation_quantizer: None leaves the input alone.
    """

    activation_quantizer: FrozenActivation | None

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution in the dtype of x (autocast's, where it is on)."""
        if self.activation_quantizer is not None:
            x = self.activation_quantizer(x)
        if self.packed_weight is None:
            return self._conv_forward(x, self.weight, self.bias)
        x, bias = match_dtypes(x, self.bias)
        weight = self.packed_weight.dequantize(x.dtype)
        in_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if in_channels_last and self.packed_weight.spec.granularity != Granularity.group:
            # As in training (where groups need the other layout): each layout has its own order of summation.
            weight = weight.contiguous(memory_format=torch.channels_last)
        return self._conv_forward(x, weight, bias)
