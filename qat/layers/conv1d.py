"""Conv1D: the linear layer of GPT-2's code in transformers, whose weight is stored (inputs, outputs).

Quantizers, packed codes and specs see the matrix (outputs, inputs), as of any linear layer. ``Conv1D`` here stands for
transformers' class of that name, so that a model which has none does not import it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .linear import FrozenLinear, QuantLinear, roundings
from .product import product, widened


class Conv1D(nn.Module):
    """What ``plain_type`` returns for ``transformers.pytorch_utils.Conv1D``."""

    @staticmethod
    def is_type_of(layer: nn.Module) -> bool:
        """Return whether a layer is a Conv1D of transformers, neither fake-quant nor frozen."""
        return f"{type(layer).__module__}.{type(layer).__qualname__}" == "transformers.pytorch_utils.Conv1D"


class QuantConv1D(QuantLinear):
    """A Conv1D whose weight, and input where asked for, pass through quantizers."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear map of the fake-quantized input and weight."""
        x_rounding, weight, weight_rounding = roundings(self, x, self.weight.t())
        return product(x, weight, self.bias, x_rounding, weight_rounding)


class FrozenConv1D(FrozenLinear):
    """A Conv1D that holds packed codes: from then on a linear layer like any other."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear map in the dtype of x (autocast's, where it is on)."""
        if self.packed_weight is not None:
            return super().forward(x)
        return F.linear(self.activation_quantizer(widened(x)), self.weight.t(), self.bias)
