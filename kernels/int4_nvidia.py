"""Int4 matmul for NVIDIA tensor cores, in Gluon: weights go from memory to registers and are dequantized there.

Both kernels compute y^T = W x^T, so that the weight is the left operand, which tensor cores take from registers. They
read the layout of ``int4_layout`` with 16-byte loads, a few K tiles ahead, and make two weights an instruction:

    nibble | magic number = magic + u    (magic + u) - (magic + 8 + zero point) = code - zero point    times the scale

The first two steps are exact in 16 bits, and the product of two 16-bit floats is rounded once, so the weight has the
bits of ``qat.numerics.dequantize`` (tested against ``int4_portable``, the twin in plain Triton). No atomics: a sum
over K that is split is added up in a fixed order.

EARLY lets the next kernel of a stream start before this one ends (programmatic dependent launch; Hopper and later): 1
as soon as all of this grid runs, 2 once its sums are done. Weights are read before ``griddepcontrol.wait``, activations
after it, so a weight must not be written by the kernel just before: ``prepack`` is followed by a synchronization.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed after Triton 3.6


def descriptor(x, block_m: int) -> TensorDescriptor:
    """Return what the tensor memory accelerator needs to read x (M, K) in blocks of (block_m, 64)."""
    return TensorDescriptor(x, [*x.shape], [x.shape[1], 1], [block_m, 64], _SWIZZLED)


@triton.constexpr_function
def _dequantize_asm(dtype, plane, has_zero):
    """PTX for one half2 of weights: $1 = $2 the word, $3 the scale twice, $4 minus magic plus 8 plus the zero point.

    f16x2 and bf16x2 instructions take no immediates. On sm_80 bf16x2 has no add and no mul, but fma, which with factor
    1 or addend -0 rounds the same.
    """
    shift = 4 * plane
    if dtype == gl.float16:
        if has_zero:
            body = f"shr.u32 t, $1, {shift}; lop3.b32 t, t, 0x000f000f, 0x64006400, 0xea; add.f16x2 t, t, $4;"
        elif plane % 2 == 0:  # 1024 + u - 1032
            body = f"shr.u32 t, $1, {shift}; mov.b32 z, 0xe408e408; lop3.b32 t, t, 0x000f000f, 0x64006400, 0xea; "
            body += "add.f16x2 t, t, z;"
        else:  # (1024 + 16 u) / 16 - 72 saves a shift
            body = f"shr.u32 t, $1, {shift - 4}; mov.b32 z, 0xd480d480; mov.b32 o, 0x2c002c00; "
            body += "lop3.b32 t, t, 0x00f000f0, 0x64006400, 0xea; fma.rn.f16x2 t, t, o, z;"
        return "{ .reg .b32 t, z, o; " + body + " mul.f16x2 $0, t, $3; }"
    zero = "mov.b32 z, $4;" if has_zero else "mov.b32 z, 0xc308c308;"  # 128 + u - 136
    body = f"shr.u32 t, $1, {shift}; lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; {zero} mov.b32 o, 0x3f803f80; "
    body += "mov.b32 n, 0x80008000; fma.rn.bf16x2 t, t, o, z; fma.rn.bf16x2 $0, t, $3, n;"
    return "{ .reg .b32 t, z, o, n; " + body + " }"


@triton.constexpr_function
def _look_up_asm(dtype, plane):
    """PTX for two weights of a codebook: $1 = $2 the word, $3 = $4 the scale, $5 = $6 the level that this lane holds.

    Lane l holds level l mod 16, and ``shfl`` (0x101f: among 16 lanes) takes it from the lane that a nibble names; the
    bits above the nibble it ignores.
    """
    take = "shfl.sync.idx.b32 {0}, $5, {0}, 0x101f, 0xffffffff; mul.rn.f32 {0}, {0}, $3; "
    body = f"shr.u32 a, $1, {4 * plane}; shr.u32 b, $1, {4 * plane + 16}; " + take.format("a") + take.format("b")
    return "{ .reg .b32 a, b; " + body + f"cvt.rn.{'f16x2' if dtype == gl.float16 else 'bf16x2'}.f32 $0, b, a; }}"


@gluon.jit
def _level_of_lane(levels_ptr):
    """Return levels[lane mod 16]: a scalar to Triton, and another one in each lane."""
    asm: gl.constexpr = (
        "{ .reg .b32 l; .reg .b64 a; mov.u32 l, %laneid; and.b32 l, l, 15; mad.wide.u32 a, l, 4, $1; "
        "ld.global.nc.b32 $0, [a]; }"
    )
    return gl.inline_asm_elementwise(asm, "=r,l", [levels_ptr.to(gl.int64)], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _weights(
    word,
    scale,
    zero,
    level,
    dtype: gl.constexpr,
    PLANE: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_LEVELS: gl.constexpr,
):
    """Return plane PLANE of the words, 16 inputs wide, dequantized to ``dtype``."""
    if HAS_LEVELS:
        look_up: gl.constexpr = _look_up_asm(dtype, PLANE)
        level = gl.full(word.shape, level, gl.int32, word.type.layout)
        return gl.inline_asm_elementwise(
            look_up, "=r,r,r,f,f,r,r", [word, scale, level], dtype.value, is_pure=True, pack=2
        )
    elif HAS_ZERO:
        asm: gl.constexpr = _dequantize_asm(dtype, PLANE, True)
        return gl.inline_asm_elementwise(asm, "=r,r,r,r,r", [word, scale, zero], scale.dtype, is_pure=True, pack=2)
    else:
        asm: gl.constexpr = _dequantize_asm(dtype, PLANE, False)
        return gl.inline_asm_elementwise(asm, "=r,r,r,r", [word, scale], scale.dtype, is_pure=True, pack=2)


@gluon.jit
def _zero_magic(zero, dtype: gl.constexpr):
    """Return what brings magic + u to code - zero point."""
    magic: gl.constexpr = 1032.0 if dtype == gl.float16 else 136.0
    return (-magic - zero.to(gl.float32)).to(dtype)


@gluon.jit
def _spread(value, like, axis: gl.constexpr):
    """Broadcast one value a row over the inputs."""
    return gl.broadcast(gl.expand_dims(value, axis), like)[0]


@gluon.jit
def _wait_for_previous_kernel():
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _let_next_kernel_start():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
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
        _let_next_kernel_start()

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
        level = _level_of_lane(levels_ptr)
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
        _wait_for_previous_kernel()
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
            _barrier()
            _stage_x(x_shared, x_ptrs, x_k, x_inside, first // TILES + STAGES - 1, K, WARPS, TILES, STAGES)
        for d in gl.static_range(TILES):
            # (warp, block, lane, word) to (warp, output, pair of inputs): only names change, no register moves
            pairs = words[d].reshape([WARPS, BLOCKS, 8, 4, 2, 2]).permute([0, 1, 5, 2, 4, 3])
            pairs = pairs.reshape([WARPS, 16 * BLOCKS, 8])
            pairs = gl.join(pairs, pairs).reshape([WARPS, 16 * BLOCKS, 16])
            pairs = gl.convert_layout(pairs, left, assert_trivial=True)
            for h in gl.static_range(HALVES):
                scale = scales[d * HALVES + h]
                if HAS_LEVELS:
                    scale = scale.to(gl.float32)
                scale = _spread(scale, pairs, 2)
                zero = scale
                if HAS_ZERO:
                    zero = _spread(_zero_magic(zeros[d * HALVES + h], dtype), pairs, 2)
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
                    acc = mma_v2(_weights(pairs, scale, zero, level, dtype, plane, HAS_ZERO, HAS_LEVELS), x, acc)
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
        _let_next_kernel_start()
    if STAGES > 0:
        async_copy.wait_group(0)

    y = gl.sum(acc, 0)
    n = block * 16 + gl.arange(0, 16 * BLOCKS, gl.SliceLayout(1, gl.SliceLayout(0, mma)))
    m_out = gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(0, mma)))
    if HAS_BIAS:
        y += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    gl.store(y_ptr + (m_out[None, :] * N + n[:, None]), y.to(dtype), mask=(m_out < M)[None, :] & (n < N)[:, None])


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


@gluon.jit(do_not_specialize=["M"])
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
):
    """Many tokens, on Hopper: a program computes (BLOCK_M, 16 BLOCKS) of y, or of one of SPLIT parts of the sum over K.

    Weights stream into registers TILES tiles ahead and multiply with asynchronous ``wgmma``; the tensor memory
    accelerator brings activations to shared memory, where both warpgroups read them.
    """
    dtype: gl.constexpr = x_desc.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_M, 16]
    )
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    word_layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    if EARLY == 1:
        _let_next_kernel_start()

    programs_m = gl.cdiv(M, BLOCK_M)
    first_m = gl.program_id(0) % programs_m * BLOCK_M
    block = gl.program_id(0) // programs_m * BLOCKS
    per_part = gl.cdiv(tiles, SPLIT * TILES) * TILES
    start = gl.program_id(1) * per_part
    end = start + per_part  # past the last tile, x is filled with zeros
    steps = per_part // STEP

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
        level = _level_of_lane(levels_ptr)
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
    _barrier()
    if EARLY > 0:
        _wait_for_previous_kernel()
    for step in gl.static_range(STAGES - 2):
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
                _barrier()
                _fetch_x(
                    x_desc, x_shared, ready, step_now + STAGES - 2, steps, first_m, start * 64, BLOCK_M, STEP, STAGES
                )
                mbarrier.wait(ready.index(step_now % STAGES), step_now // STAGES & 1)
            x_tile = x_shared.index(step_now % STAGES * STEP + d % STEP)
            pairs = words[d].reshape([BLOCKS, 8, 4, 2, 2]).permute([0, 4, 1, 3, 2]).reshape([16 * BLOCKS, 8])
            pairs = gl.join(pairs, pairs).reshape([16 * BLOCKS, 16])
            pairs = gl.convert_layout(pairs, left, assert_trivial=True)
            for h in gl.static_range(HALVES):
                scale = scales[d * HALVES + h]
                if HAS_LEVELS:
                    scale = scale.to(gl.float32)
                scale = _spread(scale, pairs, 1)
                zero = scale
                if HAS_ZERO:
                    zero = _spread(_zero_magic(zeros[d * HALVES + h], dtype), pairs, 1)
                for plane in gl.static_range(4 // HALVES * h, 4 // HALVES * (h + 1)):
                    weights = _weights(pairs, scale, zero, level, dtype, plane, HAS_ZERO, HAS_LEVELS)
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
        _let_next_kernel_start()
    y = warpgroup_mma_wait(0, deps=[acc])
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
