"""Int4 matmul of many tokens on Hopper's tensor cores, in Gluon: ``wgmma``, and x by the tensor memory accelerator.

See ``int4_registers`` for the weights. No atomics: a sum over K that is split is added up in a fixed order.
"""

import math

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .bands import place_in_band
from .int4_registers import (
    barrier,
    dequantized,
    factors,
    let_next_kernel_start,
    level_of_lane,
    raised,
    spread_factors,
    wait_for_previous_kernel,
)

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def descriptor(x, block_m: int) -> TensorDescriptor:
    """Return what the tensor memory accelerator needs to read x (M, K) in blocks of (block_m, 64)."""
    return TensorDescriptor(x, [*x.shape], [x.shape[1], 1], [block_m, 64], SWIZZLED)


@gluon.jit
def _item(
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
def _tiles_a_scale(group, tiles):
    """Return how many K tiles of a round, in a row and from its first on, have one scale."""
    return math.gcd(group // 64, tiles) if group % 64 == 0 else 1


@gluon.jit
def _starts(pointers, block, tile, tiles, groups, GROUP: gl.constexpr, TILES: gl.constexpr):
    """Return where the words, scales and zero points of a round of TILES tiles start."""
    word_ptrs, scale_ptrs, zero_ptrs = pointers
    group = 0 if TILES * 64 % GROUP != 0 else tile * 64 // GROUP
    at_scale = (block * groups + group) * 16
    return word_ptrs + (block.to(gl.int64) * tiles + tile) * 128, scale_ptrs + at_scale, zero_ptrs + at_scale


@gluon.jit
def _load(
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

    Where K ends in the middle of a round, what is not there is zero, like x, and not whatever a register holds.
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
    if D % _tiles_a_scale(GROUP, TILES) == 0:
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
def _multiply(
    item,  # its first token, first K tile, and the one past its last
    after,  # the next one's first token, first K tile, where its first round starts, and which rows it has
    more,  # whether there is a next one
    reading,  # words, scales and zero points of a round, where it starts, which rows there are, and the turn of x_tiles
    x_desc,
    x_tiles,
    ready,
    level,
    tiles,
    K,
    mma: gl.constexpr,
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_LEVELS: gl.constexpr,
    WARPS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TILES: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    SEVERAL: gl.constexpr,
    WHOLE: gl.constexpr,
):
    """Return an item's sums, and what has been read of the next one meanwhile."""
    SLOTS: gl.constexpr = STEP * STAGES
    FETCHED: gl.constexpr = (STAGES - 2) * STEP  # tiles of x under way
    SHARE: gl.constexpr = _tiles_a_scale(GROUP, TILES)
    SCALES: gl.constexpr = TILES * 64 // GROUP * 16 if TILES * 64 % GROUP == 0 else 0  # a round
    dtype: gl.constexpr = x_desc.dtype
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    first_m, start, end = item
    words, scales, zeros, starts, inside, turn = reading
    acc = warpgroup_mma_init(gl.zeros([16 * WARPS, BLOCK_M], gl.float32, mma))
    for first in range(start, end, TILES):
        there = more | (first + TILES < end)
        next_m, next_tile = first_m, first + TILES
        starts = starts[0] + TILES * 128, starts[1] + SCALES, starts[2] + SCALES
        next_inside = inside[0] & there, inside[1] & there
        if SEVERAL:
            last = first + TILES >= end
            next_m, next_tile = gl.where(last, after[0], next_m), gl.where(last, after[1], next_tile)
            starts = _either(last, after[2], starts)
            inside = _either(last, after[3], inside)
            next_inside = inside
        next_words = ()
        next_scales = ()
        next_zeros = ()
        for d in gl.static_range(TILES):
            if d % STEP == 0:
                # Past this barrier every warp has multiplied all but the last step: two steps back, a slot is free.
                for t in gl.static_range(STEP):
                    wanted = there if d + FETCHED >= TILES else True
                    mbarrier.expect(ready[(d + FETCHED + t) % SLOTS], BLOCK_M * 64 * 2, pred=wanted)
                barrier()
                for t in gl.static_range(STEP):
                    wanted = there if d + FETCHED >= TILES else True
                    tile = next_tile + (d + FETCHED + t - TILES) if d + FETCHED >= TILES else first + (d + FETCHED + t)
                    place = [next_m if d + FETCHED >= TILES else first_m, tile * 64]
                    slot_ready, x_slot = ready[(d + FETCHED + t) % SLOTS], x_tiles[(d + FETCHED + t) % SLOTS]
                    tma.async_copy_global_to_shared(x_desc, place, slot_ready, x_slot, pred=wanted)
                for t in gl.static_range(STEP):
                    mbarrier.wait(ready[(d + t) % SLOTS], turn + d // SLOTS & 1)
            # (block of outputs, lane and word) to (output, pair of inputs): only names change, no register moves
            pairs = words[d].reshape([WARPS, 8, 4, 2, 2]).permute([0, 4, 1, 3, 2]).reshape([16 * WARPS, 8])
            pairs = gl.join(pairs, pairs).reshape([16 * WARPS, 16])
            pairs = gl.convert_layout(pairs, left, assert_trivial=True)
            for h in gl.static_range(HALVES):
                if d % SHARE == 0:
                    zero = zeros[d // SHARE * HALVES + h] if HAS_ZERO else 0
                    of_rows = factors(scales[d // SHARE * HALVES + h], zero, dtype, HAS_ZERO, HAS_LEVELS)
                by = spread_factors(of_rows, pairs, 1)
                for plane in gl.static_range(4 // HALVES * h, 4 // HALVES * (h + 1)):
                    weights = dequantized(pairs, by, level, dtype, plane, HAS_ZERO, HAS_LEVELS)
                    x = x_tiles[d % SLOTS].slice(plane * 16, 16, 1).permute([1, 0])
                    acc = warpgroup_mma(weights, x, acc, is_async=True)
            loaded = _load(starts, next_inside, next_tile, tiles, K, d, GROUP, HALVES, HAS_ZERO, TILES, WHOLE)
            next_words = next_words + (loaded[0],)
            next_scales = next_scales + loaded[1]
            next_zeros = next_zeros + loaded[2]
            acc = warpgroup_mma_init(warpgroup_mma_wait(4, deps=[acc]))  # those of this tile stay in flight
        words, scales, zeros = next_words, next_scales, next_zeros
        turn += TILES // SLOTS
    return warpgroup_mma_wait(0, deps=[acc]), (words, scales, zeros, starts, inside, turn)


@gluon.jit
def _either(condition, one, other):
    """Choose between two tuples of as many tensors."""
    chosen = ()
    for each in gl.static_range(len(one)):
        chosen = chosen + (gl.where(condition, one[each], other[each]),)
    return chosen


@gluon.jit
def _write(
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


@gluon.jit(do_not_specialize=["M", "band", "unsplit"])
def batch_kernel(
    x_desc,  # (M, K) in blocks of (BLOCK_M, 64)
    words_ptr,
    scale_ptr,
    zero_ptr,
    levels_ptr,
    bias_ptr,
    y_ptr,  # (M, N), contiguous
    parts_ptr,  # (SPLIT, M, N - first_n) float32, where SPLIT > 1
    M,
    N,
    K,
    row_blocks,
    tiles,
    groups,
    band,  # blocks of tokens, see bands
    unsplit,  # items that are not split, those of outputs below first_n
    first_n,
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_LEVELS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WHOLE: gl.constexpr,  # whether rounds of TILES tiles make up K
    WARPS: gl.constexpr,  # 4 or 8
    BLOCK_M: gl.constexpr,
    TILES: gl.constexpr,  # a multiple of STEP * STAGES
    STEP: gl.constexpr,  # tiles of x that come together
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    EARLY: gl.constexpr,
    SEVERAL: gl.constexpr,  # whether a program may have more than one item
):
    """Many tokens, on Hopper: an item is (BLOCK_M, 16 WARPS) of y, or one of SPLIT parts of its sum over K.

    A program computes every n-th item. Weights stream into registers TILES tiles ahead, also across the ends of items,
    and multiply with asynchronous ``wgmma``; the tensor memory accelerator brings activations to shared memory, where
    both warpgroups read them.
    """
    gl.static_assert(TILES % (STEP * STAGES) == 0)
    dtype: gl.constexpr = x_desc.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_M, 16]
    )
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    word_layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    SLOTS: gl.constexpr = STEP * STAGES
    FETCHED: gl.constexpr = (STAGES - 2) * STEP  # tiles of x under way
    if EARLY == 1:
        let_next_kernel_start()

    programs, index = gl.num_programs(0), gl.program_id(0)
    items = gl.cdiv(M, BLOCK_M) * gl.cdiv(row_blocks, WARPS)
    if SPLIT > 1:
        items = unsplit + (items - unsplit) * SPLIT
    first_m, block, start, end, part, parts = _item(
        index, M, row_blocks, tiles, band, unsplit, WARPS, BLOCK_M, TILES, SPLIT
    )

    # One allocation a slot: the compiler then knows slots apart, adds no barriers between their users, and finds their
    # addresses itself.
    x_tiles = ()
    ready = ()
    for slot in gl.static_range(SLOTS):
        x_tiles = x_tiles + (gl.allocate_shared_memory(dtype, [BLOCK_M, 64], x_desc.layout),)
        ready = ready + (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
        mbarrier.init(ready[slot], count=1)
    of_block = gl.arange(0, WARPS, gl.SliceLayout(1, word_layout))[:, None]
    word = gl.arange(0, 128, gl.SliceLayout(0, word_layout))[None, :]
    row = gl.arange(0, 16 * WARPS, gl.SliceLayout(1, left))
    scale_at = row // 16 * groups * 16 + row % 16
    pointers = words_ptr + (of_block.to(gl.int64) * tiles * 128 + word), scale_ptr + scale_at, zero_ptr + scale_at

    level = 0
    if HAS_LEVELS:
        level = level_of_lane(levels_ptr)
    starts = _starts(pointers, block, start, tiles, groups, GROUP, TILES)
    inside = block + of_block < row_blocks, block + row // 16 < row_blocks
    words = ()
    scales = ()
    zeros = ()
    for d in gl.static_range(TILES):
        loaded = _load(starts, inside, start, tiles, K, d, GROUP, HALVES, HAS_ZERO, TILES, WHOLE)
        words = words + (loaded[0],)
        scales = scales + loaded[1]
        zeros = zeros + loaded[2]
    barrier()
    if EARLY > 0:
        wait_for_previous_kernel()
    for slot in gl.static_range(FETCHED):
        mbarrier.expect(ready[slot], BLOCK_M * 64 * 2)
        tma.async_copy_global_to_shared(x_desc, [first_m, (start + slot) * 64], ready[slot], x_tiles[slot])

    reading = words, scales, zeros, starts, inside, 0
    if SEVERAL:
        for _ in range(index, items, programs):
            more = index + programs < items
            after_m, after_block, after_start, after_end, after_part, after_parts = _item(
                index + programs, M, row_blocks, tiles, band, unsplit, WARPS, BLOCK_M, TILES, SPLIT
            )
            after_starts = _starts(pointers, after_block, after_start, tiles, groups, GROUP, TILES)
            after_inside = more & (after_block + of_block < row_blocks), more & (after_block + row // 16 < row_blocks)
            sums, reading = _multiply(
                *((first_m, start, end), (after_m, after_start, after_starts, after_inside), more, reading),
                *(x_desc, x_tiles, ready, level, tiles, K, mma, GROUP, HALVES, HAS_ZERO, HAS_LEVELS),
                *(WARPS, BLOCK_M, TILES, STEP, STAGES, SEVERAL, WHOLE),
            )
            if EARLY == 2 and not more:
                let_next_kernel_start()
            _write(
                *(sums, (first_m, block, part, parts), y_ptr, parts_ptr, bias_ptr, M, N, first_n, dtype, mma),
                *(HAS_ZERO, HAS_LEVELS, HAS_BIAS, WARPS, SPLIT),
            )
            index += programs
            first_m, block, start, end, part, parts = (
                after_m,
                after_block,
                after_start,
                after_end,
                after_part,
                after_parts,
            )
    else:
        sums, reading = _multiply(
            *((first_m, start, end), (), False, reading),
            *(x_desc, x_tiles, ready, level, tiles, K, mma, GROUP, HALVES, HAS_ZERO, HAS_LEVELS),
            *(WARPS, BLOCK_M, TILES, STEP, STAGES, SEVERAL, WHOLE),
        )
        if EARLY == 2:
            let_next_kernel_start()
        _write(
            *(sums, (first_m, block, part, parts), y_ptr, parts_ptr, bias_ptr, M, N, first_n, dtype, mma),
            *(HAS_ZERO, HAS_LEVELS, HAS_BIAS, WARPS, SPLIT),
        )
    for slot in gl.static_range(SLOTS):
        mbarrier.invalidate(ready[slot])
