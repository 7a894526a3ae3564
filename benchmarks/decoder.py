"""A Llama-like decoder with a static KV cache, in plain torch, for benchmarks of generation.

Projections that share their input are one layer each, as serving engines have them: q, k and v; gate and up. What lies
between the matrix products is torch's operators, or ``qat.kernels.decode_step`` for one new token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from qat.kernels.decode_step import add_rms_norm, attend_cached, gated_silu
from qat.kernels.int4_after_norm import norm_gated, norm_linear
from qat.kernels.int4_layout import Int4Weight
from torch import Tensor, nn

LINEARS = ("qkv", "o", "gate_up", "down")


class Shape(NamedTuple):
    """Sizes of a decoder; a head is hidden / heads wide."""

    hidden: int = 4096
    layers: int = 32
    mlp: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256

    @property
    def width(self) -> int:
        """Return the width of a head."""
        return self.hidden // self.heads


LLAMA_8B = Shape()


class Block(nn.Module):
    """RMS norm, rotary attention with grouped queries, RMS norm, SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.norm1, self.norm2 = nn.RMSNorm(shape.hidden, 1e-5), nn.RMSNorm(shape.hidden, 1e-5)
        self.qkv = nn.Linear(shape.hidden, (shape.heads + 2 * shape.kv_heads) * shape.width, bias=False)
        self.o = nn.Linear(shape.heads * shape.width, shape.hidden, bias=False)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], at: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the block's output for tokens at positions ``at`` (T,), which join the cache in place.

        Args:
            x: (B, T, hidden).
            turn: cosines and sines (T, width).
            at: (T,) int64, ascending.
            keys, values: (B, kv_heads, C, width).
        """
        heads, kv_heads = self.shape.heads, self.shape.kv_heads
        batch, count, _ = x.shape
        y = self.qkv(self.norm1(x)).view(batch, count, -1, self.shape.width).transpose(1, 2)
        q, k, v = y.split([heads, kv_heads, kv_heads], 1)
        keys.index_copy_(2, at, rotate(k, *turn))
        values.index_copy_(2, at, v)
        # the queries that share a key lie behind each other, so that no key is repeated
        q = rotate(q, *turn).reshape(batch, kv_heads, -1, self.shape.width)
        seen = torch.arange(keys.shape[2], device=at.device) <= at[:, None]
        scores = (q @ keys.transpose(2, 3)).unflatten(2, (-1, count)).float() * self.shape.width**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).flatten(2, 3).to(x.dtype)
        y = (weights @ values).view(batch, heads, count, -1).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def step(
        self, x: Tensor, update: Tensor | None, turns: tuple[Tensor, Tensor], at: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what ``forward`` would add up, for one token a sequence: x (B, hidden), and what is to join it.

        Args:
            x: (B, hidden).
            update: like x, of the block before; None at the first.
            turns: cosines and sines (C, width) of all positions.
            at: (1,) int64.
            keys, values: (B, kv_heads, C, width).
        """
        x, qkv = after_norm(self.qkv, self.norm1, x, update)
        x, gated = gated_after_norm(self.gate_up, self.norm2, x, self.o(attend_cached(qkv, *turns, at, keys, values)))
        return x, self.down(gated)


def after_norm(layer: nn.Module, norm: nn.RMSNorm, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x + update (B, K), and the layer's output for its norm: in one kernel where the layer is int4."""
    weight = int4_weight(layer, x.dtype)
    if weight is not None:
        return norm_linear(x, update, norm.weight, norm.eps, weight, layer.bias)
    x, y = add_rms_norm(x, update, norm.weight, norm.eps)
    return x, layer(y)


def gated_after_norm(layer: nn.Module, norm: nn.RMSNorm, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x + update, and silu(gate) * up of the layer's output for its norm: in one kernel likewise."""
    weight = int4_weight(layer, x.dtype)
    if weight is not None:
        return norm_gated(x, update, norm.weight, norm.eps, weight, layer.bias)
    x, y = add_rms_norm(x, update, norm.weight, norm.eps)
    return x, gated_silu(layer(y))


def int4_weight(layer: nn.Module, dtype: torch.dtype) -> Int4Weight | None:
    """Return a frozen layer's weight as the int4 kernels read it; None if they do not, or if the input is rounded."""
    packed = getattr(layer, "packed_weight", None)
    rounded = getattr(layer, "activation_quantizer", None) is not None
    return None if packed is None or rounded else packed.gpu_operands.get(dtype)


class CachedDecoder(nn.Module):
    """Embedding, blocks, final norm, head; ``forward`` returns the most likely next token.

    Attributes:
        fused: take ``Block.step`` for one new token.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.fused = shape, False
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, 1e-5)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def caches(self, batch: int, positions: int) -> list[tuple[Tensor, Tensor]]:
        """Return empty keys and values for each block."""
        like, shape = self.norm.weight, self.shape
        size = batch, shape.kv_heads, positions, shape.width
        return [(like.new_zeros(size), like.new_zeros(size)) for _ in self.blocks]

    def turns(self, positions: int) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines (positions, width) of the rotary embedding."""
        like, width = self.norm.weight, self.shape.width
        rates = 500000.0 ** -(torch.arange(0, width, 2, device=like.device) / width)
        angles = (torch.arange(positions, device=like.device)[:, None] * rates).repeat(1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def forward(
        self, tokens: Tensor, at: Tensor, turns: tuple[Tensor, Tensor], caches: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Return the token (B, 1) that follows tokens (B, T) at positions ``at`` (T,)."""
        return self.logits(tokens, at, turns, caches).argmax(-1, keepdim=True)

    def logits(
        self, tokens: Tensor, at: Tensor, turns: tuple[Tensor, Tensor], caches: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Return the logits (B, vocabulary) of the token that follows."""
        x = self.embedding(tokens)
        if self.fused and tokens.shape[1] == 1:
            x, update = x[:, 0], None
            for block, (keys, values) in zip(self.blocks, caches, strict=True):
                x, update = block.step(x, update, turns, at, keys, values)
            return after_norm(self.lm_head, self.norm, x, update)[1]
        turn = turns[0][at], turns[1][at]
        for block, (keys, values) in zip(self.blocks, caches, strict=True):
            x = block(x, turn, at, keys, values)
        return self.lm_head(self.norm(x[:, -1]))

    def linears(self) -> list[nn.Module]:
        """Return the linear layers in the order in which a token meets them."""
        return [getattr(block, name) for block in self.blocks for name in LINEARS] + [self.lm_head]


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn heads (B, H, T, width) by their positions (Su et al. 2021, arXiv:2104.09864)."""
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


def random_decoder(shape: Shape, dtype: torch.dtype, device: torch.device | str) -> CachedDecoder:
    """Return a decoder with random weights, made on its device; norms are 1."""
    with torch.device("meta"):
        model = CachedDecoder(shape).to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model.eval().requires_grad_(False)
