"""How a product of int8 and int4 codes runs on the GPU at hand: the codes of x, a plan, its kernel, its launch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import int8_batch, int8_portable
from .int4_layout import INPUTS, Int4Weight
from .int4_plans import Int8, choose_int8
from .int4_run import launch, limits
from .int8_codes import Codes, int8_codes
from .launching import MOST, Launch, ceil_div

WHOLE_ROW = 2**30  # more inputs than any group of a row has


def multiply(
    x_MK: Tensor,
    weight: Int4Weight,
    sums: Tensor,
    grid: tuple[Tensor | None, int, bool, Tensor | None],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Round x, contiguous, to a grid of ``int8_codes``, and return its product with the weight, (M, N) in ``dtype``."""
    if not x_MK.shape[0] or not weight.out_features:
        return x_MK.new_empty(x_MK.shape[0], weight.out_features, dtype=dtype)
    codes = int8_codes(x_MK, *grid)
    return run_plan(plan_for(x_MK.shape[0], weight), codes, weight, sums, bias, dtype)


def plan_for(tokens: int, weight: Int4Weight) -> Int8 | None:
    """Return the plan for M tokens on the weight's device; None for the portable kernel."""
    device = weight.words.device
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    name, capability, multiprocessors = limits(device.index)
    if capability != 90:
        return None
    return choose_int8(tokens, weight.out_features, weight.in_features, name, multiprocessors)


def run_plan(
    plan: Int8 | None, codes: Codes, weight: Int4Weight, sums: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiply by one plan, for the operator and for ``benchmarks.tune``."""
    y_MN = sums.new_empty(codes.codes.shape[0], weight.out_features, dtype=dtype)
    if plan is None:
        _portable(codes, weight, sums, bias, y_MN)
    elif y_MN.device.index == torch.cuda.current_device():
        _batch(plan, codes, weight, sums, bias, y_MN)
    else:
        with torch.cuda.device(y_MN.device.index):
            _batch(plan, codes, weight, sums, bias, y_MN)
    return y_MN


def _portable(codes: Codes, weight: Int4Weight, sums: Tensor, bias: Tensor | None, y_MN: Tensor) -> None:
    launch = _portable_launch(y_MN.shape[0], *_sizes(weight), *_groups(weight))
    launch(*codes, weight.words, weight.scale, weight.zero_point, sums, bias, y_MN)


@lru_cache(MOST)
def _portable_launch(tokens: int, outputs: int, row_blocks: int, *rest: int) -> Launch:
    block_m, blocks = (64 if tokens > 16 else 16), 4
    grid = (ceil_div(tokens, block_m) * ceil_div(row_blocks, blocks),)
    arguments = tokens, outputs, row_blocks, *rest, block_m, blocks
    return Launch(int8_portable.int8_matmul_kernel, grid, arguments, num_warps=4)


def _batch(plan: Int8, codes: Codes, weight: Int4Weight, sums: Tensor, bias: Tensor | None, y_MN: Tensor) -> None:
    # A kernel does not read the pointer that stands for what a weight does not have.
    zero_point = weight.words if weight.zero_point is None else weight.zero_point
    described = int8_batch.descriptors(codes.codes, weight.words, plan.block_m)
    operands = codes.step, codes.shift, weight.scale, zero_point, sums, sums if bias is None else bias
    sizes = _sizes(weight)
    *of_kernel, programs = plan
    constants = *_groups(weight), weight.zero_point is not None, bias is not None, *of_kernel
    kinds = weight.scale.dtype, y_MN.dtype, None if bias is None else bias.dtype
    items = ceil_div(weight.words.shape[0], int8_batch.BLOCKS.value) * ceil_div(y_MN.shape[0], plan.block_m)
    arguments = *described, *operands, y_MN, y_MN.shape[0], *sizes, *constants
    grid = min(items, programs), 1, 1
    launch(int8_batch.int8_batch_kernel, (kinds, sizes, constants), grid, arguments, 4, early=1)


def _sizes(weight: Int4Weight) -> tuple[int, int, int, int]:
    row_blocks, tiles, _ = weight.words.shape
    return weight.out_features, row_blocks, tiles, weight.scale.shape[1]


def _groups(weight: Int4Weight) -> tuple[int, int]:
    """Return the inputs of a group, and how many tiles of one are summed in integers."""
    if weight.group_size == weight.in_features:
        return WHOLE_ROW, 2
    return weight.group_size, 2 if weight.group_size % (2 * INPUTS) == 0 else 1
