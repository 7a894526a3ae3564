"""The inner product of two tensors, in float32.

    sum_i a_i * b_i

a and b are bf16, fp16 or fp32, of one shape, and products and sums float32, in an order that depends on the size alone:
no atomics, the same bits on every run. The reference is ``(a.float() * b.float()).sum()``, which moves five times the
bytes of 16-bit tensors.

Bytes moved: a and b, once.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import MOST, Launch, ceil_div

BLOCK = 4096  # elements a program holds at a time
WARPS = 8
PARTIAL_SUMS = 4096  # at most


@triton.jit
def _inner_product_kernel(a_ptr, b_ptr, sums_ptr, size, tiles, BLOCK: tl.constexpr):
    """Compute the partial sum of ``tiles`` tiles."""
    start = tl.program_id(0).to(tl.int64) * tiles * BLOCK
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tiles):
        place = start + tile * BLOCK + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + place, mask=place < size, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + place, mask=place < size, other=0.0).to(tl.float32)
        total += a * b
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product, float32 ().

    Args:
        a: dense, in any order of its axes.
        b: of a's shape.
    """
    if b.stride() != a.stride():
        b = torch.empty_like(a, dtype=b.dtype).copy_(b)
    launch, programs = _launch(a.numel())
    sums = torch.empty(programs, dtype=torch.float32, device=a.device)
    if programs:
        launch(a, b, sums)
    return sums.sum()


@lru_cache(MOST)
def _launch(size: int) -> tuple[Launch, int]:
    tiles = ceil_div(size, BLOCK)
    each = max(1, ceil_div(tiles, PARTIAL_SUMS))
    programs = ceil_div(tiles, each)
    return Launch(_inner_product_kernel, (programs,), (size, each, BLOCK), num_warps=WARPS), programs
