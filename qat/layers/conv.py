"""Conv1d, Conv2d and Conv3d: the fake-quant layers that train and their frozen twins that ship."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..quantizers import FrozenActivation
from ..spec import Granularity
from .fake_quant import FakeQuant
from .linear import match_dtypes, roundings
from .packed import Frozen
from .product import Convolution, product, widened

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the dimensions of an input


class QuantConv(FakeQuant):
    """A convolution with fake quantization."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the fake-quantized input and weight."""
        x_rounding, weight, weight_rounding = roundings(self, input, self.weight)
        batched = input.dim() == weight.dim()
        if batched and self.padding_mode == "zeros" and not isinstance(self.padding, str):
            convolution = Convolution(self.stride, self.padding, self.dilation, self.groups)
            return product(input, weight, self.bias, x_rounding, weight_rounding, convolution)
        x = input if x_rounding is None else x_rounding(widened(input))
        weight = weight if weight_rounding is None else weight_rounding(widened(weight))
        return self._conv_forward(x, weight, self.bias)


class QuantConv1d(QuantConv, nn.Conv1d):
    """``nn.Conv1d`` with fake quantization."""


class QuantConv2d(QuantConv, nn.Conv2d):
    """``nn.Conv2d`` with fake quantization."""


class QuantConv3d(QuantConv, nn.Conv3d):
    """``nn.Conv3d`` with fake quantization."""


class FrozenConv(Frozen):
    """A convolution that holds packed codes and dequantizes them on use.

    Attributes:
        activation_quantizer: None leaves the input alone.
    """

    activation_quantizer: FrozenActivation | None

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution in the dtype of the input (autocast's, where it is on)."""
        x = input if self.activation_quantizer is None else self.activation_quantizer(widened(input))
        if self.packed_weight is None:
            return self._conv_forward(x, self.weight, self.bias)
        x, bias = match_dtypes(x, self.bias)
        weight = self.packed_weight.dequantize(x.dtype)
        if in_channels_last(x) and self.packed_weight.spec.granularity != Granularity.group:
            # As in training (where groups need the other layout): each layout has its own order of summation.
            weight = weight.contiguous(memory_format=CHANNELS_LAST[weight.dim()])
        return self._conv_forward(x, weight, bias)


class FrozenConv1d(FrozenConv, nn.Conv1d):
    """``nn.Conv1d`` with packed codes."""


class FrozenConv2d(FrozenConv, nn.Conv2d):
    """``nn.Conv2d`` with packed codes."""


class FrozenConv3d(FrozenConv, nn.Conv3d):
    """``nn.Conv3d`` with packed codes."""


def in_channels_last(x: Tensor) -> bool:
    """Return whether the channels of x (B, C, ...) lie side by side in memory, and its pixels do not."""
    layout = CHANNELS_LAST.get(x.dim())
    return layout is not None and x.is_contiguous(memory_format=layout) and not x.is_contiguous()
