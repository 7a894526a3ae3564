"""A linear layer's input as int8 codes, in the order in which the int4 weights are unpacked: what tensor cores take.

    x_TK ~ (code_TK - shift_T) * step_T

int8_token: code, shift (its zero point) and step = 1 / f of each token as ``qat.quantizers.dynamic`` defines them. A
trained scale s, of 2 to 8 bits, with a zero point z or none: code = clamp(round(x / s) + z, -q_n, q_p) as in
``qat.numerics.quantize``, step = s and shift = z; where q_p = 255, both are stored less 128. So these are the integers
of the training forward. T tokens of K values; x is bf16, fp16 or fp32, and the arithmetic float32.

Of 64 inputs, input i lies beside input 32 + i: they are the codes 2 i and 2 i + 1. The low nibbles of a word of
``int4_layout`` then multiply four neighbouring codes, and its high ones four others. Rows are filled up to a multiple
of 64 with codes of 0, which meet weight 0.

A token whose codes are not all numbers, as one of its values is NaN or int8_token meets infinity, gets the step NaN.

Bytes moved: x, and one byte a value.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qat import numerics
from qat.quantizers.dynamic import dynamic_codes
from qat.spec import Dynamic, QuantSpec

from .int4_layout import INPUTS

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS
    triton = None

TILE = 4096  # values a program holds, if a token has no more
MOST_VALUES = 32768  # of a token: 64 registers a thread in 16 warps


class Codes(NamedTuple):
    """An input's codes.

    Attributes:
        codes: int8 (T, K), K filled up to a multiple of 64, in the order above.
        step: float32 (T,).
        shift: float32 (T,), whole.
    """

    codes: Tensor
    step: Tensor
    shift: Tensor


def int8_codes_reference(
    x: Tensor, scale: Tensor | None, bits: int = 8, signed: bool = True, zero_point: Tensor | None = None
) -> Codes:
    """Return what ``int8_codes`` returns, in torch."""
    x = F.pad(x, (0, -x.shape[1] % INPUTS))
    tokens = x.shape[0]
    if scale is None:
        codes, step, shift = dynamic_codes(x, Dynamic.int8_token)
    else:
        scale = scale.float().clamp_min(numerics.MIN_SCALE).reshape(1, 1)
        spec = QuantSpec(bits=bits, granularity="tensor", signed=signed)
        codes, step = numerics.quantize(x, scale, spec, zero_point), scale.expand(tokens, 1)
        less = 128.0 if spec.q_p > 127 else 0.0
        codes, shift = codes - less, (torch.zeros_like(step) if zero_point is None else zero_point + 0.0 * step) - less
    step = torch.where(codes.isnan().any(1, keepdim=True), torch.nan, step)
    codes = codes.nan_to_num(0.0).to(torch.int8)
    codes = codes.view(tokens, -1, 2, INPUTS // 2).transpose(2, 3).reshape(codes.shape)
    return Codes(codes, step.reshape(-1).contiguous(), shift.reshape(-1).contiguous())


if triton is not None:
    from .grid import divide
    from .launching import MOST, Launch, ceil_div, next_power_of_2, starts_early, take_turns
    from .round_dynamic import int8_token_grid
    from .rounding import INTERPRETED, MAGIC, clamp, maximum, minimum

    _MIN_SCALE = tl.constexpr(numerics.MIN_SCALE)
    _MAGIC_BITS = tl.constexpr(0x4B400000)  # of MAGIC as a float32

    @triton.jit
    def _wider(low, high, other_low, other_high):
        return minimum(low, other_low), maximum(high, other_high)

    @triton.jit
    def _bounds(even, odd):
        """Return the least and the largest of a token's values and 0; NaN where one is."""
        low, high = minimum(minimum(even, odd), 0.0), maximum(maximum(even, odd), 0.0)
        if INTERPRETED:  # which takes ``_wider`` value by value, and whose tl.min passes over a NaN
            nan = tl.where(tl.max((low != low).to(tl.int32), 1) > 0, float("nan"), 0.0)
            low, high = tl.min(low, 1) + nan, tl.max(high, 1) + nan
        else:
            low, high = tl.reduce((low, high), 1, _wider)
        return low[:, None], high[:, None]

    @triton.jit
    def _saturated(even, odd, NVIDIA: tl.constexpr):
        """Return two int32 clamped to int8, in an int16, the even one below."""
        if NVIDIA:
            asm: tl.constexpr = """{ .reg .b32 upper; cvt.pack.sat.s8.s32.b32 upper, $4, $2, 0;
                cvt.pack.sat.s8.s32.b32 $0, $3, $1, upper; }"""
            return tl.inline_asm_elementwise(asm, "=r,r,r,r,r", [even, odd], tl.int16, True, 2)
        else:
            even, odd = tl.minimum(tl.maximum(even, -128), 127), tl.minimum(tl.maximum(odd, -128), 127)
            return (even & 255 | odd << 8).to(tl.int16)

    @triton.jit
    def _int8_codes_kernel(
        x_ptr,  # (T, K), contiguous
        scale_ptr,  # (1,), or None for int8_token
        zero_ptr,  # (1,) int8, or None
        pairs_ptr,  # (T, PAIRS) int16: codes 2 i and 2 i + 1
        step_ptr,  # (T,)
        shift_ptr,  # (T,)
        T,
        K,
        PAIRS,
        LOW: tl.constexpr,
        HIGH: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_P: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """Round BLOCK_T tokens."""
        take_turns(EARLY)
        token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        pair = tl.arange(0, BLOCK_P)
        k = pair // 32 * 64 + pair % 32
        row = token.to(tl.int64)[:, None] * K
        is_token = (token < T)[:, None]
        even = tl.load(x_ptr + row + k[None, :], mask=is_token & (k < K)[None, :], other=0.0).to(tl.float32)
        odd = tl.load(x_ptr + row + k[None, :] + 32, mask=is_token & (k + 32 < K)[None, :], other=0.0).to(tl.float32)
        # A whole number below 2^22 lies in the low bits of its sum with 1.5 * 2^23, which rounds to one, half to even.
        if scale_ptr is None:
            low, high = _bounds(even, odd)
            factor, shift, _, _ = int8_token_grid(low, high)
            step = tl.div_rn(tl.full((BLOCK_T, 1), 1.0, tl.float32), factor)
            step = tl.where((low - low) + (high - high) == 0.0, step, float("nan"))  # where a bound is no number
            less = _MAGIC_BITS - shift.to(tl.int32)
            even = (even * factor + MAGIC).to(tl.int32, bitcast=True) - less
            odd = (odd * factor + MAGIC).to(tl.int32, bitcast=True) - less
            codes = _saturated(even, odd, EARLY)
        else:
            step = tl.maximum(tl.load(scale_ptr).to(tl.float32), _MIN_SCALE)
            scale_dtype: tl.constexpr = scale_ptr.dtype.element_ty
            x_dtype: tl.constexpr = x_ptr.dtype.element_ty
            zero = 0.0 if zero_ptr is None else tl.load(zero_ptr).to(tl.float32)
            shift = zero + tl.full((BLOCK_T, 1), -128.0 if HIGH > 127 else 0.0, tl.float32)
            even = (clamp(divide(even, step, scale_dtype, x_dtype), LOW - zero, HIGH - zero) + MAGIC) + shift
            odd = (clamp(divide(odd, step, scale_dtype, x_dtype), LOW - zero, HIGH - zero) + MAGIC) + shift
            total = tl.sum(even + odd, 1)[:, None]
            step = tl.where(total == total, step, float("nan"))
            codes = (even.to(tl.int32, bitcast=True) & 255 | odd.to(tl.int32, bitcast=True) << 8).to(tl.int16)
        place = token.to(tl.int64)[:, None] * PAIRS + pair[None, :]
        tl.store(pairs_ptr + place, codes, mask=is_token & (pair < PAIRS)[None, :])
        tl.store(step_ptr + token[:, None], step, mask=is_token)
        tl.store(shift_ptr + token[:, None], shift, mask=is_token)

    @lru_cache(MOST)
    def _codes_launch(tokens: int, inputs: int, pairs: int, bits: int, signed: bool, early: bool) -> Launch:
        block_p = next_power_of_2(pairs)
        block_t = max(1, TILE // 2 // block_p)
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        return Launch(
            _int8_codes_kernel,
            (ceil_div(tokens, block_t),),
            (tokens, inputs, pairs, float(low), float(high), block_t, block_p, early),
            num_warps=min(16, max(1, block_t * block_p // 1024)),
            enable_fp_fusion=False,  # the reference rounds products and sums one by one
            **({"launch_pdl": True} if early else {}),
        )


def int8_codes(
    x: Tensor, scale: Tensor | None, bits: int = 8, signed: bool = True, zero_point: Tensor | None = None
) -> Codes:
    """Return the codes of x.

    Args:
        x: (T, K) bf16, fp16 or fp32, contiguous, K at most MOST_VALUES; on a device that Triton compiles for.
        scale: one value, of a trained step size; None for int8_token.
        bits, signed: the trained grid.
        zero_point: int8, one value, its code of 0; None for 0.
    """
    tokens, inputs = x.shape
    codes = x.new_empty(tokens, ceil_div(inputs, INPUTS) * INPUTS, dtype=torch.int8)
    # Both start at a multiple of 16 bytes, which compiled kernels rely on.
    step, shift = x.new_empty(2, ceil_div(tokens, 4) * 4, dtype=torch.float32)[:, :tokens]
    make = _codes_launch(tokens, inputs, codes.shape[1] // 2, bits, signed, starts_early(x))
    make(x, scale, zero_point, codes.view(torch.int16), step, shift)
    return Codes(codes, step, shift)
