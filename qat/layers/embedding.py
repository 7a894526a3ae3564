"""Embedding: the fake-quant layer that trains and its frozen twin that ships. Only looked-up rows are (de)quantized."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..numerics import fake_quantize
from ..quantizers import WeightLSQ, WeightMinMax
from .fake_quant import FakeQuant
from .packed import Frozen


class QuantEmbedding(FakeQuant, nn.Embedding):
    """``nn.Embedding`` whose rows pass through a quantizer. Where the weight is tied, so is the quantizer.

    Attributes:
        weight_quantizer: the weight's.
        activation_quantizer: None: the input is indices.
    """

    weight_quantizer: WeightLSQ | WeightMinMax
    activation_quantizer: None

    def forward(self, input: Tensor) -> Tensor:
        """Return fake-quantized rows (..., embedding_dim) of int64 or int32 indices (...), in the weight's dtype.

        Quantizing only these rows gives the values and the gradients of looking up in the whole quantized weight.
        """
        options, quantizer = (self.padding_idx, None, 2.0, self.scale_grad_by_freq), self.weight_quantizer
        if isinstance(quantizer, WeightMinMax):  # its range is that of all rows
            return F.embedding(input, quantizer(self.weight), *options)
        rows = F.embedding(input, self.weight, *options, self.sparse)
        if not quantizer.enabled or not rows.numel():
            return rows
        quantizer.require_initialised()
        step_size = quantizer.step_size
        if step_size.shape[0] == len(self.weight):
            step_size = F.embedding(input, step_size, *options).reshape(-1, step_size.shape[1])
        return fake_quantize(rows, step_size, quantizer.spec, quantizer.grad_scale(self.weight))


class FrozenEmbedding(Frozen, nn.Embedding):
    """An embedding that holds packed codes instead of a weight, and dequantizes the rows that are looked up.

    Attributes:
        activation_quantizer: None: the input is indices.
    """

    activation_quantizer: None

    def forward(self, input: Tensor) -> Tensor:
        """Return dequantized rows (..., embedding_dim) of int64 or int32 indices (...)."""
        rows = self.packed_weight.dequantize_rows(input.reshape(-1), self.like.dtype)
        return rows.view(*input.shape, self.embedding_dim)
