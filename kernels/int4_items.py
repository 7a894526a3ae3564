"""What the programs of ``int4_batch`` compute, item by item, and where an item is read from and written to, in Gluon.

An item is a block of y, of BLOCK_M tokens and 16 WARPS outputs, or a part of its sum over K, which is read in rounds of
TILES tiles.
"""

import math

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .bands import place_in_band
from .int4_registers import raised


@gluon.jit
def item_at(
    index,
    M,
    row_blocks,
    tiles,
    band,
    unsplit,
    WARPS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TILES: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """Return an item's first token, first row block, first K tile, the one past its last, its part and their number.

    The first ``unsplit`` items are sums over all of K; the others, in the order of their parts, one of SPLIT of it.
    """
    part, parts = 0, 1
    if SPLIT > 1:
        in_parts = gl.cdiv(M, BLOCK_M) * gl.cdiv(row_blocks, WARPS) - unsplit
        split = index >= unsplit
        part = gl.where(split, (index - unsplit) // in_parts, 0)
        parts = gl.where(split, SPLIT, 1)
        index = gl.where(split, unsplit + (index - unsplit) % in_parts, index)
    first_m, block = place_in_band(index, M, BLOCK_M, row_blocks, WARPS, band)
    rounds = gl.cdiv(tiles, TILES)  # which parts share out; none is left without
    return first_m, block, part * rounds // parts * TILES, (part + 1) * rounds // parts * TILES, part, parts


@triton.constexpr_function
def tiles_a_scale(group, tiles):
    """Return how many K tiles of a round, in a row and from its first on, have one scale."""
    return math.gcd(group // 64, tiles) if group % 64 == 0 else 1


@gluon.jit
def starts_of(pointers, block, tile, tiles, groups, GROUP: gl.constexpr, TILES: gl.constexpr):
    """Return where the words, scales and zero points of a round of TILES tiles start."""
    word_ptrs, scale_ptrs, zero_ptrs = pointers
    group = 0 if TILES * 64 % GROUP != 0 else tile * 64 // GROUP
    at_scale = (block * groups + group) * 16
    return word_ptrs + (block.to(gl.int64) * tiles + tile) * 128, scale_ptrs + at_scale, zero_ptrs + at_scale


@gluon.jit
def load_tile(
    starts,
    inside,
    first,  # tile of the round
    tiles,
    K,
    D: gl.constexpr,  # tile in the round
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    TILES: gl.constexpr,
    WHOLE: gl.constexpr,
):
    """Return the words of a K tile, and of its halves the scales and zero points, where no tile before has them.

    Where K ends in the middle of a round, what is not there is zero, like x, and not whatever a register holds; rows
    that are not there make sums that nobody writes.
    """
    word_ptrs, scale_ptrs, zero_ptrs = starts
    of_block, of_row = inside
    if WHOLE:
        words = gl.load(word_ptrs + D * 128, mask=of_block, eviction_policy="evict_first")
    else:
        there = of_block & (first + D < tiles)
        words = gl.load(word_ptrs + D * 128, mask=there, other=0, eviction_policy="evict_first")
    scales = ()
    zeros = ()
    if D % tiles_a_scale(GROUP, TILES) == 0:
        for h in gl.static_range(HALVES):
            k = D * 64 + h * 32
            group = k // GROUP if TILES * 64 % GROUP == 0 else (first * 64 + k) // GROUP
            if WHOLE:
                scales = scales + (gl.load(scale_ptrs + group * 16, mask=of_row),)
                if HAS_ZERO:
                    zeros = zeros + (gl.load(zero_ptrs + group * 16, mask=of_row),)
            else:
                there = of_row & (first * 64 + k < K)
                scales = scales + (gl.load(scale_ptrs + group * 16, mask=there, other=0.0),)
                if HAS_ZERO:
                    zeros = zeros + (gl.load(zero_ptrs + group * 16, mask=there, other=0),)
    return words, scales, zeros


@gluon.jit
def _store(target_ptr, first_row, y, first_n, first_m, M, N, WARPS: gl.constexpr):
    """Write y (outputs, tokens) into rows of N from ``first_row`` on."""
    at_once: gl.constexpr = 128 // y.dtype.primitive_bitwidth
    layout: gl.constexpr = gl.BlockedLayout([at_once, 1], [16, 2], [1, WARPS], [0, 1])
    n = first_n + gl.arange(0, y.shape[0], gl.SliceLayout(1, layout))
    m = first_m + gl.arange(0, y.shape[1], gl.SliceLayout(0, layout))
    at = (first_row + m.to(gl.int64))[None, :] * N + n[:, None]
    inside = (m < M)[None, :] & (n < N)[:, None]
    gl.store(target_ptr + at, gl.convert_layout(y, layout), mask=inside)


@gluon.jit
def write_item(
    sums,
    item,  # its first token, its first row block, its part, of how many
    y_ptr,
    parts_ptr,
    bias_ptr,
    M,
    N,
    first_n,
    dtype: gl.constexpr,
    mma: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_LEVELS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WARPS: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """Write an item: y with the bias, or a part of it without."""
    first_m, block, part, parts = item
    y = raised(sums, dtype, HAS_ZERO, HAS_LEVELS)
    if HAS_BIAS:
        n = block * 16 + gl.arange(0, y.shape[0], gl.SliceLayout(1, mma))
        y += gl.load(bias_ptr + n, mask=(n < N) & (parts == 1), other=0.0).to(gl.float32)[:, None]
    if SPLIT == 1 or parts == 1:
        _store(y_ptr, 0, y.to(dtype), block * 16, first_m, M, N, WARPS)
    else:
        _store(parts_ptr, part.to(gl.int64) * M, y, block * 16 - first_n, first_m, M, N - first_n, WARPS)
