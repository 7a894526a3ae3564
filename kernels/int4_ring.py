"""Weights through a ring in shared memory, in Gluon: what ``int4_stream``'s programs read, and in what order.

A program takes every n-th row block, from its own number on. With two PARTS the weight is cut into two halves of rows,
and a row block of the first is followed by the one as far into the second. A row block is read in STEPS steps of TILES
K tiles a warp, and a step's words, scales and zero points make up a slot of the ring. With one step, the programs along
the grid's second axis may each have one of their own: then they share out K.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@triton.constexpr_function
def x_layout(tiles, warps):
    """Return a layout of (tiles, warps, 64) for 16-byte accesses."""
    across = min(tiles, warps)
    return gl.BlockedLayout([1, 1, 8], [1, 4, 8], [across, warps // across, 1], [2, 1, 0])


@gluon.jit
def _indices(
    PLANES: gl.constexpr, WARPS: gl.constexpr, WIDTH: gl.constexpr, HALVES: gl.constexpr, layout: gl.constexpr
):
    """Return the tile of a step, the half of the tile, and the place in it, for (tile and half, warp, place)."""
    plane = gl.arange(0, PLANES, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    warp = gl.arange(0, WARPS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    place = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    return plane // HALVES * WARPS + warp, plane % HALVES, place


@gluon.jit
def inputs(step, TILES: gl.constexpr, WARPS: gl.constexpr):
    """Return which inputs (TILES, WARPS, 64) are those of a step."""
    tile, _, place = _indices(TILES, WARPS, 64, 1, x_layout(TILES, WARPS))
    return (step * TILES * WARPS + tile) * 64 + place


@gluon.jit
def allocate_x(dtype: gl.constexpr, STEPS: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr):
    """Return shared memory for x, as ``inputs`` numbers it."""
    return gl.allocate_shared_memory(dtype, [STEPS, TILES, WARPS, 64], PLAIN)


@gluon.jit
def block_of(at, row_blocks, PARTS: gl.constexpr):
    """Return the row block of a place, which is its first part's, or as far on as one part is long."""
    return (at[0] + at[1] * (row_blocks // PARTS)).to(gl.int64)


@gluon.jit
def first_place():
    """Return the place that a program starts at; where the grid's second axis shares out K, its part is one step."""
    return gl.program_id(0), 0, gl.program_id(1)


@gluon.jit
def next_place(at, PARTS: gl.constexpr, STEPS: gl.constexpr):
    """Return the place (row block of the first part, part, step) that a program reads after this one."""
    row, part, step = at
    done = True
    if STEPS > 1:
        step += 1
        done = step == STEPS
    if done:
        if STEPS > 1:
            step = 0
        part += 1
        if part == PARTS:
            part = 0
            row += gl.num_programs(0)
    return row, part, step


@gluon.jit
def fetch(
    rings,
    places,
    slot,
    at,  # row block of the first part, part, step
    row_blocks,
    tiles,
    groups,
    GROUP: gl.constexpr,
    WHOLE: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    PARTS: gl.constexpr,
    SPAN: gl.constexpr,
):
    """Start to copy the words, scales and zero points of a step: SPAN tiles of a row block."""
    words, scales, zeros = rings
    word_ptrs, word_tile, scale_ptrs, scale_tile, scale_half, zero_ptrs, zero_tile, zero_half = places
    first, inside, block = at[2] * SPAN, at[0] < row_blocks // PARTS, block_of(at, row_blocks, PARTS)
    there = inside if WHOLE else inside & (first + word_tile < tiles)
    source = word_ptrs + (block * tiles + first) * 128
    async_copy.async_copy_global_to_shared(words.index(slot), source, there, eviction_policy="evict_first")
    there = inside if WHOLE else inside & (first + scale_tile < tiles)
    group = ((first + scale_tile) * 64 + scale_half * 32) // GROUP
    source = scale_ptrs + (block * groups + group) * 16
    async_copy.async_copy_global_to_shared(scales.index(slot), source, there & (group < groups))
    if HAS_ZERO:
        there = inside if WHOLE else inside & (first + zero_tile < tiles)
        group = ((first + zero_tile) * 64 + zero_half * 32) // GROUP
        source = zero_ptrs + (block * groups + group) * 16
        async_copy.async_copy_global_to_shared(zeros.index(slot), source, there & (group < groups))
    async_copy.commit_group()


@gluon.jit
def start_reading(
    words_ptr,
    scale_ptr,
    zero_ptr,
    row_blocks,
    tiles,
    groups,
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    PARTS: gl.constexpr,
    WHOLE: gl.constexpr,
    STEPS: gl.constexpr,
    WARPS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill the rings; return them, where they are filled from, and what comes next."""
    word_layout: gl.constexpr = gl.BlockedLayout([TILES, 1, 4], [1, 1, 32], [1, WARPS, 1], [2, 1, 0])
    of_scale: gl.constexpr = 16 // (scale_ptr.dtype.element_ty.primitive_bitwidth // 8)
    threads: gl.constexpr = [1, 2 * of_scale, 16 // of_scale]
    scale_layout: gl.constexpr = gl.BlockedLayout([1, 1, of_scale], threads, [WARPS, 1, 1], [2, 1, 0])
    zero_layout: gl.constexpr = gl.BlockedLayout([1, 1, 16], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])
    word_ring = gl.allocate_shared_memory(gl.int32, [STAGES, TILES, WARPS, 128], PLAIN)
    scale_ring = gl.allocate_shared_memory(scale_ptr.dtype.element_ty, [STAGES, TILES * HALVES, WARPS, 16], PLAIN)
    zero_ring = scale_ring
    if HAS_ZERO:
        zero_ring = gl.allocate_shared_memory(gl.int8, [STAGES, TILES * HALVES, WARPS, 16], PLAIN)
    rings = word_ring, scale_ring, zero_ring
    word_tile, _, word = _indices(TILES, WARPS, 128, 1, word_layout)
    scale_tile, scale_half, scale_row = _indices(TILES * HALVES, WARPS, 16, HALVES, scale_layout)
    zero_tile, zero_half, zero_row = _indices(TILES * HALVES, WARPS, 16, HALVES, zero_layout)
    places = (
        words_ptr + (word_tile * 128 + word),
        word_tile,
        scale_ptr + scale_row,
        scale_tile,
        scale_half,
        zero_ptr + zero_row,
        zero_tile,
        zero_half,
    )
    at = first_place()
    for slot in gl.static_range(STAGES):
        fetch(rings, places, slot, at, row_blocks, tiles, groups, GROUP, WHOLE, HAS_ZERO, PARTS, WARPS * TILES)
        at = next_place(at, PARTS, STEPS)
    return rings, places, at
