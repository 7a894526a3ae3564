"""Dynamic int8 rounding of a linear layer's input, as its runtime does it, in one pass over memory.

    int8_token:  low_T = min(0, min_K x), high_T = max(0, max_K x), f_T = 255 / (high - low), or 1 where high = low
                 z_T = clamp(round(d)), u_TK = round(x * f) + z, code = clamp(u, -128, 127), y = (code - z) * (1 / f)
    q8_0:        d_T = fp16(amax / 127), f_T = 127 / amax, or 0 where amax = 0, code = round(x * f), y = code * d

T tokens of K values for int8_token (d in ``qat.quantizers.dynamic``), T blocks of K = 32 for q8_0. x and y are bf16,
fp16 or fp32, and the arithmetic float32. The gradient passes straight through, except where u was clamped.

The reference is ``rounded``, ``rounded_gradient`` and ``reround_`` of ``qat.quantizers.dynamic``; this module has
functions of the same names and arguments and gives the same bits. ``qat.backend`` chooses between the two.

Bytes moved, at least: x and y forward; x backward where the gradient is masked in place, as only what is clamped is
written, and y where it is wanted again.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.spec import Dynamic

from .launching import MOST, Launch, ceil_div, next_power_of_2, starts_early, take_turns
from .rounding import clamp, round_half_even, round_to

TILE = 4096  # values a program holds, if a token has no more
MOST_VALUES = 32768  # of a token: 64 registers a thread in 16 warps

# As many as the int4 kernels read weights early for: they follow, in a frozen layer.
FEW_TOKENS = 64

_BLOCK = 32  # of q8_0


@triton.jit
def int8_token_grid(low, high):
    """Return (factor, zero point, low * factor, high * factor) of tokens whose values go from low to high, (T, 1)."""
    factor = tl.where(low == high, 1.0, tl.div_rn(tl.full(low.shape, 255.0, tl.float32), high - low))
    least, most = low * factor, high * factor
    zero_point = tl.where((-128.0 + least) + (127.0 + most) > 0.0, -128.0 - least, 127.0 - most)
    return factor, round_half_even(clamp(zero_point, -128.0, 127.0)), least, most


@triton.jit
def _round_kernel(
    x_ptr,  # (T, K), contiguous
    y_ptr,  # (T, K), or None where it is not wanted
    grad_y_ptr,  # (T, K), or None where grad_x is made in place
    grad_x_ptr,  # (T, K), or None where it is not wanted
    T,
    K,
    Q8_0: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Round BLOCK_T tokens."""
    take_turns(EARLY)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    place = token.to(tl.int64)[:, None] * K + k[None, :]  # 64 bits: a batch may have more than 2^31 values
    valid = (token < T)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + place, mask=valid, other=0.0).to(tl.float32)
    broken = tl.max((x != x).to(tl.int32), 1)[:, None] > 0  # tl.min and tl.max pass over a NaN, torch's keep it
    if Q8_0:
        largest = tl.where(broken, float("nan"), tl.max(tl.abs(x), 1)[:, None])
        most = tl.full((BLOCK_T, 1), 127.0, tl.float32)
        factor = tl.where(largest == 0.0, 0.0, tl.div_rn(most, largest))
        y = round_half_even(x * factor) * round_to(tl.div_rn(largest, most), tl.float16).to(tl.float32)
    else:
        low = tl.where(broken, float("nan"), tl.minimum(tl.min(x, 1), 0.0)[:, None])
        high = tl.where(broken, float("nan"), tl.maximum(tl.max(x, 1), 0.0)[:, None])
        factor, zero_point, least, most = int8_token_grid(low, high)
        codes = round_half_even(x * factor) + zero_point
        y = (clamp(codes, -128.0, 127.0) - zero_point) * tl.div_rn(tl.full((BLOCK_T, 1), 1.0, tl.float32), factor)
        if grad_x_ptr is not None:
            clipped = (codes < -128.0) | (codes > 127.0)
            if grad_y_ptr is None:
                # Rounding is monotonic: nothing is clipped in a token whose two ends are not, which is nearly all.
                low_end, high_end = round_half_even(least) + zero_point, round_half_even(most) + zero_point
                if tl.max(((low_end < -128.0) | (high_end > 127.0)).to(tl.int32)) > 0:
                    zero = tl.zeros_like(x).to(grad_x_ptr.dtype.element_ty)
                    tl.store(grad_x_ptr + place, zero, mask=valid & clipped)
            else:
                grad_y = tl.load(grad_y_ptr + place, mask=valid, other=0.0).to(tl.float32)
                grad_x = round_to(tl.where(clipped, 0.0, grad_y), grad_x_ptr.dtype.element_ty)
                tl.store(grad_x_ptr + place, grad_x, mask=valid)
    if y_ptr is not None:
        tl.store(y_ptr + place, round_to(y, y_ptr.dtype.element_ty), mask=valid)


def rounded(x: Tensor, kind: Dynamic, dtype: torch.dtype | None = None) -> Tensor:
    """Do what ``qat.quantizers.dynamic.rounded`` does, for tokens of at most MOST_VALUES."""
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    _launch(x, y, None, None, kind)
    return y


def rounded_gradient(grad_output: Tensor, x: Tensor, kind: Dynamic) -> Tensor:
    """Do what ``qat.quantizers.dynamic.rounded_gradient`` does."""
    if kind == Dynamic.q8_0:
        return grad_output.to(x.dtype, copy=True)
    x = x.contiguous()
    grad_x = torch.empty_like(x)
    _launch(x, None, grad_output.contiguous(), grad_x, kind)
    return grad_x


def reround_(
    grad_output: Tensor, x: Tensor, kind: Dynamic, wanted: bool = True, dtype: torch.dtype | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Do what ``qat.quantizers.dynamic.reround_`` does, in one pass."""
    x = x.contiguous()
    y = None if dtype is None else torch.empty_like(x, dtype=dtype)
    grad_x = grad_output.contiguous() if wanted else None
    if y is not None or (wanted and kind != Dynamic.q8_0):
        _launch(x, y, None, grad_x, kind)
    return y, grad_x


def _launch(x: Tensor, y: Tensor | None, grad_y: Tensor | None, grad_x: Tensor | None, kind: Dynamic) -> None:
    elements = x.numel()
    if elements:
        k = _BLOCK if kind == Dynamic.q8_0 else x.shape[-1]
        tokens = elements // k
        early = tokens <= FEW_TOKENS and grad_x is None and starts_early(x)
        _round_launch(tokens, k, kind == Dynamic.q8_0, early)(x, y, grad_y, grad_x)


@lru_cache(MOST)
def _round_launch(tokens: int, k: int, q8_0: bool, early: bool) -> Launch:
    block_k = next_power_of_2(k)
    block_t = max(1, TILE // block_k)
    return Launch(
        _round_kernel,
        (ceil_div(tokens, block_t),),
        (tokens, k, q8_0, block_t, block_k, early),
        num_warps=min(16, max(4, block_t * block_k // 1024)),
        **({"launch_pdl": True} if early else {}),
        enable_fp_fusion=False,  # the reference rounds products and sums one by one
    )
