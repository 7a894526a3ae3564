"""Where values lie on a grid: the arithmetic of ``qat.numerics`` in float32, for kernels to use.

Every operation rounds by itself, as torch's do: none here is a product that a sum could contract with.
"""

import triton
import triton.language as tl

from qat.numerics import MIN_SCALE

from .rounding import INTERPRETED, clamp, round_half_even, round_to

_MIN_SCALE = tl.constexpr(MIN_SCALE)


@triton.jit
def stored_scale(step_ptr, row, inside, dtype: tl.constexpr):
    """``qat.numerics.stored_scale``, in float32; a NaN stays one."""
    step = tl.load(step_ptr + row, mask=inside, other=1.0).to(tl.float32)
    return round_to(tl.where(step < _MIN_SCALE, _MIN_SCALE, step), dtype).to(tl.float32)


@triton.jit
def divide(x, scale, scale_dtype: tl.constexpr, x_dtype: tl.constexpr):
    """Return x / scale, rounded correctly where it lies below 1e38.

    A division takes some 20 instructions an element, which is more than memory leaves time for. A reciprocal for each
    scale, a product and corrections by fused multiply-adds take 3 to 5 (Markstein 1990, doi:10.1147/rd.341.0111,
    theorem 5): two make every quotient exact to the bit. Where x and scale have 11 bits at most, one does, which
    tests/test_grid.py shows for each pair of significands.
    """
    if INTERPRETED:  # whose fused multiply-add rounds twice
        return tl.div_rn(x, scale + tl.zeros_like(x))
    inverse = tl.div_rn(1.0, scale)
    negative = -tl.where(scale == float("inf"), 0.0, scale)
    product = x * inverse
    ratio = tl.fma(tl.fma(product, negative, x), inverse, product)
    if scale_dtype == tl.float32 or x_dtype == tl.float32:
        ratio = tl.fma(tl.fma(ratio, negative, x), inverse, ratio)
    return tl.where(tl.abs(product) < 1e38, ratio, product)  # an infinite one has no remainder


@triton.jit
def code_of_zero(zero_ptr, row, inside, scale, LOW: tl.constexpr, HIGH: tl.constexpr, ZERO: tl.constexpr):
    """Return the zero point in float32: 0, the stored one, or that of LSQ+'s offset (its ``zero_point``)."""
    if zero_ptr is None:
        zero = tl.zeros_like(scale)
    else:
        zero = tl.load(zero_ptr + row, mask=inside, other=0.0).to(tl.float32)
        if ZERO == "offset":
            zero = round_half_even(clamp(tl.div_rn(-zero, scale), 0.0, HIGH - LOW)) + LOW
    return zero


@triton.jit
def codes_from_zero(ratio, zero, LOW: tl.constexpr, HIGH: tl.constexpr, ZERO: tl.constexpr):
    """Return the code of a ratio, less the zero point."""
    if ZERO == "real":
        codes = round_half_even(clamp(ratio + zero, LOW, HIGH)) - zero
    else:
        codes = round_half_even(clamp(ratio, LOW - zero, HIGH - zero))
    return codes
