"""Int8 codes times int4 codes in plain Triton: every GPU with int8 matrix units, and the interpreter.

The twin of ``int8_batch``, with the same integers; the layout of the weight is that of ``int4_layout`` and the order of
the codes that of ``int8_codes``.
"""

import triton
import triton.language as tl

from .rounding import round_to


@triton.jit
def int8_matmul_kernel(
    codes_ptr,  # (M, 64 tiles) int8
    step_ptr,  # (M,)
    shift_ptr,  # (M,)
    words_ptr,  # (row blocks, tiles, 128)
    scale_ptr,  # (row blocks, groups, 16)
    zero_ptr,  # int8, like scale, or None
    sums_ptr,  # (N,)
    bias_ptr,  # (N,), or None
    y_ptr,  # (M, N), contiguous
    M,
    N,
    row_blocks,
    tiles,
    groups,
    GROUP: tl.constexpr,  # inputs that share a scale
    PART: tl.constexpr,  # tiles that are summed in integers: 1 or 2; of one group
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Compute a (BLOCK_M, 16 BLOCKS) block of y, as its transpose."""
    programs_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % programs_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(0) // programs_m * BLOCKS
    row = tl.arange(0, 16 * BLOCKS)
    n = block.to(tl.int64) * 16 + row
    scale_at = (block + row // 16).to(tl.int64) * groups * 16 + row % 16
    row_inside = block + row // 16 < row_blocks
    blocks, part_tiles, nibble = block + tl.arange(0, BLOCKS), tl.arange(0, PART), tl.arange(0, 8)
    y = tl.zeros((16 * BLOCKS, BLOCK_M), tl.float32)
    for first in range(0, tiles, PART):
        tile = first + part_tiles
        word_at = (blocks.to(tl.int64)[:, None] * tiles + tile[None, :])[:, :, None] * 128 + tl.arange(0, 128)
        inside = (blocks < row_blocks)[:, None, None] & (tile < tiles)[None, :, None]
        words = tl.load(words_ptr + word_at, mask=inside, other=0)
        u = (words[:, :, :, None] >> (nibble * 4)) & 15
        u = tl.reshape(u, (BLOCKS, PART, 8, 4, 2, 2, 2, 2, 2))  # g c kh rh e jh p, and j = 2 jh + p: see int4_layout
        weight = tl.reshape(tl.permute(u, (0, 5, 2, 1, 8, 4, 3, 6, 7)), (16 * BLOCKS, 64 * PART)) - 8
        group = first * 64 // GROUP
        if zero_ptr is not None:
            weight -= tl.load(zero_ptr + scale_at + group * 16, mask=row_inside, other=0).to(tl.int32)[:, None]
        k = first * 64 + tl.arange(0, 64 * PART)
        code_ptrs = codes_ptr + m[None, :] * (tiles * 64) + k[:, None]
        codes = tl.load(code_ptrs, mask=(m < M)[None, :] & (k < tiles * 64)[:, None], other=0)
        sums = tl.dot(weight.to(tl.int8), codes, out_dtype=tl.int32)
        scale = tl.load(scale_ptr + scale_at + group * 16, mask=row_inside, other=0.0).to(tl.float32)
        y += sums.to(tl.float32) * scale[:, None]
    shift = tl.load(shift_ptr + m, mask=m < M, other=0.0)
    step = tl.load(step_ptr + m, mask=m < M, other=0.0)
    row_sum = tl.load(sums_ptr + n, mask=n < N, other=0.0)
    y = (y - row_sum[:, None] * shift[None, :]) * step[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(y_ptr + m[None, :] * N + n[:, None], round_to(y, dtype), mask=(m < M)[None, :] & (n < N)[:, None])
