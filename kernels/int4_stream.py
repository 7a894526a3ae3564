"""Int4 matmul of one token on Hopper, in Gluon: one program a multiprocessor, which never stops reading.

Weights come through the ring of ``int4_ring``, STAGES steps ahead of the products and across the ends of row blocks, so
that neither sums nor stores leave the memory idle. What a program takes of a multiprocessor leaves room for the first
one of the next kernel, which fills its ring while this one ends (EARLY: see ``int4_registers``). x is put into shared
memory as a whole, as it is by ``stream_kernel`` here, or as ``int4_after_norm`` makes it. ``int4_few`` has more tokens.

The products are those of ``int4_decode``: mma.m16n8k16, whose left operand is made of ``int4_layout``'s words; all of
its eight columns are x.
"""

import triton
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
    spread,
    spread_factors,
    wait_for_previous_kernel,
)
from .int4_ring import PLAIN, allocate_x, block_of, fetch, first_place, inputs, next_place, start_reading


@triton.constexpr_function
def mma_layout(warps):
    """Return how (warps, 16 outputs, tokens) are held as the result of ``mma``."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@triton.constexpr_function
def _rows_layout(warps):
    """Return how (1, warps, 16 outputs) are held as the left operand of ``mma`` holds its rows."""
    of_warps = [[0, 1 << bit, 0] for bit in range(warps.bit_length() - 1)]
    of_lanes = [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    return gl.DistributedLinearLayout([[0, 0, 8]], of_lanes, of_warps, [], [1, warps, 16])


@triton.constexpr_function
def _inputs_layout(warps):
    """Return how (1, warps, 16 inputs) are held as the right operand of ``mma`` holds a column."""
    of_warps = [[0, 1 << bit, 0] for bit in range(warps.bit_length() - 1)]
    of_lanes = [[0, 0, 2], [0, 0, 4], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 8]], of_lanes, of_warps, [], [1, warps, 16])


@triton.constexpr_function
def _sums_layout(tokens, warps):
    """Return a layout of (warps, 16 outputs, tokens) in which a thread has an output's sums of all warps."""
    of_registers = [[1 << bit, 0, 0] for bit in range(warps.bit_length() - 1)]
    places = [[0, 0, 1 << bit] for bit in range(tokens.bit_length() - 1)] + [[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0]]
    places += [[0, 0, 0]] * 8
    of_warps = places[5 : 5 + warps.bit_length() - 1]
    return gl.DistributedLinearLayout(of_registers, places[:5], of_warps, [], [warps, 16, tokens])


@gluon.jit
def _load_as(values, held: gl.constexpr, wanted: gl.constexpr):
    """Load (1, warps, 16) from shared memory in a layout that is, without the first axis, the wanted one."""
    loaded = values.load(held).reshape([values.shape[1], 16])
    return gl.convert_layout(loaded, wanted, assert_trivial=True)


@gluon.jit
def _added_up(sums, TOKENS: gl.constexpr):
    total = (sums[0] + sums[1]) + (sums[2] + sums[3])
    if TOKENS == 1:
        total = gl.expand_dims(gl.max(total, 2), 2)  # of columns that are the same
    return total


@gluon.jit
def _write(
    sums,  # (warps, 16 outputs, tokens) in shared memory
    at,  # whose they are
    gate,
    bias_ptr,
    y_ptr,
    M,
    N,
    row_blocks,
    dtype: gl.constexpr,
    TOKENS: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_LEVELS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PARTS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Add the warps' sums up and write them, or return them where they are gates of what comes next."""
    layout: gl.constexpr = _sums_layout(TOKENS, WARPS)
    row = gl.arange(0, 16, gl.SliceLayout(1, gl.SliceLayout(0, layout)))
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    y = raised(gl.sum(sums.load(layout), 0), dtype, HAS_ZERO, HAS_LEVELS)
    if HAS_BIAS:
        n = block_of(at, row_blocks, PARTS) * 16 + row
        y += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    n = at[0] * 16 + row
    y_ptrs = y_ptr + ((gl.program_id(1) * M + token).to(gl.int64)[None, :] * N + n[:, None])
    inside = (n < N)[:, None] & (token < M)[None, :]
    if PARTS == 1:
        gl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside)
    elif at[1] == 0:
        gate = y.to(dtype).to(gl.float32)
    else:
        y = gate / (1.0 + gl.exp(-gate)) * y.to(dtype).to(gl.float32)
        gl.store(y_ptrs, y.to(dtype), mask=inside)
    return gate


@gluon.jit
def hold(x_shared, STEPS: gl.constexpr, WARPS: gl.constexpr, TILES: gl.constexpr):
    """Return x in registers, where they have room for it: for each tile and plane 16 inputs a warp; else nothing."""
    columns: gl.constexpr = gl.SliceLayout(2, gl.DotOperandLayout(1, mma_layout(WARPS), 2))
    held = ()
    if STEPS == 1 and WARPS == 8 and TILES <= 8:
        for d in gl.static_range(TILES):
            for plane in gl.static_range(4):
                x_tile = x_shared.index(0).slice(d, 1, 0).slice(plane * 16, 16, 2)
                held = held + (_load_as(x_tile, _inputs_layout(WARPS), columns),)
    return held


@gluon.jit
def multiply(
    reading,  # what start_reading returned
    x_shared,
    held,  # x in registers, or nothing where it has to be loaded from x_shared each time
    levels_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    row_blocks,
    tiles,
    groups,
    dtype: gl.constexpr,  # of x and y
    TOKENS: gl.constexpr,  # 1, or the columns of a multiplication, 8
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_LEVELS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PARTS: gl.constexpr,
    WHOLE: gl.constexpr,
    STEPS: gl.constexpr,
    WARPS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Write 16 outputs at a time; the warps share out the K tiles.

    With two PARTS the first half of the rows are gates of the second, and silu(gate) * up is what is written: of one
    token.
    """
    rings, places, at = reading
    word_ring, scale_ring, zero_ring = rings
    mma: gl.constexpr = mma_layout(WARPS)
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    rows: gl.constexpr = _rows_layout(WARPS)
    of_warp: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, WARPS, 1], [2, 1, 0])
    level = 0
    if HAS_LEVELS:
        level = level_of_lane(levels_ptr)

    like_x = gl.zeros([WARPS, 16, 8], dtype, right)
    # Sums that take turns, since a multiplication waits long for the one whose sum it adds to.
    nothing = gl.zeros([WARPS, 16, 8], gl.float32, mma)
    acc = nothing, nothing, nothing, nothing
    mine = (row_blocks // PARTS - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    slot = 0
    now = first_place()
    # The warps' sums of a row block are added up beside the next one's products, behind a barrier that is there anyway.
    sums = gl.allocate_shared_memory(gl.float32, [WARPS, 16, TOKENS], PLAIN)
    gate = gl.zeros([16, TOKENS], gl.float32, gl.SliceLayout(0, _sums_layout(TOKENS, WARPS)))
    last = row_blocks, 0, 0  # none
    for _ in range(0, mine * PARTS * STEPS):
        async_copy.wait_group(STAGES - 1)
        barrier()
        if STEPS == 1 or now[2] == 0:
            gate = _write(
                *(sums, last, gate, bias_ptr, y_ptr, M, N, row_blocks, dtype, TOKENS),
                *(HAS_ZERO, HAS_LEVELS, HAS_BIAS, PARTS, WARPS),
            )
        for d in gl.static_range(TILES):
            # (warp, lane, word) to (warp, output, pair of inputs): only names change, no register moves
            pairs = word_ring.index(slot).slice(d, 1, 0).load(of_warp).reshape([WARPS, 8, 4, 2, 2])
            pairs = pairs.permute([0, 4, 1, 3, 2]).reshape([WARPS, 16, 8])
            pairs = gl.join(pairs, pairs).reshape([WARPS, 16, 16])
            pairs = gl.convert_layout(pairs, left, assert_trivial=True)
            for h in gl.static_range(HALVES):
                scale = _load_as(scale_ring.index(slot).slice(d * HALVES + h, 1, 0), rows, gl.SliceLayout(2, left))
                zero = 0
                if HAS_ZERO:
                    zero = _load_as(zero_ring.index(slot).slice(d * HALVES + h, 1, 0), rows, gl.SliceLayout(2, left))
                by = spread_factors(factors(scale, zero, dtype, HAS_ZERO, HAS_LEVELS), pairs, 2)
                for plane in gl.static_range(4 // HALVES * h, 4 // HALVES * (h + 1)):
                    if len(held) > 0:
                        x = held[d * 4 + plane]
                    else:
                        x = x_shared.index(now[2]).slice(d, 1, 0).slice(plane * 16, 16, 2)
                        x = _load_as(x, _inputs_layout(WARPS), gl.SliceLayout(2, right))
                    weights = dequantized(pairs, by, level, dtype, plane, HAS_ZERO, HAS_LEVELS)
                    if TOKENS == 1:
                        x = spread(x, like_x, 2)
                    acc = acc[1:] + (mma_v2(weights, x, acc[0]),)
        fetch(rings, places, slot, at, row_blocks, tiles, groups, GROUP, WHOLE, HAS_ZERO, PARTS, WARPS * TILES)
        at = next_place(at, PARTS, STEPS)
        slot = gl.where(slot + 1 == STAGES, 0, slot + 1)
        if STEPS == 1 or now[2] == STEPS - 1:
            sums.store(_added_up(acc, TOKENS))
            acc, last = (nothing, nothing, nothing, nothing), now
        now = next_place(now, PARTS, STEPS)
    _write(
        *(sums, last, gate, bias_ptr, y_ptr, M, N, row_blocks, dtype, TOKENS),
        *(HAS_ZERO, HAS_LEVELS, HAS_BIAS, PARTS, WARPS),
    )
    if EARLY == 2:
        let_next_kernel_start()
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["M"])
def stream_kernel(
    x_ptr,  # (1, K), contiguous
    words_ptr,  # (row blocks, K tiles, 128)
    scale_ptr,  # (row blocks, groups, 16), in the dtype of x
    zero_ptr,  # int8, like scale
    levels_ptr,  # (16,) float32, a codebook
    bias_ptr,  # (N,), contiguous
    y_ptr,  # (1, N), contiguous
    M,  # 1, as other kernels are told it
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
    WHOLE: gl.constexpr,  # whether STEPS * WARPS * TILES tiles make up K
    STEPS: gl.constexpr,  # of WARPS * TILES tiles, for a row block
    WARPS: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Multiply x as it is."""
    if EARLY == 1:
        let_next_kernel_start()
    reading = start_reading(
        *(words_ptr, scale_ptr, zero_ptr, row_blocks, tiles, groups),
        *(GROUP, HALVES, HAS_ZERO, 1, WHOLE, STEPS, WARPS, TILES, STAGES),
    )
    if EARLY > 0:
        wait_for_previous_kernel()
    parts = ()
    for step in gl.static_range(STEPS):
        k = inputs(step, TILES, WARPS)
        parts = parts + (gl.load(x_ptr + k, mask=k < K, other=0.0),)
    if EARLY == 3:
        let_next_kernel_start()
    x_shared = allocate_x(x_ptr.dtype.element_ty, STEPS, TILES, WARPS)
    for step in gl.static_range(STEPS):  # all loads first: each store ends in a barrier
        x_shared.index(step).store(parts[step])
    held = hold(x_shared, STEPS, WARPS, TILES)
    multiply(
        *(reading, x_shared, held, levels_ptr, bias_ptr, y_ptr, M, N, row_blocks, tiles, groups),
        *(
            x_ptr.dtype.element_ty,
            1,
            GROUP,
            HALVES,
            HAS_ZERO,
            HAS_LEVELS,
            HAS_BIAS,
            1,
            WHOLE,
            STEPS,
            WARPS,
            TILES,
            STAGES,
            EARLY,
        ),
    )
