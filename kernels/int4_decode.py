"""Int4 matmul of few tokens on NVIDIA tensor cores, in Gluon: ``mma``, from Ampere on. See ``int4_registers``."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

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


@gluon.jit
def _stage_x(x_shared, x_ptrs, x_k, inside, step, K, WARPS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr):
    for d in gl.static_range(TILES):
        k = (step * TILES + d) * WARPS * 64
        target = x_shared.index(step % STAGES * TILES + d)
        async_copy.async_copy_global_to_shared(target, x_ptrs + k, mask=inside & (x_k + k < K))
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["M"])
def decode_kernel(
    x_ptr,  # (M, K), contiguous
    words_ptr,  # (row blocks, K tiles, 128)
    scale_ptr,  # (row blocks, groups, 16), in the dtype of x
    zero_ptr,  # int8, like scale
    levels_ptr,  # (16,) float32, a codebook
    bias_ptr,  # (N,), contiguous
    y_ptr,  # (M, N), contiguous
    M,
    N,
    K,
    row_blocks,
    tiles,
    groups,
    GROUP: gl.constexpr,  # inputs that share a scale
    HALVES: gl.constexpr,  # 2 where a group ends in the middle of a tile
    HAS_ZERO: gl.constexpr,
    HAS_LEVELS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    MASK_K: gl.constexpr,  # False where WARPS * TILES tiles at a time make up K
    WARPS: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCK_M: gl.constexpr,  # 8, 16 or 32
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Few tokens, M <= BLOCK_M: a program computes 16 BLOCKS outputs; its warps share out the K tiles.

    Each warp streams TILES tiles ahead into registers and multiplies with ``mma.m16n8k16``. Activations come through
    STAGES buffers in shared memory, or straight from the cache where STAGES is 0, which suits one token.
    """
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    word_layout: gl.constexpr = gl.BlockedLayout([1, BLOCKS, 4], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0])
    copy_layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [WARPS, 1, 1], [2, 1, 0])
    if EARLY == 1:
        let_next_kernel_start()

    block = gl.program_id(0) * BLOCKS
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, word_layout)))
    of_block = block + gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, word_layout)))
    word = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, word_layout)))
    word_ptrs = words_ptr + of_block.to(gl.int64)[None, :, None] * tiles * 128
    word_ptrs = word_ptrs + (warp[:, None, None] * 128 + word[None, None, :])
    word_inside = (of_block < row_blocks)[None, :, None]

    row_warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, left)))
    row = gl.arange(0, 16 * BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, left)))
    scale_at = ((block + row // 16) * groups * 16 + row % 16)[None, :]
    scale_ptrs = scale_ptr + scale_at
    if HAS_ZERO:
        zero_ptrs = zero_ptr + scale_at
    row_inside = (block + row // 16 < row_blocks)[None, :]

    if STAGES > 0:
        x_layout: gl.constexpr = copy_layout
        x_warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, x_layout)))
        m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(2, x_layout)))
        x_k = (
            x_warp[:, None, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, x_layout)))[None, None, :]
        )
        x_ptrs, x_inside = x_ptr + x_k + m[None, :, None] * K, (m < M)[None, :, None]
        swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
        x_shared = gl.allocate_shared_memory(dtype, [STAGES * TILES, WARPS, BLOCK_M, 64], swizzled)
    else:
        x_warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, right)))
        m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(1, right)))
        x_k = x_warp[:, None, None] * 64 + gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, right)))[None, :, None]
        x_ptrs, x_inside = x_ptr + x_k + m[None, None, :] * K, (m < M)[None, None, :]

    level = 0
    if HAS_LEVELS:
        level = level_of_lane(levels_ptr)
    words = ()
    scales = ()
    zeros = ()
    for d in gl.static_range(TILES):
        inside = (d * WARPS + warp < tiles)[:, None, None] & word_inside
        words = words + (gl.load(word_ptrs + d * WARPS * 128, mask=inside, other=0, eviction_policy="evict_first"),)
        for h in gl.static_range(HALVES):
            k = ((d * WARPS + row_warp) * 64 + h * 32)[:, None]
            at = k // GROUP * 16
            scales = scales + (gl.load(scale_ptrs + at, mask=row_inside & (k < K), other=0.0),)
            if HAS_ZERO:
                zeros = zeros + (gl.load(zero_ptrs + at, mask=row_inside & (k < K), other=0),)
    if EARLY > 0:
        wait_for_previous_kernel()
    if STAGES > 0:
        for step in gl.static_range(STAGES - 1):
            _stage_x(x_shared, x_ptrs, x_k, x_inside, step, K, WARPS, TILES, STAGES)

    acc = gl.zeros([WARPS, 16 * BLOCKS, BLOCK_M], gl.float32, mma)
    for first in range(0, gl.cdiv(tiles, WARPS), TILES):
        next_words = ()
        next_scales = ()
        next_zeros = ()
        if STAGES > 0:
            async_copy.wait_group(STAGES - 2)
            barrier()
            _stage_x(x_shared, x_ptrs, x_k, x_inside, first // TILES + STAGES - 1, K, WARPS, TILES, STAGES)
        for d in gl.static_range(TILES):
            # (warp, block, lane, word) to (warp, output, pair of inputs): only names change, no register moves
            pairs = words[d].reshape([WARPS, BLOCKS, 8, 4, 2, 2]).permute([0, 1, 5, 2, 4, 3])
            pairs = pairs.reshape([WARPS, 16 * BLOCKS, 8])
            pairs = gl.join(pairs, pairs).reshape([WARPS, 16 * BLOCKS, 16])
            pairs = gl.convert_layout(pairs, left, assert_trivial=True)
            for h in gl.static_range(HALVES):
                zero = zeros[d * HALVES + h] if HAS_ZERO else 0
                of_rows = factors(scales[d * HALVES + h], zero, dtype, HAS_ZERO, HAS_LEVELS)
                by = spread_factors(of_rows, pairs, 2)
                for plane in gl.static_range(4 // HALVES * h, 4 // HALVES * (h + 1)):
                    if STAGES > 0:
                        x_tile = x_shared.index(first // TILES % STAGES * TILES + d)
                        x = x_tile.slice(plane * 16, 16, 2).permute([0, 2, 1]).load(right)
                    else:
                        k = (first + d) * WARPS * 64 + plane * 16
                        if MASK_K:
                            x = gl.load(x_ptrs + k, mask=x_inside & (x_k + k < K), other=0.0)
                        else:
                            x = gl.load(x_ptrs + k, mask=x_inside, other=0.0)
                    acc = mma_v2(dequantized(pairs, by, level, dtype, plane, HAS_ZERO, HAS_LEVELS), x, acc)
            tile = (first + d + TILES) * WARPS
            inside = (tile + warp < tiles)[:, None, None] & word_inside
            loaded = gl.load(word_ptrs + tile * 128, mask=inside, other=0, eviction_policy="evict_first")
            next_words = next_words + (loaded,)
            for h in gl.static_range(HALVES):
                k = ((tile + row_warp) * 64 + h * 32)[:, None]
                at = k // GROUP * 16
                next_scales = next_scales + (gl.load(scale_ptrs + at, mask=row_inside & (k < K), other=0.0),)
                if HAS_ZERO:
                    next_zeros = next_zeros + (gl.load(zero_ptrs + at, mask=row_inside & (k < K), other=0),)
        words = next_words
        scales = next_scales
        zeros = next_zeros
    if EARLY == 2:
        let_next_kernel_start()
    if STAGES > 0:
        async_copy.wait_group(0)

    y = raised(gl.sum(acc, 0), dtype, HAS_ZERO, HAS_LEVELS)
    n = block * 16 + gl.arange(0, 16 * BLOCKS, gl.SliceLayout(1, gl.SliceLayout(0, mma)))
    m_out = gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(0, mma)))
    if HAS_BIAS:
        y += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    gl.store(y_ptr + (m_out[None, :] * N + n[:, None]), y.to(dtype), mask=(m_out < M)[None, :] & (n < N)[:, None])
