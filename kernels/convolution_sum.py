"""The sum of a convolution's outputs, each times a number, in one pass and without the convolution in memory.

    sum_mn g_mn * (sum_k x_mk * w_nk)        m an output's place, n its channel, k a tap and an input channel

x is float32, g and w bf16, fp16 or fp32, of one dtype. Products with w are those of tensor cores, in the dtype of w: 16
bits are too few for x, so that it is two parts there, the nearest number and what that leaves, which keep 16 bits or
more. Sums are float32, in an order that depends on the shapes alone: no atomics, the same bits on every run.

The reference is ``(torch.convolution(x, w.float(), ...) * g).sum()``.

Bytes moved, at least: g and x, once, as long as the taps' rows of x stay in a cache.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launching import MOST, Launch, ceil_div, next_power_of_2
from .rounding import dot, round_to

BLOCK_M, BLOCK_K = 128, 16
WARPS = 8


@triton.jit
def _convolution_sum_kernel(
    x_ptr,  # (B, depth, height, width, C), padded, with any strides
    weight_ptr,  # (N, TAPS_D * TAPS_H * TAPS_W * C)
    grad_ptr,  # (M, N)
    sums_ptr,  # (programs,)
    M,  # outputs' places: B * depth * height * width
    N,
    depth,  # of the output
    height,
    width,
    image,  # from here on strides of x: from one image to the next,
    step_d,  # from one output to the next,
    step_h,
    step_w,
    tap_d,  # from one tap to the next,
    tap_h,
    tap_w,
    channel,  # and from one channel to the next
    TAPS_D: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum one (BLOCK_M, BLOCK_N) tile of the outputs."""
    blocks = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    row = m // width
    plane = row // height
    place = (plane // depth).to(tl.int64) * image + plane % depth * step_d + row % height * step_h + m % width * step_w
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    taps: tl.constexpr = TAPS_D * TAPS_H * TAPS_W * C
    for start in range(0, taps, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tap = k // (C * TAPS_W * TAPS_H) * tap_d + k // (C * TAPS_W) % TAPS_H * tap_h + k // C % TAPS_W * tap_w
        tap += k % C * channel
        x = tl.load(x_ptr + place[:, None] + tap[None, :], mask=(m < M)[:, None] & (k < taps)[None, :], other=0.0)
        w = tl.load(weight_ptr + n[None, :] * taps + k[:, None], mask=(n < N)[None, :] & (k < taps)[:, None], other=0.0)
        nearest = round_to(x, w.dtype)
        y = dot(nearest, w, y)
        if w.dtype != tl.float32:
            y = dot(round_to(x - nearest.to(tl.float32), w.dtype), w, y)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    g = tl.load(grad_ptr + at, mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.sum(y * g.to(tl.float32), 1), 0))


def convolution_sum(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Return the sum of ``grad`` times the convolution of x and the weight, without groups: float32 ().

    Args:
        x: float32 (B, C, ...), of one to three dimensions beside these, with any strides.
        weight: (N, C, ...).
        grad: (B, N, ...), in the weight's dtype, of fewer than 2^31 places.
        stride, padding, dilation: of each dimension.
    """
    if any(padding):
        x = F.pad(x, [each for size in reversed(padding) for each in (size, size)])
    missing = (1,) * (3 - len(stride))
    outputs, taps = (*missing, *grad.shape[2:]), (*missing, *weight.shape[2:])
    strides = (0,) * len(missing) + x.stride()[2:]
    steps = [each * by for each, by in zip(strides, (*missing, *stride), strict=True)]
    apart = [each * by for each, by in zip(strides, (*missing, *dilation), strict=True)]
    sizes = grad.numel() // grad.shape[1], grad.shape[1], *outputs, x.stride(0), *steps, *apart, x.stride(1)
    launch, programs = _launch(sizes, (*taps, x.shape[1]))
    sums = torch.empty(programs, dtype=torch.float32, device=x.device)
    # Channels last, which is how they lie in memory as a rule.
    weight, grad = (tensor.movedim(1, -1).contiguous() for tensor in (weight, grad))
    launch(x, weight, grad, sums)
    return sums.sum()


@lru_cache(MOST)
def _launch(sizes: tuple[int, ...], taps: tuple[int, ...]) -> tuple[Launch, int]:
    block_n = min(64, max(16, next_power_of_2(sizes[1])))
    programs = ceil_div(sizes[0], BLOCK_M) * ceil_div(sizes[1], block_n)
    rest = *sizes, *taps, BLOCK_M, block_n, BLOCK_K
    return Launch(_convolution_sum_kernel, (programs,), rest, num_warps=WARPS), programs
