"""Int4 kernels in plain Triton: every GPU, the interpreter, every dtype of scale and zero point.

Both read the layout of ``int4_layout``. The dequantized weight is computed in float32 and rounded once, so it has the
bits of ``qat.numerics.dequantize`` for any scale. ``dequantize_kernel`` is the fast path for many tokens on every GPU;
``matmul_kernel`` is the twin of the kernels for NVIDIA, which take two codes an instruction instead.
"""

import triton
import triton.language as tl

from .rounding import dot, round_to


@triton.jit
def weight_block(
    words_ptr,  # (row blocks, K tiles, 128)
    scale_ptr,  # (row blocks, groups, 16)
    zero_ptr,  # like scale, or None
    levels_ptr,  # (16,) float32, or None
    block,  # first row block
    tile,  # first K tile
    K,
    row_blocks,
    tiles,
    groups,
    group_size,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return (16 BLOCKS, 64 TILES) of the weight in ``dtype``; zero past K and past the last row block."""
    blocks, k_tiles = block + tl.arange(0, BLOCKS), tile + tl.arange(0, TILES)
    word_at = (blocks.to(tl.int64)[:, None] * tiles + k_tiles[None, :])[:, :, None] * 128 + tl.arange(0, 128)
    inside = (blocks < row_blocks)[:, None, None] & (k_tiles < tiles)[None, :, None]
    words = tl.load(words_ptr + word_at, mask=inside, other=0)
    nibble = tl.arange(0, 8)  # (j, e): see int4_layout
    u = (words[:, :, :, None] >> (nibble // 2 * 4 + nibble % 2 * 16)) & 15
    u = tl.reshape(u, (BLOCKS, TILES, 8, 4, 2, 2, 4, 2))  # g c kh rh j e
    u = tl.reshape(tl.permute(u, (0, 5, 2, 1, 6, 4, 3, 7)), (16 * BLOCKS, 2 * TILES, 32))

    row, half = tl.arange(0, 16 * BLOCKS), tl.arange(0, 2 * TILES)
    k_half = (tile * 2 + half) * 32
    scale_at = ((block + row // 16).to(tl.int64) * groups * 16 + row % 16)[:, None] + (k_half // group_size * 16)
    inside_scale = (block + row // 16 < row_blocks)[:, None] & (k_half < K)
    scale = tl.load(scale_ptr + scale_at, mask=inside_scale, other=0.0).to(tl.float32)
    code = (u - 8).to(tl.float32) if levels_ptr is None else tl.load(levels_ptr + u)
    if zero_ptr is not None:
        code -= tl.load(zero_ptr + scale_at, mask=inside_scale, other=0).to(tl.float32)[:, :, None]
    weight = tl.reshape(round_to(code * scale[:, :, None], dtype), (16 * BLOCKS, 64 * TILES))
    # Padding has a code too, which an infinite scale would turn into NaN.
    return tl.where((tile * 64 + tl.arange(0, 64 * TILES) < K)[None, :], weight, 0.0)


@triton.jit
def dequantize_kernel(
    words_ptr,
    scale_ptr,
    zero_ptr,
    levels_ptr,
    weight_ptr,  # (N, K), contiguous
    N,
    K,
    row_blocks,
    tiles,
    groups,
    group_size,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Write (16 BLOCKS, 64 TILES) of the weight."""
    block, tile = tl.program_id(1) * BLOCKS, tl.program_id(0) * TILES
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    weight = weight_block(
        words_ptr,
        scale_ptr,
        zero_ptr,
        levels_ptr,
        block,
        tile,
        K,
        row_blocks,
        tiles,
        groups,
        group_size,
        BLOCKS,
        TILES,
        dtype,
    )
    n, k = block * 16 + tl.arange(0, 16 * BLOCKS), tile * 64 + tl.arange(0, 64 * TILES)
    tl.store(weight_ptr + n.to(tl.int64)[:, None] * K + k, weight, mask=(n < N)[:, None] & (k < K))


@triton.jit
def matmul_kernel(
    x_ptr,  # (M, K), contiguous
    words_ptr,
    scale_ptr,
    zero_ptr,
    levels_ptr,
    bias_ptr,  # (N,), contiguous, or None
    y_ptr,  # (M, N), contiguous
    M,
    N,
    K,
    row_blocks,
    tiles,
    groups,
    group_size,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Compute a (BLOCK_M, 16 BLOCKS) block of y, as its transpose: the weight is the left operand."""
    programs_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % programs_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(0) // programs_m * BLOCKS
    n = block.to(tl.int64) * 16 + tl.arange(0, 16 * BLOCKS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((16 * BLOCKS, BLOCK_M), tl.float32)
    for tile in range(0, tiles):
        weight = weight_block(
            words_ptr,
            scale_ptr,
            zero_ptr,
            levels_ptr,
            block,
            tile,
            K,
            row_blocks,
            tiles,
            groups,
            group_size,
            BLOCKS,
            1,
            dtype,
        )
        k = tile * 64 + tl.arange(0, 64)
        x = tl.load(x_ptr + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
        acc = dot(weight, x, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + m[None, :] * N + n[:, None], round_to(acc, dtype), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["M"])
def sum_parts_kernel(
    parts_ptr,  # (PARTS, M, N - first_n) float32, contiguous
    bias_ptr,
    y_ptr,  # (M, N), contiguous
    M,
    N,
    first_n,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Add the parts of a split sum, always in one order, then the bias, and round once: outputs from first_n on."""
    m, width = tl.program_id(0), N - first_n
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if WAIT:  # for the kernel before, which allowed this one to start early (PTX ISA, griddepcontrol)
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + (part * M + m).to(tl.int64) * width + at, mask=at < width, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + first_n + at, mask=at < width, other=0.0).to(tl.float32)
    if WAIT:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    y_ptrs = y_ptr + m.to(tl.int64) * N + first_n + at
    tl.store(y_ptrs, round_to(total, y_ptr.dtype.element_ty), mask=at < width)
