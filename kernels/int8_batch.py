"""Int8 codes times int4 codes on Hopper's tensor cores, in Gluon: integer ``wgmma``.

Codes come by the tensor memory accelerator. y^T = W x^T: the weight is the left operand, which ``wgmma`` takes from
registers. A nibble u = code + 8 in the high half of a byte is 16 times its code but for one bit, so that two
instructions make four weights, and the factor 1/16 goes into the scale, exactly:

    (word << 4 or word) & 0xf0f0f0f0 ^ 0x80808080

With zero points, four weights are made of their nibbles by a subtraction that borrows from no neighbour:

    ((word or word >> 4) & 0x0f0f0f0f | 0x80808080) - 0x01010101 * (8 + zero point) ^ 0x80808080

Of each part of a group the sum is an int32, exactly. While tensor cores work on the next part, it becomes a float32 and
is multiplied into the sum of groups: two instructions a value and part, which is what limits groups of 64. Two sets of
accumulators take turns; both are done at the end of a round of SPAN tiles, because ptxas takes all multiplications one
by one where accumulators in flight pass the end of a loop (C7514).
"""

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
from .int4_registers import barrier, let_next_kernel_start, spread, wait_for_previous_kernel

# Of 132 programs with 128 tokens and outputs each, 8 bands of codes and 17 of packed weights are the fewest bytes.
BAND = gl.constexpr(8)
SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


def descriptor(codes, block_m: int) -> TensorDescriptor:
    """Return what the tensor memory accelerator needs to read codes (M, K) in blocks of (block_m, 128)."""
    return TensorDescriptor(codes, [*codes.shape], [codes.shape[1], 1], [block_m, 128], SWIZZLED)


@triton.constexpr_function
def unpack_asm(plane, has_zero):
    """PTX for four int8 of plane 0, the low nibbles, or 1: $1 to $4 the word; $5 to $8 the zero point plus 8, in bytes.

    lop3's 0x6a is a & b ^ c, and 0xea a & b | c.
    """
    if has_zero:
        t = "mov.b32 t, $1;" if plane == 0 else "shr.u32 t, $1, 4;"
        t += " lop3.b32 t, t, 0x0f0f0f0f, 0x80808080, 0xea; sub.u32 t, t, $5; xor.b32 $0, t, 0x80808080;"
    else:
        t = "shl.b32 t, $1, 4;" if plane == 0 else "mov.b32 t, $1;"
        t += " lop3.b32 $0, t, 0xf0f0f0f0, 0x80808080, 0x6a;"
    return "{ .reg .b32 t; " + t + " }"


@gluon.jit
def _unpacked(words, zero, PLANE: gl.constexpr, HAS_ZERO: gl.constexpr):
    asm: gl.constexpr = unpack_asm(PLANE, HAS_ZERO)
    if HAS_ZERO:
        return gl.inline_asm_elementwise(asm, "=r,r,r,r,r,r,r,r,r", [words, zero], dtype=gl.int8, is_pure=True, pack=4)
    else:
        return gl.inline_asm_elementwise(asm, "=r,r,r,r,r", [words], dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit
def _add(y, sums, scale, HAS_ZERO: gl.constexpr):
    scale = scale.to(gl.float32)
    if not HAS_ZERO:
        scale = scale * 0.0625
    return gl.fma(sums.to(gl.float32), gl.broadcast(gl.expand_dims(scale, 1), sums)[0], y)


@gluon.jit(do_not_specialize=["M"])
def int8_batch_kernel(
    codes_desc,  # (M, 64 tiles) int8, in blocks of (BLOCK_M, 128)
    step_ptr,  # (M,)
    shift_ptr,  # (M,)
    words_ptr,  # (row blocks, tiles, 128)
    scale_ptr,  # (row blocks, groups, 16)
    zero_ptr,  # int8, like scale
    sums_ptr,  # (N,)
    bias_ptr,  # (N,)
    y_ptr,  # (M, N), contiguous
    M,
    N,
    row_blocks,
    tiles,
    groups,
    GROUP: gl.constexpr,  # inputs that share a scale
    PART: gl.constexpr,  # tiles that are summed in integers: 1 or 2; of one group
    HAS_ZERO: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WARPS: gl.constexpr,  # 4 or 8
    BLOCKS: gl.constexpr,  # WARPS
    BLOCK_M: gl.constexpr,
    SPAN: gl.constexpr,  # tiles a round; a multiple of 8
    AHEAD: gl.constexpr,  # tiles that words are loaded ahead
    EARLY: gl.constexpr,
):
    """Compute (BLOCK_M, 16 BLOCKS) of y."""
    gl.static_assert(SPAN % 8 == 0)
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_M, 32]
    )
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    STEPS: gl.constexpr = SPAN // 2  # of 128 codes, each with a slot in shared memory
    FETCHED: gl.constexpr = STEPS - 2  # of them under way
    word_layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    if EARLY == 1:
        let_next_kernel_start()

    first_m, block = place_in_band(gl.program_id(0), M, BLOCK_M, row_blocks, BLOCKS, BAND)
    steps = gl.cdiv(tiles, SPAN) * STEPS  # past the last tile, codes are filled with zeros

    # One allocation a slot: the compiler then knows that a copy into one and a product from another need no barrier.
    slots = ()
    ready = ()
    for slot in gl.static_range(STEPS):
        slots = slots + (gl.allocate_shared_memory(gl.int8, [BLOCK_M, 128], codes_desc.layout),)
        ready = ready + (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
        mbarrier.init(ready[slot], count=1)
    of_block = block + gl.arange(0, BLOCKS, gl.SliceLayout(1, word_layout))
    word = gl.arange(0, 128, gl.SliceLayout(0, word_layout))
    word_ptrs = words_ptr + of_block.to(gl.int64)[:, None] * tiles * 128 + word[None, :]
    word_inside = (of_block < row_blocks)[:, None]
    row = gl.arange(0, 16 * BLOCKS, gl.SliceLayout(1, mma))
    scale_ptrs = scale_ptr + ((block + row // 16) * groups * 16 + row % 16)
    row_inside = block + row // 16 < row_blocks
    zero_row = gl.arange(0, 16 * BLOCKS, gl.SliceLayout(1, left))
    zero_ptrs = zero_ptr + ((block + zero_row // 16) * groups * 16 + zero_row % 16)
    zero_inside = block + zero_row // 16 < row_blocks

    words = ()
    for d in gl.static_range(AHEAD):
        words = words + (gl.load(word_ptrs + d * 128, mask=word_inside & (d < tiles), other=0),)
    if HAS_ZERO:
        next_zero = gl.load(zero_ptrs, mask=zero_inside, other=0)
    barrier()
    if EARLY > 0:
        wait_for_previous_kernel()
    for slot in gl.static_range(FETCHED):
        mbarrier.expect(ready[slot], BLOCK_M * 128)
        tma.async_copy_global_to_shared(codes_desc, [first_m, slot * 128], ready[slot], slots[slot])

    y = gl.zeros([16 * BLOCKS, BLOCK_M], gl.float32, mma)
    for first in range(0, tiles, SPAN):
        even = warpgroup_mma_init(gl.zeros([16 * BLOCKS, BLOCK_M], gl.int32, mma))
        odd = warpgroup_mma_init(gl.zeros([16 * BLOCKS, BLOCK_M], gl.int32, mma))
        scale = gl.zeros([16 * BLOCKS], scale_ptr.dtype.element_ty, gl.SliceLayout(1, mma))
        for d in gl.static_range(SPAN):
            if d % 2 == 0:
                # Past this barrier every warp has multiplied all but the last part: a slot further back is free.
                step = first // 2 + d // 2 + FETCHED
                mbarrier.expect(ready[(d // 2 + FETCHED) % STEPS], BLOCK_M * 128, pred=step < steps)
                barrier()
                tma.async_copy_global_to_shared(
                    codes_desc,
                    [first_m, step * 128],
                    ready[(d // 2 + FETCHED) % STEPS],
                    slots[(d // 2 + FETCHED) % STEPS],
                    pred=step < steps,
                )
                mbarrier.wait(ready[d // 2], first // SPAN & 1)
            if d % PART == 0:
                group = (first + d) * 64 // GROUP
                next_scale = gl.load(scale_ptrs + group * 16, mask=row_inside & (group < groups), other=0.0)
                if HAS_ZERO:
                    zero_bytes = (next_zero.to(gl.int32) + 8) * 0x01010101
                    group = (first + d + PART) * 64 // GROUP
                    next_zero = gl.load(zero_ptrs + group * 16, mask=zero_inside & (group < groups), other=0)
            # (block, lane, word) to (output, four codes): only names change, no register moves
            pairs = words[0].reshape([BLOCKS, 8, 4, 2, 2]).permute([0, 4, 1, 3, 2]).reshape([16 * BLOCKS, 8])
            pairs = gl.join(pairs, pairs)
            pairs = gl.join(pairs, pairs).reshape([16 * BLOCKS, 32])
            pairs = gl.convert_layout(pairs, left, assert_trivial=True)
            zero = pairs
            if HAS_ZERO:
                zero = spread(zero_bytes, pairs, 1)
            for plane in gl.static_range(2):
                weights = _unpacked(pairs, zero, plane, HAS_ZERO)
                codes = slots[d // 2].slice(d % 2 * 64 + plane * 32, 32, 1).permute([1, 0])
                if d // PART % 2 == 0:
                    even = warpgroup_mma(weights, codes, even, use_acc=d % PART + plane > 0, is_async=True)
                else:
                    odd = warpgroup_mma(weights, codes, odd, use_acc=d % PART + plane > 0, is_async=True)
            tile = first + d + AHEAD
            inside = word_inside & (tile < tiles)
            words = words[1:] + (gl.load(word_ptrs + tile * 128, mask=inside, other=0),)
            if d % PART == PART - 1:
                if d >= PART:
                    if d // PART % 2 == 0:
                        sums = warpgroup_mma_wait(2 * PART, deps=[odd])
                        odd = warpgroup_mma_init(sums)
                    else:
                        sums = warpgroup_mma_wait(2 * PART, deps=[even])
                        even = warpgroup_mma_init(sums)
                    y = _add(y, sums, scale, HAS_ZERO)
                scale = next_scale
        sums, y = warpgroup_mma_wait(0, deps=[odd, y])
        y = _add(y, sums, scale, HAS_ZERO)
    if EARLY == 2:
        let_next_kernel_start()
    for slot in gl.static_range(STEPS):
        mbarrier.invalidate(ready[slot])

    n_of_y = block * 16 + gl.arange(0, 16 * BLOCKS, gl.SliceLayout(1, mma))
    m_of_y = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
    shift = gl.load(shift_ptr + m_of_y, mask=m_of_y < M, other=0.0)
    step_size = gl.load(step_ptr + m_of_y, mask=m_of_y < M, other=0.0)
    row_sum = gl.load(sums_ptr + n_of_y, mask=n_of_y < N, other=0.0)
    y = (y - row_sum[:, None] * shift[None, :]) * step_size[None, :]
    if HAS_BIAS:
        y += gl.load(bias_ptr + n_of_y, mask=n_of_y < N, other=0.0).to(gl.float32)[:, None]
    store_layout: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, WARPS], [0, 1])
    n = block * 16 + gl.arange(0, 16 * BLOCKS, gl.SliceLayout(1, store_layout))
    m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, store_layout))
    inside = (m < M)[None, :] & (n < N)[:, None]
    y = gl.convert_layout(y.to(y_ptr.dtype.element_ty), store_layout)
    gl.store(y_ptr + (m.to(gl.int64)[None, :] * N + n[:, None]), y, mask=inside)
