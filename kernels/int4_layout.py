"""The order in which the int4 kernels read a weight: tensor-core fragments, made once from the checkpoint's layout.

A weight of N outputs and K inputs is cut into row blocks of 16 outputs and K tiles of 64 inputs, the last ones padded:

    words (row blocks, K tiles, 128) int32     scale (row blocks, groups, 16)     zero_point like scale, or None

The 128 words of a tile belong to 32 lanes, four each. Lane (g, c), with g < 8 and c < 4, holds in its word (kh, rh)
the inputs 16 j + 8 kh + 2 c + e of output 8 rh + g: register 2 kh + rh of the left operand of the 16 x 16 step j in
``mma.m16n8k16`` and ``wgmma.m64nNk16`` (PTX ISA, "Matrix Fragments"). Nibble j of half e of the word is u = code + 8,
so one mask takes two neighbouring inputs, a register of the operand, out of a word. With a codebook, u points into it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.packing import pack, unpack

ROWS, INPUTS = 16, 64
# A group is whole half tiles, or the whole row.
GROUP_MULTIPLE = 32

# (rh, g) are a tile's outputs and (j, kh, c, e) its inputs; a word is found by (g, c, kh, rh), a nibble by (e, j).
_ROW_AND_INPUT = (2, 8, 4, 2, 4, 2)  # rh g j kh c e
_SHIFTS = [[4 * j + 16 * e for e in range(2)] for j in range(4)]


# How an operator's schema lists ``Int4Weight.tensors`` and ``Int4Weight.sizes``.
TENSORS = "Tensor words, Tensor scale, Tensor? zero_point, Tensor? levels, Tensor? nest"
SIZES = "int out_features, int in_features, int group_size"


class Int4Weight(NamedTuple):
    """A weight as the kernels read it.

    Attributes:
        words: int32 (row blocks, K tiles, 128).
        scale: (row blocks, groups, 16) bf16, fp16 or fp32; with ``nest`` uint8, the codes of scales.
        zero_point: the scale's shape, int8 or a float dtype; None if symmetric.
        out_features, in_features: N and K.
        group_size: inputs that share a scale; K for the whole row.
        levels: float32 (16,), a codebook; None on the even grid, whose levels are -8 to 7.
        nest: float32, what makes scales of their codes (``nested_scale.join``); None where they are stored.
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor | None
    out_features: int
    in_features: int
    group_size: int
    levels: Tensor | None = None
    nest: Tensor | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return words, scale, zero_point, levels and nest: its part of an operator's tensors."""
        return self.words, self.scale, self.zero_point, self.levels, self.nest

    def sizes(self) -> tuple[int, int, int]:
        """Return out_features, in_features and group_size: its part of an operator's sizes."""
        return self.out_features, self.in_features, self.group_size

    @classmethod
    def of(
        cls,
        words: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        levels: Tensor | None,
        nest: Tensor | None,
        *sizes: int,
    ) -> Int4Weight:
        """Return the weight whose ``tensors`` and ``sizes`` these are."""
        return cls(words, scale, zero_point, *sizes, levels, nest)

    def checkpoint(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Undo ``prepack``: packed uint8 (N, ceil(K / 2)), scale and zero point (N, groups)."""
        zero_point = None if self.zero_point is None else from_tiles(self.zero_point, self.out_features)
        packed = words_to_packed(self.words, self.out_features, self.in_features)
        return packed, from_tiles(self.scale, self.out_features), zero_point


def prepack(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    in_features: int,
    group_size: int,
    levels: Tensor | None = None,
    nest: Tensor | None = None,
) -> Int4Weight:
    """Lay a weight out for the kernels, on its device.

    Args:
        packed: (N, ceil(K / 2)) uint8, from ``qat.packing.pack(codes, 4)``.
        scale: (N, K / group_size), or their codes; (1, 1) where one scale serves the whole weight.
        zero_point: the scale's shape, or None.
        in_features: K, which the bytes of a row do not tell when it is odd.
        group_size: K for the whole row.
        levels: float32 (16,), a codebook, or None.
        nest: from ``nested_scale.join``, or None.
    """
    out_features = packed.shape[0]
    tiles = [None if t is None else to_tiles(t.expand(out_features, -1)) for t in (scale, zero_point)]
    integers = zero_point is not None and zero_point.dtype == torch.int8
    padding = zero_point.expand(out_features, -1)[:, -1:] if integers else None
    if levels is not None:
        padding = (levels.abs().argmin() - 8).to(torch.int8).expand(out_features, 1)
    words = packed_to_words(packed, in_features, padding)
    return Int4Weight(words, tiles[0], tiles[1], out_features, in_features, group_size, levels, nest)


def packed_to_words(packed: Tensor, in_features: int, padding: Tensor | None = None) -> Tensor:
    """Reorder packed uint8 (N, ceil(K / 2)) into words.

    What is padded has code 0, or the code (N, 1) that stands for weight 0 or the one nearest to it: times a large
    scale, another one would be infinite, and infinity times an input 0 is NaN.
    """
    codes = unpack(packed, 4, in_features)
    rows, columns = -codes.shape[0] % ROWS, -in_features % INPUTS
    if padding is not None and columns:
        codes, columns = torch.cat([codes, padding.expand(-1, columns)], 1), 0
    u = (F.pad(codes, (0, columns, 0, rows)) + 8).to(torch.int32)
    blocks, tiles = u.shape[0] // ROWS, u.shape[1] // INPUTS
    rh, g, j, kh, c, e = _ROW_AND_INPUT
    u = u.view(blocks, rh, g, tiles, j, kh, c, e).permute(0, 3, 2, 6, 5, 1, 4, 7)
    # Bits 28 to 31 wrap into the sign, which is the bit pattern wanted.
    return (u << torch.tensor(_SHIFTS, dtype=torch.int32, device=u.device)).sum((-1, -2), dtype=torch.int32).flatten(2)


def words_to_packed(words: Tensor, out_features: int, in_features: int) -> Tensor:
    """Undo ``packed_to_words``."""
    blocks, tiles, _ = words.shape
    rh, g, _, kh, c, _ = _ROW_AND_INPUT
    u = words.view(blocks, tiles, g, c, kh, rh, 1, 1) >> torch.tensor(_SHIFTS, dtype=torch.int32, device=words.device)
    codes = ((u & 15) - 8).to(torch.int8).permute(0, 5, 2, 1, 6, 4, 3, 7).reshape(blocks * ROWS, tiles * INPUTS)
    return pack(codes[:out_features, :in_features], 4)


def to_tiles(rows_by_groups: Tensor) -> Tensor:
    """Lay scales (N, groups) out as (row blocks, groups, 16); 0 past the last row."""
    padded = F.pad(rows_by_groups, (0, 0, 0, -rows_by_groups.shape[0] % ROWS))
    return padded.view(-1, ROWS, padded.shape[1]).transpose(1, 2).contiguous()


def from_tiles(tiles: Tensor, out_features: int) -> Tensor:
    """Undo ``to_tiles``."""
    return tiles.transpose(1, 2).reshape(-1, tiles.shape[1])[:out_features].contiguous()
