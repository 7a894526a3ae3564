"""How kernels round, clamp and add up float32, on a GPU and under Triton's interpreter alike."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to a whole number, half to even; zero comes out as +0.0.
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Round float32 to ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion to bf16 truncates (Triton 3.9), so the low half is rounded away first.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)  # a NaN's bits may overflow
    return value.to(dtype)


@triton.jit
def minimum(a, b):
    """Return the lesser, or NaN where one is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    """Return the larger, or NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(value, low, high):
    """Clamp as torch does: a NaN stays one."""
    return minimum(maximum(value, low), high)


@triton.jit
def round_half_even(value):
    """Round float32 below 2^22 in magnitude (or infinite, or NaN) to a whole number; never -0.0."""
    return (value + MAGIC) - MAGIC


@triton.jit
def dot(a, b, acc):
    """Return acc + a @ b, with exact products and sums in float32."""
    if INTERPRETED:  # which multiplies bit patterns of bf16 as integers (Triton 3.9)
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
