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
def _fetch_x(
    x_desc, x_shared, ready, step, steps, m, k, BLOCK_M: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr
):
    """Start the copy of STEP tiles of x, unless ``step`` is past the last one."""
    slot = step % STAGES
    mbarrier.expect(ready.index(slot), BLOCK_M * 64 * 2 * STEP, pred=step < steps)
    for tile in gl.static_range(STEP):
        target = x_shared.index(slot * STEP + tile)
        at = [m, k + (step * STEP + tile) * 64]
        tma.async_copy_global_to_shared(x_desc, at, ready.index(slot), target, pred=step < steps)


@gluon.jit(do_not_specialize=["M", "band"])
def batch_kernel(
    x_desc,  # (M, K) in blocks of (BLOCK_M, 64)
    words_ptr,
    scale_ptr,
    zero_ptr,
    levels_ptr,
    bias_ptr,
    y_ptr,  # (M, N), contiguous
    parts_ptr,  # (SPLIT, M, N) float32, where SPLIT > 1
    M,
    N,
    K,
    row_blocks,
    tiles,
    groups,
    band,  # blocks of tokens, see bands
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_LEVELS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WARPS: gl.constexpr,  # 4 or 8
    BLOCKS: gl.constexpr,  # WARPS or twice that
    BLOCK_M: gl.constexpr,
    TILES: gl.constexpr,
    STEP: gl.constexpr,  # tiles of x a barrier; divides TILES
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,  # multiplications in flight
    SPLIT: gl.constexpr,
    EARLY: gl.constexpr,
    OWN: gl.constexpr,  # a slot is known at compile time; STEP * STAGES divides TILES
):
    """Many tokens, on Hopper: a program computes (BLOCK_M, 16 BLOCKS) of y, or of one of SPLIT parts of the sum over K.

    Weights stream into registers TILES tiles ahead and multiply with asynchronous ``wgmma``; the tensor memory
    accelerator brings activations to shared memory, where both warpgroups read them.
    """
    gl.static_assert(not OWN or TILES % (STEP * STAGES) == 0)
    dtype: gl.constexpr = x_desc.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_M, 16]
    )
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    word_layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    if EARLY == 1:
        let_next_kernel_start()

    first_m, block = place_in_band(M, BLOCK_M, row_blocks, BLOCKS, band)
    per_part = gl.cdiv(tiles, SPLIT * TILES) * TILES
    start = gl.program_id(1) * per_part
    end = start + per_part  # past the last tile, x is filled with zeros
    steps = per_part // STEP

    if OWN:
        # The compiler then knows slots apart, adds no barriers between their users, and finds their addresses itself.
        x_tiles = ()
        tile_ready = ()
        for slot in gl.static_range(STAGES * STEP):
            x_tiles = x_tiles + (gl.allocate_shared_memory(dtype, [BLOCK_M, 64], x_desc.layout),)
            tile_ready = tile_ready + (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
            mbarrier.init(tile_ready[slot], count=1)
    else:
        x_shared = gl.allocate_shared_memory(dtype, [STAGES * STEP, BLOCK_M, 64], x_desc.layout)
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(STAGES):
            mbarrier.init(ready.index(slot), count=1)
    of_block = block + gl.arange(0, BLOCKS, gl.SliceLayout(1, word_layout))
    word = gl.arange(0, 128, gl.SliceLayout(0, word_layout))
    word_ptrs = words_ptr + of_block.to(gl.int64)[:, None] * tiles * 128 + word[None, :]
    word_inside = (of_block < row_blocks)[:, None]
    row = gl.arange(0, 16 * BLOCKS, gl.SliceLayout(1, left))
    scale_at = (block + row // 16) * groups * 16 + row % 16
    scale_ptrs = scale_ptr + scale_at
    if HAS_ZERO:
        zero_ptrs = zero_ptr + scale_at
    row_inside = block + row // 16 < row_blocks

    level = 0
    if HAS_LEVELS:
        level = level_of_lane(levels_ptr)
    words = ()
    scales = ()
    zeros = ()
    for d in gl.static_range(TILES):
        tile = start + d
        inside = word_inside & (tile < tiles)
        words = words + (gl.load(word_ptrs + tile * 128, mask=inside, other=0, eviction_policy="evict_first"),)
        for h in gl.static_range(HALVES):
            at = (tile * 64 + h * 32) // GROUP * 16
            inside_scale = row_inside & (tile * 64 + h * 32 < K)
            scales = scales + (gl.load(scale_ptrs + at, mask=inside_scale, other=0.0),)
            if HAS_ZERO:
                zeros = zeros + (gl.load(zero_ptrs + at, mask=inside_scale, other=0),)
    barrier()
    if EARLY > 0:
        wait_for_previous_kernel()
    for step in gl.static_range(STAGES - 2):
        if OWN:
            for t in gl.static_range(STEP):
                place = [first_m, (start + step * STEP + t) * 64]
                slot_ready = tile_ready[step * STEP + t]
                mbarrier.expect(slot_ready, BLOCK_M * 64 * 2, pred=step < steps)
                tma.async_copy_global_to_shared(x_desc, place, slot_ready, x_tiles[step * STEP + t], pred=step < steps)
        else:
            _fetch_x(x_desc, x_shared, ready, step, steps, first_m, start * 64, BLOCK_M, STEP, STAGES)

    acc = warpgroup_mma_init(gl.zeros([16 * BLOCKS, BLOCK_M], gl.float32, mma))
    for first in range(start, end, TILES):
        next_words = ()
        next_scales = ()
        next_zeros = ()
        for d in gl.static_range(TILES):
            tile = first + d
            step_now = (tile - start) // STEP
            if d % STEP == 0:
                # Past this barrier every warp has multiplied all but the last step: two steps back, a slot is free.
                if OWN:
                    ahead = step_now + STAGES - 2
                    for t in gl.static_range(STEP):
                        slot_ready = tile_ready[(d + (STAGES - 2) * STEP + t) % (STAGES * STEP)]
                        mbarrier.expect(slot_ready, BLOCK_M * 64 * 2, pred=ahead < steps)
                    barrier()
                    for t in gl.static_range(STEP):
                        place = [first_m, (start + ahead * STEP + t) * 64]
                        slot_ready = tile_ready[(d + (STAGES - 2) * STEP + t) % (STAGES * STEP)]
                        x_slot = x_tiles[(d + (STAGES - 2) * STEP + t) % (STAGES * STEP)]
                        tma.async_copy_global_to_shared(x_desc, place, slot_ready, x_slot, pred=ahead < steps)
                    for t in gl.static_range(STEP):
                        mbarrier.wait(tile_ready[(d + t) % (STAGES * STEP)], step_now // STAGES & 1)
                else:
                    barrier()
                    _fetch_x(
                        x_desc,
                        x_shared,
                        ready,
                        step_now + STAGES - 2,
                        steps,
                        first_m,
                        start * 64,
                        BLOCK_M,
                        STEP,
                        STAGES,
                    )
                    mbarrier.wait(ready.index(step_now % STAGES), step_now // STAGES & 1)
            x_tile = x_tiles[d % (STAGES * STEP)] if OWN else x_shared.index(step_now % STAGES * STEP + d % STEP)
            pairs = words[d].reshape([BLOCKS, 8, 4, 2, 2]).permute([0, 4, 1, 3, 2]).reshape([16 * BLOCKS, 8])
            pairs = gl.join(pairs, pairs).reshape([16 * BLOCKS, 16])
            pairs = gl.convert_layout(pairs, left, assert_trivial=True)
            for h in gl.static_range(HALVES):
                zero = zeros[d * HALVES + h] if HAS_ZERO else 0
                of_rows = factors(scales[d * HALVES + h], zero, dtype, HAS_ZERO, HAS_LEVELS)
                by = spread_factors(of_rows, pairs, 1)
                for plane in gl.static_range(4 // HALVES * h, 4 // HALVES * (h + 1)):
                    weights = dequantized(pairs, by, level, dtype, plane, HAS_ZERO, HAS_LEVELS)
                    x = x_tile.slice(plane * 16, 16, 1).permute([1, 0])
                    acc = warpgroup_mma(weights, x, acc, is_async=True)
                    if plane < 3:
                        acc = warpgroup_mma_init(warpgroup_mma_wait(AHEAD, deps=[acc]))
            inside = word_inside & (tile + TILES < tiles)
            loaded = gl.load(word_ptrs + (tile + TILES) * 128, mask=inside, other=0, eviction_policy="evict_first")
            next_words = next_words + (loaded,)
            for h in gl.static_range(HALVES):
                k = (tile + TILES) * 64 + h * 32
                at = k // GROUP * 16
                next_scales = next_scales + (gl.load(scale_ptrs + at, mask=row_inside & (k < K), other=0.0),)
                if HAS_ZERO:
                    next_zeros = next_zeros + (gl.load(zero_ptrs + at, mask=row_inside & (k < K), other=0),)
            acc = warpgroup_mma_init(warpgroup_mma_wait(AHEAD, deps=[acc]))
        words = next_words
        scales = next_scales
        zeros = next_zeros
    if EARLY == 2:
        let_next_kernel_start()
    y = raised(warpgroup_mma_wait(0, deps=[acc]), dtype, HAS_ZERO, HAS_LEVELS)
    if OWN:
        for slot in gl.static_range(STAGES * STEP):
            mbarrier.invalidate(tile_ready[slot])
    else:
        for slot in gl.static_range(STAGES):
            mbarrier.invalidate(ready.index(slot))

    if HAS_BIAS and SPLIT == 1:
        n_of_y = block * 16 + gl.arange(0, 16 * BLOCKS, gl.SliceLayout(1, mma))
        y += gl.load(bias_ptr + n_of_y, mask=n_of_y < N, other=0.0).to(gl.float32)[:, None]
    store_layout: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, WARPS], [0, 1])
    n = block * 16 + gl.arange(0, 16 * BLOCKS, gl.SliceLayout(1, store_layout))
    m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, store_layout))
    at = m.to(gl.int64)[None, :] * N + n[:, None]
    inside = (m < M)[None, :] & (n < N)[:, None]
    if SPLIT == 1:
        gl.store(y_ptr + at, gl.convert_layout(y.to(dtype), store_layout), mask=inside)
    else:
        part = parts_ptr + gl.program_id(1).to(gl.int64) * M * N
        gl.store(part + at, gl.convert_layout(y, store_layout), mask=inside)
