"""Int4 matmul of 2 to 8 tokens on Hopper, in Gluon: one program a multiprocessor, which never stops reading.

As ``int4_stream`` for one token, whose eight equal columns of a multiplication are tokens here. x stays in registers
for all of a program's row blocks, which have room for 4096 inputs or, in twice the warps, for 8192. Beyond that the
programs along the grid's second axis share out K, and their sums are added up in one order.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .int4_registers import let_next_kernel_start, wait_for_previous_kernel
from .int4_ring import start_reading
from .int4_stream import mma_layout, multiply

TOKENS = gl.constexpr(8)  # columns of a multiplication


@triton.constexpr_function
def _load_layout(warps):
    """Return how (warps, 8 tokens, 64 inputs) are loaded: 64 bytes of a token by each four lanes."""
    of_warps = [[1 << bit, 0, 0] for bit in range(warps.bit_length() - 1)]
    of_lanes = [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    of_registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 32]]
    return gl.DistributedLinearLayout(of_registers, of_lanes, of_warps, [], [warps, TOKENS, 64])


@triton.constexpr_function
def _operand_layout(warps):
    """Return how the same are held as right operands of ``mma``, the planes of 16 inputs side by side."""
    of_warps = [[1 << bit, 0, 0] for bit in range(warps.bit_length() - 1)]
    of_lanes = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    of_registers = [[0, 0, 1], [0, 0, 8], [0, 0, 16], [0, 0, 32]]
    return gl.DistributedLinearLayout(of_registers, of_lanes, of_warps, [], [warps, TOKENS, 64])


@gluon.jit
def _as_planes(x, WARPS: gl.constexpr):
    """Return the four right operands (warps, 16 inputs, tokens) that a K tile of x is."""
    right: gl.constexpr = gl.DotOperandLayout(1, mma_layout(WARPS), 2)
    x = gl.convert_layout(x, _operand_layout(WARPS)).reshape([WARPS, TOKENS, 2, 2, 16]).permute([0, 4, 1, 2, 3])
    even, odd = gl.split(x)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.convert_layout(first, right, assert_trivial=True),
        gl.convert_layout(second, right, assert_trivial=True),
        gl.convert_layout(third, right, assert_trivial=True),
        gl.convert_layout(fourth, right, assert_trivial=True),
    )


@gluon.jit(do_not_specialize=["M"])
def few_kernel(
    x_ptr,  # (M, K), contiguous
    words_ptr,  # (row blocks, K tiles, 128)
    scale_ptr,  # (row blocks, groups, 16), in the dtype of x
    zero_ptr,  # int8, like scale
    levels_ptr,  # (16,) float32, a codebook
    bias_ptr,  # (N,), contiguous; not read where K is shared out
    y_ptr,  # (M, N), contiguous; the same as parts_ptr where nothing shares out K
    parts_ptr,  # (parts of K, M, N) float32
    M,  # at most TOKENS
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
    WHOLE: gl.constexpr,  # whether the parts' WARPS * TILES tiles make up K
    WARPS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Multiply x, or a part of its inputs."""
    if EARLY == 1:
        let_next_kernel_start()
    reading = start_reading(
        *(words_ptr, scale_ptr, zero_ptr, row_blocks, tiles, groups),
        *(GROUP, HALVES, HAS_ZERO, 1, WHOLE, 1, WARPS, TILES, STAGES),
    )
    if EARLY > 0:
        wait_for_previous_kernel()
    layout: gl.constexpr = _load_layout(WARPS)
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    place = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    xs = ()
    for d in gl.static_range(TILES):
        k = ((gl.program_id(1) * TILES + d) * WARPS + warp) * 64 + place
        xs = xs + (gl.load(x_ptr + token * K + k, mask=(token < M) & (k < K), other=0.0),)
    if EARLY == 3:
        let_next_kernel_start()
    held = ()
    for d in gl.static_range(TILES):
        held = held + _as_planes(xs[d], WARPS)
    multiply(
        *(reading, None, held, levels_ptr, bias_ptr, parts_ptr, M, N, row_blocks, tiles, groups),
        *(x_ptr.dtype.element_ty, TOKENS, GROUP, HALVES, HAS_ZERO, HAS_LEVELS, HAS_BIAS),
        *(1, WHOLE, 1, WARPS, TILES, STAGES, EARLY),
    )
