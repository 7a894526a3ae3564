"""Int8 codes times int4 codes on Hopper's tensor cores, in Gluon: integer ``wgmma``, fed by a warp that only reads.

That warp fills a ring of slots of 128 inputs: codes of x and words of the weight by the tensor memory accelerator,
scales and zero points by ``cp.async``. Two warpgroups, of 64 outputs each, multiply from it. They wait for the ring and
not for each other, so that one scales its sums while the tensor cores work for the other, and what the next item needs
is on its way while this one's is written. A program computes every n-th item.

y^T = W x^T: the weight is the left operand, which ``wgmma`` takes from registers. A nibble u = code + 8 in the high
half of a byte is 16 times its code but for one bit, so that two instructions make four weights, and the factor 1/16
goes into the scale, exactly:

    (word << 4 or word) & 0xf0f0f0f0 ^ 0x80808080

With zero points, four weights are made of their nibbles by a subtraction that borrows from no neighbour:

    ((word or word >> 4) & 0x0f0f0f0f | 0x80808080) - 0x01010101 * (8 + zero point) ^ 0x80808080

Of each part of a group the sum is an int32, exactly. While tensor cores work on the next part, it becomes a float32 and
is multiplied into the sum of groups: two instructions a value and part. Two sets of accumulators take turns; both are
done at the end of a round of two parts, because ptxas takes all multiplications one by one where accumulators in flight
pass the end of a loop (C7514). Longer rounds were no faster.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .bands import place_in_band
from .int4_registers import let_next_kernel_start, spread, wait_for_previous_kernel

# Of 132 programs with 128 tokens and outputs each, 8 bands of codes and 17 of packed weights are the fewest bytes.
BAND = gl.constexpr(8)
BLOCKS = gl.constexpr(8)  # row blocks of an item: 128 outputs
CODES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
WORDS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)


def descriptors(codes, words, block_m: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Return what the tensor memory accelerator needs to read codes (M, K) and words of ``int4_layout``.

    Codes come in blocks of (block_m, 128), words in four row blocks of two tiles, 32 words a line.
    """
    row_blocks, tiles, _ = words.shape
    of_codes = TensorDescriptor(codes, [*codes.shape], [codes.shape[1], 1], [block_m, 128], CODES)
    return of_codes, TensorDescriptor(words, [row_blocks, tiles * 4, 32], [tiles * 128, 32, 1], [4, 8, 32], WORDS)


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
def _unpacked(words, zero, left: gl.constexpr, PLANE: gl.constexpr, HAS_ZERO: gl.constexpr):
    """Return plane PLANE of a tile's words as a left operand (64, 32)."""
    # (block, lane, word) to (output, four codes): only names change, no register moves
    pairs = words.reshape([4, 8, 4, 2, 2]).permute([0, 4, 1, 3, 2]).reshape([64, 8])
    pairs = gl.join(pairs, pairs)
    pairs = gl.join(pairs, pairs).reshape([64, 32])
    pairs = gl.convert_layout(pairs, left, assert_trivial=True)
    asm: gl.constexpr = unpack_asm(PLANE, HAS_ZERO)
    if HAS_ZERO:
        zero = spread((zero.to(gl.int32) + 8) * 0x01010101, pairs, 1)
        return gl.inline_asm_elementwise(asm, "=r,r,r,r,r,r,r,r,r", [pairs, zero], dtype=gl.int8, is_pure=True, pack=4)
    else:
        return gl.inline_asm_elementwise(asm, "=r,r,r,r,r", [pairs], dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit
def _words(slot):
    """Return a slot's words of two tiles, each (row block, word)."""
    layout: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 4, 0]],
        lane_bases=[[0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0]],
        warp_bases=[[1, 0, 0], [2, 0, 0]],
        block_bases=[],
        shape=[4, 8, 32],
    )
    return gl.split(slot.load(layout).reshape([4, 2, 4, 32]).permute([0, 2, 3, 1]))


@gluon.jit
def _start(
    rings,
    words,
    slot,
    sums,
    mma: gl.constexpr,
    PART: gl.constexpr,
    WHICH_PART: gl.constexpr,  # of the slot
    HAS_ZERO: gl.constexpr,
    WHICH: gl.constexpr,
):
    """Start to multiply a part, and return its sums to be, and its scales."""
    codes_ring, scale_ring, zero_ring = rings[0], rings[2], rings[3]
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    at = (slot * (2 // PART) + WHICH_PART) * 2 + WHICH
    zero = 0
    if HAS_ZERO:
        zero = zero_ring.index(at).reshape([64]).load(gl.SliceLayout(1, left))
    sums = warpgroup_mma_init(sums)
    for t in gl.static_range(PART):
        for plane in gl.static_range(2):
            weights = _unpacked(words[WHICH_PART + t], zero, left, plane, HAS_ZERO)
            codes = codes_ring.index(slot).slice((WHICH_PART + t) * 64 + plane * 32, 32, 1).permute([1, 0])
            sums = warpgroup_mma(weights, codes, sums, use_acc=t + plane > 0, is_async=True)
    return sums, scale_ring.index(at).reshape([64]).load(gl.SliceLayout(1, mma))


@gluon.jit
def _add(y, sums, scale, HAS_ZERO: gl.constexpr):
    """Add a part's sums, times its scales."""
    scale = scale.to(gl.float32)
    if not HAS_ZERO:
        scale = scale * 0.0625
    return gl.fma(sums.to(gl.float32), spread(scale, sums, 1), y)


@gluon.jit
def _after(slot, phase, STAGES: gl.constexpr):
    """Return the slot after this one, and its phase."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _read(
    rings,
    sources,
    M,
    row_blocks,
    groups,
    slots,  # of an item
    GROUP: gl.constexpr,
    PART: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fill the ring, in one warp."""
    codes_desc, words_desc, scale_ptr, zero_ptr = sources
    codes_ring, words_ring, scale_ring, zero_ring, ready, empty = rings
    PARTS: gl.constexpr = 2 // PART
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, 1], [1, 0])
    of_block = gl.arange(0, 4, gl.SliceLayout(1, layout))[:, None]
    row = gl.arange(0, 16, gl.SliceLayout(0, layout))[None, :]
    slot = 0
    phase = 1
    items = gl.cdiv(M, BLOCK_M) * gl.cdiv(row_blocks, BLOCKS)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first_m, block = place_in_band(item, M, BLOCK_M, row_blocks, BLOCKS, BAND)
        for step in range(slots):
            mbarrier.wait(empty.index(slot), phase)
            filled = ready.index(slot)
            mbarrier.expect(filled, BLOCK_M * 128 + 2 * 4096)
            tma.async_copy_global_to_shared(codes_desc, [first_m, step * 128], filled, codes_ring.index(slot))
            for half in gl.static_range(2):
                of_half = [block + 4 * half, step * 8, 0]
                tma.async_copy_global_to_shared(words_desc, of_half, filled, words_ring.index(2 * slot + half))
                # What is not there has codes of 0, or is not written: any scale that is a number will do.
                there = min(block + 4 * half + of_block, row_blocks - 1) * groups
                for part in gl.static_range(PARTS):
                    group = min((2 * step + part) * 64 // GROUP, groups - 1)
                    place = (there + group) * 16 + row
                    into = (slot * PARTS + part) * 2 + half
                    async_copy.async_copy_global_to_shared(scale_ring.index(into), scale_ptr + place)
                    if HAS_ZERO:
                        async_copy.async_copy_global_to_shared(zero_ring.index(into), zero_ptr + place)
            async_copy.mbarrier_arrive(filled, increment_count=False)
            slot, phase = _after(slot, phase, STAGES)


@gluon.jit
def _multiply(
    rings,
    y_buffer,
    operands,
    sizes,
    PART: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    WHICH: gl.constexpr,
):
    """Compute 64 outputs of each item, from 64 WHICH on, in one warpgroup."""
    words_ring, ready, empty = rings[1], rings[4], rings[5]
    step_ptr, shift_ptr, sums_ptr, bias_ptr, y_ptr = operands
    M, N, row_blocks, slots = sizes
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 32])
    of_tokens: gl.constexpr = gl.SliceLayout(0, mma)
    one_each: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    token = gl.arange(0, BLOCK_M, one_each)
    row = WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
    slot = 0
    phase = 0
    items = gl.cdiv(M, BLOCK_M) * gl.cdiv(row_blocks, BLOCKS)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first_m, block = place_in_band(item, M, BLOCK_M, row_blocks, BLOCKS, BAND)
        m, n = first_m + token, block * 16 + row
        step = gl.load(step_ptr + m, mask=m < M, other=0.0)
        shift = gl.load(shift_ptr + m, mask=m < M, other=0.0)
        row_sum = gl.load(sums_ptr + n, mask=n < N, other=0.0)
        y = gl.zeros([64, BLOCK_M], gl.float32, mma)
        for _ in range(slots // PART):
            even = gl.zeros([64, BLOCK_M], gl.int32, mma)
            odd = gl.zeros([64, BLOCK_M], gl.int32, mma)
            mbarrier.wait(ready.index(slot), phase)
            words = _words(words_ring.index(2 * slot + WHICH))
            even, scale = _start(rings, words, slot, even, mma, PART, 0, HAS_ZERO, WHICH)
            done = slot
            if PART == 2:
                slot, phase = _after(slot, phase, STAGES)
                mbarrier.wait(ready.index(slot), phase)
                words = _words(words_ring.index(2 * slot + WHICH))
            odd, next_scale = _start(rings, words, slot, odd, mma, PART, 2 // PART - 1, HAS_ZERO, WHICH)
            even = warpgroup_mma_wait(2 * PART, deps=[even])
            if PART == 2:
                mbarrier.arrive(empty.index(done))
            y = _add(y, even, scale, HAS_ZERO)
            odd, y = warpgroup_mma_wait(0, deps=[odd, y])
            mbarrier.arrive(empty.index(slot))
            y = _add(y, odd, next_scale, HAS_ZERO)
            slot, phase = _after(slot, phase, STAGES)

        y -= row_sum[:, None] * gl.convert_layout(shift, of_tokens)[None, :]
        y *= gl.convert_layout(step, of_tokens)[None, :]
        if HAS_BIAS:
            y += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
        y_buffer.permute([1, 0]).store(y.to(y_ptr.dtype.element_ty))
        at_once: gl.constexpr = 128 // y_ptr.dtype.element_ty.primitive_bitwidth
        layout: gl.constexpr = gl.BlockedLayout([1, at_once], [at_once // 2, 64 // at_once], [4, 1], [1, 0])
        m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
        n = block * 16 + WHICH * 64 + gl.arange(0, 64, gl.SliceLayout(0, layout))
        inside = (m < M)[:, None] & (n < N)[None, :]
        gl.store(y_ptr + (m.to(gl.int64)[:, None] * N + n[None, :]), y_buffer.load(layout), mask=inside)


@gluon.jit(do_not_specialize=["M"])
def int8_batch_kernel(
    codes_desc,  # of ``descriptors``
    words_desc,
    step_ptr,  # (M,)
    shift_ptr,  # (M,)
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
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,  # slots of the ring
):
    """Compute items of (BLOCK_M, 128) of y."""
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    PARTS: gl.constexpr = 2 // PART
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    y_layout: gl.constexpr = gl.NVMMASharedLayout(128, dtype.primitive_bitwidth, 2)
    codes_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, 128], codes_desc.layout)
    words_ring = gl.allocate_shared_memory(gl.int32, [STAGES * 2, 4, 8, 32], words_desc.layout)
    scales: gl.constexpr = STAGES * PARTS * 2
    scale_ring = gl.allocate_shared_memory(scale_ptr.dtype.element_ty, [scales, 4, 16], plain)
    zero_ring = gl.allocate_shared_memory(gl.int8, [scales if HAS_ZERO else 1, 4, 16], plain)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=33)  # the warp's lanes, and one that expects the bytes
        mbarrier.init(empty.index(slot), count=2)
    y_buffers = gl.allocate_shared_memory(dtype, [2, BLOCK_M, 64], y_layout)
    let_next_kernel_start()
    wait_for_previous_kernel()
    rings = codes_ring, words_ring, scale_ring, zero_ring, ready, empty
    slots = gl.cdiv(tiles, 2 * PART) * PART  # of an item, which is read in rounds of two parts
    sources = codes_desc, words_desc, scale_ptr, zero_ptr
    operands = step_ptr, shift_ptr, sums_ptr, bias_ptr, y_ptr
    sizes = M, N, row_blocks, slots
    gl.warp_specialize(
        [
            (_multiply, (rings, y_buffers.index(0), operands, sizes, PART, HAS_ZERO, HAS_BIAS, BLOCK_M, STAGES, 0)),
            (_multiply, (rings, y_buffers.index(1), operands, sizes, PART, HAS_ZERO, HAS_BIAS, BLOCK_M, STAGES, 1)),
            (_read, (rings, sources, M, row_blocks, groups, slots, GROUP, PART, HAS_ZERO, BLOCK_M, STAGES)),
        ],
        [4, 1],  # warps of the last two
        [240, 24],  # their registers; the first has what is left, 240
    )
