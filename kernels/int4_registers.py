"""Int4 weights in registers of NVIDIA tensor cores, in Gluon, for ``int4_decode``, ``_few``, ``_stream``, ``_batch``.

These kernels compute y^T = W x^T, so that the weight is the left operand, which tensor cores take from registers. They
read the layout of ``int4_layout`` with 16-byte loads, a few K tiles ahead, and make two weights an instruction, u being
the nibble, code + 8:

    fp16    (nibble | magic number) - (magic + 8 + zero point)  =  code - zero point         times the scale
    bf16    the nibble alone is the subnormal number u 2^-133:  u s - 8 s, one fma  =  code s, scaled by 2^-RAISED
            with a zero point:  u - (8 + zero point)  =  code - zero point                   times the scale

All but the last product is exact in 16 bits, and that, or the fma, is rounded once, so the weight has the bits of
``qat.numerics.dequantize``; a power of two does not change them, and sums are raised by it at the end. In bf16 the low
eight bits of a number, one of them the exponent's, count in steps of 2^-133: the upper nibble of a byte needs no shift.
With a codebook the lanes of a warp hold its levels, a shuffle looks them up, and the product with the scale is
float32's, rounded once: the bits of ``qat.codebook.dequantize``. Both are tested against ``int4_portable``, the twin in
plain Triton, and on a CPU by following the instructions (tests/test_int4_registers.py).

EARLY lets the next kernel of a stream start before this one ends (programmatic dependent launch; Hopper and later): 1
as soon as all of this grid runs, 3 once x is on its way, whose loads the next one's weights would delay, 2 once its
sums are done. Weights are read before ``griddepcontrol.wait``, activations after it, so a weight must not be written by
the kernel just before: ``prepack`` is followed by a synchronization.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed after Triton 3.6


# In bf16, without zero points, weights come scaled by 2^-RAISED: scales to 2^42, and down to 2^-78, keep their bits.
RAISED = gl.constexpr(48)


@triton.constexpr_function
def dequantize_asm(dtype, plane, has_zero):
    """PTX for one half2 of weights: $1 = $2 the word, $3 and $4 what ``factors`` returns for the plane, twice.

    f16x2 and bf16x2 instructions take no immediates. On sm_80 bf16x2 has no mul, but fma, which with addend -0 rounds
    the same.
    """
    if dtype == gl.float16:
        shift = 4 * plane
        if has_zero:
            body = f"shr.u32 t, $1, {shift}; lop3.b32 t, t, 0x000f000f, 0x64006400, 0xea; add.f16x2 t, t, $4;"
        elif plane % 2 == 0:  # 1024 + u - 1032
            body = f"shr.u32 t, $1, {shift}; mov.b32 z, 0xe408e408; lop3.b32 t, t, 0x000f000f, 0x64006400, 0xea; "
            body += "add.f16x2 t, t, z;"
        else:  # (1024 + 16 u) / 16 - 72 saves a shift
            body = f"shr.u32 t, $1, {shift - 4}; mov.b32 z, 0xd480d480; mov.b32 o, 0x2c002c00; "
            body += "lop3.b32 t, t, 0x00f000f0, 0x64006400, 0xea; fma.rn.f16x2 t, t, o, z;"
        return "{ .reg .b32 t, z, o; " + body + " mul.f16x2 $0, t, $3; }"
    body = f"shr.u32 t, $1, {8 * (plane // 2)}; and.b32 t, t, {'0x00f000f0' if plane % 2 else '0x000f000f'}; "
    if not has_zero:
        return "{ .reg .b32 t; " + body + "fma.rn.bf16x2 $0, t, $3, $4; }"
    unit = "0x7d007d00" if plane % 2 else "0x7f007f00"  # 2^123 and 2^127, which leave u 2^-6
    body += f"mov.b32 o, {unit}; mov.b32 n, 0x80008000; fma.rn.bf16x2 t, t, o, $4; fma.rn.bf16x2 $0, t, $3, n;"
    return "{ .reg .b32 t, o, n; " + body + " }"


@triton.constexpr_function
def look_up_asm(dtype, plane):
    """PTX for two weights of a codebook: $1 = $2 the word, $3 = $4 the scale, $5 = $6 the level that this lane holds.

    Lane l holds level l mod 16, and ``shfl`` takes it from the lane that the low five bits of a shifted word name: a
    nibble, and a bit that chooses between two lanes of the same level.
    """
    take = "shfl.sync.idx.b32 {0}, $5, {0}, 0x1f, 0xffffffff; mul.rn.f32 {0}, {0}, $3; "
    body = f"shr.u32 a, $1, {4 * plane}; shr.u32 b, $1, {4 * plane + 16}; " + take.format("a") + take.format("b")
    return "{ .reg .b32 a, b; " + body + f"cvt.rn.{'f16x2' if dtype == gl.float16 else 'bf16x2'}.f32 $0, b, a; }}"


@gluon.jit
def level_of_lane(levels_ptr):
    """Return levels[lane mod 16]: a scalar to Triton, and another one in each lane."""
    asm: gl.constexpr = (
        "{ .reg .b32 l; .reg .b64 a; mov.u32 l, %laneid; and.b32 l, l, 15; mad.wide.u32 a, l, 4, $1; "
        "ld.global.nc.b32 $0, [a]; }"
    )
    return gl.inline_asm_elementwise(asm, "=r,l", [levels_ptr.to(gl.int64)], dtype=gl.int32, is_pure=True, pack=1)


@triton.constexpr_function
def times_asm(exponent, sign):
    """PTX for two bf16 numbers times a power of two."""
    factor = f"0x{(exponent + 127 << 7 | (sign < 0) << 15) * 0x10001:08x}"
    return f"{{ .reg .b32 c, n; mov.b32 c, {factor}; mov.b32 n, 0x80008000; fma.rn.bf16x2 $0, $1, c, n; }}"


@gluon.jit
def _times(values, EXPONENT: gl.constexpr, SIGN: gl.constexpr):
    asm: gl.constexpr = times_asm(EXPONENT, SIGN)
    return gl.inline_asm_elementwise(asm, "=r,r", [values], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.jit
def factors(scale, zero, dtype: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_LEVELS: gl.constexpr):
    """Return, a row, what ``dequantized`` takes for even planes, for odd planes, and for all of them."""
    if HAS_LEVELS:
        wide = scale.to(gl.float32)
        return wide, wide, wide
    elif dtype == gl.float16:
        if HAS_ZERO:
            return scale, scale, (-1032.0 - zero.to(gl.float32)).to(dtype)
        else:
            return scale, scale, scale
    elif HAS_ZERO:
        return _times(scale, 6, 1), _times(scale, 6, 1), ((-8.0 - zero.to(gl.float32)) * 0.015625).to(dtype)
    else:
        return _times(scale, 133 - RAISED, 1), _times(scale, 129 - RAISED, 1), _times(scale, 3 - RAISED, -1)


@gluon.jit
def dequantized(
    word,
    factors,
    level,
    dtype: gl.constexpr,
    PLANE: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_LEVELS: gl.constexpr,
):
    """Return plane PLANE of the words, 16 inputs wide, dequantized to ``dtype``, but for what ``raised`` makes good.

    Args:
        word: int32.
        factors: what ``factors`` returned, ``spread`` over the words.
        level: of ``level_of_lane``.
    """
    scale = factors[PLANE % 2]
    if HAS_LEVELS:
        look_up: gl.constexpr = look_up_asm(dtype, PLANE)
        level = gl.full(word.shape, level, gl.int32, word.type.layout)
        return gl.inline_asm_elementwise(
            look_up, "=r,r,r,f,f,r,r", [word, scale, level], dtype.value, is_pure=True, pack=2
        )
    elif HAS_ZERO or dtype == gl.bfloat16:
        asm: gl.constexpr = dequantize_asm(dtype, PLANE, HAS_ZERO)
        return gl.inline_asm_elementwise(
            asm, "=r,r,r,r,r", [word, scale, factors[2]], scale.dtype, is_pure=True, pack=2
        )
    else:
        asm: gl.constexpr = dequantize_asm(dtype, PLANE, False)
        return gl.inline_asm_elementwise(asm, "=r,r,r,r", [word, scale], scale.dtype, is_pure=True, pack=2)


@gluon.jit
def raised(sums, dtype: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_LEVELS: gl.constexpr):
    """Return float32 sums of products with what ``dequantized`` returned as those with the weights."""
    if dtype == gl.bfloat16 and not HAS_ZERO and not HAS_LEVELS:
        return sums * (2.0**RAISED)
    else:
        return sums


@gluon.jit
def spread(value, like, axis: gl.constexpr):
    """Broadcast one value a row over the inputs."""
    return gl.broadcast(gl.expand_dims(value, axis), like)[0]


@gluon.jit
def spread_factors(of_rows, like, axis: gl.constexpr):
    """``spread`` what ``factors`` returned."""
    return spread(of_rows[0], like, axis), spread(of_rows[1], like, axis), spread(of_rows[2], like, axis)


@gluon.jit
def wait_for_previous_kernel():
    """Wait until the kernel before has ended, and its writes can be read."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_kernel_start():
    """Let the next kernel of the stream start, once every program of this one has come here."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
