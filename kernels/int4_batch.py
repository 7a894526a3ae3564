"""Int4 matmul of many tokens on Hopper's tensor cores, in Gluon: ``wgmma``, and x by the tensor memory accelerator.

See ``int4_registers`` for the weights. No atomics: a sum over K that is split is added up in a fixed order.
"""

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

from .int4_items import item_at, load_tile, starts_of, tiles_a_scale, write_item
from .int4_registers import (
    barrier,
    dequantized,
    factors,
    let_next_kernel_start,
    level_of_lane,
    spread_factors,
    wait_for_previous_kernel,
)

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def descriptor(x, block_m: int) -> TensorDescriptor:
    """Return what the tensor memory accelerator needs to read x (M, K) in blocks of (block_m, 64)."""
    return TensorDescriptor(x, [*x.shape], [x.shape[1], 1], [block_m, 64], SWIZZLED)


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
    SHARE: gl.constexpr = tiles_a_scale(GROUP, TILES)
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
            loaded = load_tile(starts, next_inside, next_tile, tiles, K, d, GROUP, HALVES, HAS_ZERO, TILES, WHOLE)
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
    first_m, block, start, end, part, parts = item_at(
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
    starts = starts_of(pointers, block, start, tiles, groups, GROUP, TILES)
    inside = block + of_block < row_blocks, block + row // 16 < row_blocks
    words = ()
    scales = ()
    zeros = ()
    for d in gl.static_range(TILES):
        loaded = load_tile(starts, inside, start, tiles, K, d, GROUP, HALVES, HAS_ZERO, TILES, WHOLE)
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
            after_m, after_block, after_start, after_end, after_part, after_parts = item_at(
                index + programs, M, row_blocks, tiles, band, unsplit, WARPS, BLOCK_M, TILES, SPLIT
            )
            after_starts = starts_of(pointers, after_block, after_start, tiles, groups, GROUP, TILES)
            after_inside = more & (after_block + of_block < row_blocks), more & (after_block + row // 16 < row_blocks)
            sums, reading = _multiply(
                *((first_m, start, end), (after_m, after_start, after_starts, after_inside), more, reading),
                *(x_desc, x_tiles, ready, level, tiles, K, mma, GROUP, HALVES, HAS_ZERO, HAS_LEVELS),
                *(WARPS, BLOCK_M, TILES, STEP, STAGES, SEVERAL, WHOLE),
            )
            if EARLY == 2 and not more:
                let_next_kernel_start()
            write_item(
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
        write_item(
            *(sums, (first_m, block, part, parts), y_ptr, parts_ptr, bias_ptr, M, N, first_n, dtype, mma),
            *(HAS_ZERO, HAS_LEVELS, HAS_BIAS, WARPS, SPLIT),
        )
    for slot in gl.static_range(SLOTS):
        mbarrier.invalidate(ready[slot])
