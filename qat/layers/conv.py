"""Conv2d: the fake-quant layer that trains and its frozen twin that ships."""

from __future__ import annotations

from torch import Tensor, nn

from ..quantizers import ActivationLSQ, FrozenActivation, WeightCodebook, WeightLSQ
from .linear import match_dtypes
from .packed import Frozen


class QuantConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose weight, and input where asked for, pass through quantizers.

    Attributes:
        weight_quantizer: None leaves the weight alone.
        activation_quantizer: None leaves the input alone.
    """

    weight_quantizer: WeightLSQ | WeightCodebook | None
    activation_quantizer: ActivationLSQ | None

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of the fake-quantized input and weight."""
        if self.activation_quantizer is not None:
            x = self.activation_quantizer(x)
        weight = self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
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
        return self._conv_forward(x, self.packed_weight.dequantize(x.dtype), bias)
