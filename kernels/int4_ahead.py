"""Int4 kernels are compiled before the first call, side by side, for numbers of tokens that are named.

A kernel takes most of a second. Two thirds of that are outside Python or in a process of its own, so threads help.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from triton.runtime._async_compile import AsyncCompileMode, FutureKernel

from . import int4_run
from .int4_layout import INPUTS, ROWS, Int4Weight

MOST_THREADS = 8


class Product(NamedTuple):
    """What decides a product's kernels beside the number of tokens.

    Attributes:
        out_features, in_features, group_size: N, K, and K for the whole row.
        scale, zero_point: their dtypes.
        table: whether the weight has a codebook's levels.
        bias: whether one is added.
        dtype: of x and the bias; torch.bfloat16 or torch.float16.
    """

    out_features: int
    in_features: int
    group_size: int
    scale: torch.dtype
    zero_point: torch.dtype | None
    table: bool
    bias: bool
    dtype: torch.dtype


def meta_weight(product: Product) -> Int4Weight:
    """Return a weight without values, on the meta device."""
    out_features, in_features, group_size, scale, zero_point, table, _, _ = product
    row_blocks, tiles = -(-out_features // ROWS), -(-in_features // INPUTS)
    scales = row_blocks, in_features // group_size, ROWS
    return Int4Weight(
        torch.empty(row_blocks, tiles, ROWS * INPUTS // 8, dtype=torch.int32, device="meta"),
        torch.empty(scales, dtype=scale, device="meta"),
        None if zero_point is None else torch.empty(scales, dtype=zero_point, device="meta"),
        *(out_features, in_features, group_size),
        torch.empty(16, device="meta") if table else None,
    )


def compile_ahead(products: Iterable[Product], tokens: Iterable[int], device: int) -> int:
    """Compile the kernels of ``int4_plans`` for numbers of tokens on an NVIDIA GPU, and load them; return how many.

    It sets the calling thread's current device.
    """
    torch.cuda.set_device(device)
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "compile_ahead", torch.cuda.set_device, (device,)) as executor:
        with AsyncCompileMode(executor):
            started = [
                kernel for product in products for count in tokens for kernel in _kernels(product, count, device)
            ]
        kernels = {each.result() if isinstance(each, FutureKernel) else each for each in started}
        list(executor.map(lambda kernel: kernel.run, kernels))  # asking for it loads it
    return len(kernels)


def _kernels(product: Product, tokens: int, device: int) -> list:
    weight, dtype = meta_weight(product), product.dtype
    x_MK = torch.empty(tokens, weight.in_features + -weight.in_features % ROWS, dtype=dtype, device="meta")
    bias = torch.empty(weight.out_features, dtype=dtype, device="meta") if product.bias else None
    if not int4_run.suits_kernels(dtype, weight, device):
        return []
    return int4_run.compile_plan(int4_run.plan_for(x_MK, weight, device), x_MK, weight, bias)
