"""Embedding: the fake-quant layer that trains and its frozen twin that ships. Only looked-up rows are (de)quantized."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numerics import fake_quantize
from ..quantizers import WeightLSQ
from .packed import PackedWeight


class QuantEmbedding(nn.Embedding):
    """``nn.Embedding`` whose rows pass through a quantizer. Where the weight is tied, so is the quantizer.

    Attributes:
        weight_quantizer: the weight's.
        activation_quantizer: None: the input is indices.
    """

    weight_quantizer: WeightLSQ
    activation_quantizer: None

    def forward(self, indices: Tensor) -> Tensor:
        """Return fake-quantized rows (..., embedding_dim) of int64 or int32 indices (...), in the weight's dtype.

        Quantizing only these rows gives the values and the gradients of looking up in the whole quantized weight.
        """
        options = (self.padding_idx, None, 2.0, self.scale_grad_by_freq)
        rows = F.embedding(indices, self.weight, *options, self.sparse)
        quantizer = self.weight_quantizer
        if not quantizer.enabled:
            return rows
        quantizer.require_initialised()
        step_size = quantizer.step_size
        if step_size.shape[0] == len(self.weight):
            step_size = F.embedding(indices, step_size, *options).reshape(-1, step_size.shape[1])
        return fake_quantize(rows, step_size, quantizer.spec, quantizer.grad_scale(self.weight))


class FrozenEmbedding(nn.Embedding):
    """An embedding that holds packed codes instead of a weight, and dequantizes the rows that are looked up.

    Attributes:
        packed_weight: the codes.
        activation_quantizer: None: the input is indices.
        like: empty, in the dtype of what the embedding gives, which follows the model's as a weight's would.
    """

    packed_weight: PackedWeight
    activation_quantizer: None
    like: Tensor

    def forward(self, indices: Tensor) -> Tensor:
        """Return dequantized rows (..., embedding_dim) of int64 or int32 indices (...)."""
        rows = self.packed_weight.dequantize_rows(indices.reshape(-1), self.like.dtype)
        return rows.view(*indices.shape, self.embedding_dim)


def set_dtype_(layer: FrozenEmbedding, dtype: torch.dtype, device: torch.device) -> None:
    """Say in what dtype an embedding gives its rows. It is no part of the state dict: the artifact's config has it."""
    layer.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)
