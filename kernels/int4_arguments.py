"""What the int4 kernels are launched with: the arguments and the grid that a plan, a weight and x come to.

Nothing is launched here, and x and the weight may be on the meta device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from . import int4_batch, int4_decode, int4_few, int4_portable, int4_stream
from .int4_layout import INPUTS, ROWS, Int4Weight
from .int4_plans import Batch, Decode, Few, Stream, band


class Prepared(NamedTuple):
    """A launch but for its tensors.

    Attributes:
        kernel: of Triton or Gluon.
        key: what it is compiled for.
        grid: programs along three axes.
        tail: its arguments from the sizes on.
    """

    kernel: Any
    key: tuple
    grid: tuple[int, int, int]
    tail: tuple


def decode_launch(plan: Decode, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None) -> Prepared:
    """Return the product of few tokens (M, K) with a weight."""
    sizes = sizes_of(weight, x_MK)
    key = plan, x_MK.dtype, *_kind(weight, bias), *sizes
    mask_k = weight.words.shape[1] % (plan.warps * plan.tiles) != 0 or weight.in_features % INPUTS != 0
    constants = mask_k, plan.warps, plan.blocks, plan.block_m, plan.tiles, plan.stages, plan.early
    grid = -(-weight.words.shape[0] // plan.blocks), 1, 1
    return Prepared(int4_decode.decode_kernel, key, grid, (*sizes, *_constants(weight, bias), *constants))


def stream_launch(plan: Stream, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None) -> Prepared:
    """Return the product of one token (1, K) with a weight, by one program a multiprocessor."""
    sizes, span = sizes_of(weight, x_MK), plan.warps * plan.tiles
    key = plan, x_MK.dtype, *_kind(weight, bias), *sizes
    row_blocks, tiles, _ = weight.words.shape
    steps = tiles % span == 0, -(-tiles // span)
    constants = *steps, plan.warps, plan.tiles, plan.stages, plan.early
    grid = min(plan.programs, row_blocks), 1, 1
    return Prepared(int4_stream.stream_kernel, key, grid, (*sizes, *_constants(weight, bias), *constants))


def few_launches(plan: Few, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None) -> tuple[Prepared, Prepared | None]:
    """Return the product of 2 to 8 tokens (M, K) with a weight, and the sum of its parts, None for one part."""
    sizes, span = sizes_of(weight, x_MK), plan.warps * plan.tiles
    key = plan, x_MK.dtype, *_kind(weight, bias), *sizes
    row_blocks, tiles, _ = weight.words.shape
    constants = _constants(weight, bias if plan.split == 1 else None)
    tail = *sizes, *constants, tiles == plan.split * span, plan.warps, plan.tiles, plan.stages, plan.early
    grid = min(plan.programs, row_blocks), plan.split, 1
    return Prepared(int4_few.few_kernel, key, grid, tail), _sum_launch(plan, x_MK, weight, bias)


def batch_launches(
    plan: Batch, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None
) -> tuple[Prepared, Prepared | None]:
    """Return the product of many tokens (M, K) with a weight, and the sum of its parts, None for a product in one."""
    sizes, first_n = sizes_of(weight, x_MK), first_in_parts(plan)
    if plan.split > -(-weight.words.shape[1] // plan.tiles):
        raise ValueError(f"{plan}: K is {weight.words.shape[1]} tiles, fewer rounds than parts")
    key = plan, x_MK.dtype, *_kind(weight, bias), *sizes
    along_m, along_n = -(-x_MK.shape[0] // plan.block_m), -(-weight.words.shape[0] // plan.warps)
    unsplit = plan.unsplit * along_m
    items = unsplit + (along_m * along_n - unsplit) * plan.split
    programs = min(items, plan.programs or items)
    places = along_m if unsplit else band(sizes[1], plan.block_m), unsplit, first_n
    rounds = weight.words.shape[1] % plan.tiles == 0 and weight.in_features % INPUTS == 0
    tail = *sizes, *places, *_constants(weight, bias), rounds, *plan[:-2], plan.programs > 0
    return Prepared(int4_batch.batch_kernel, key, (programs, 1, 1), tail), _sum_launch(plan, x_MK, weight, bias)


def first_in_parts(plan: Few | Batch) -> int:
    """Return the first output whose sum over K is one of parts, where the plan has any."""
    return plan.unsplit * plan.warps * ROWS if isinstance(plan, Batch) else 0


def _sum_launch(plan: Few | Batch, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None) -> Prepared | None:
    if plan.split == 1:
        return None
    tokens, outputs, first_n = x_MK.shape[0], weight.out_features, first_in_parts(plan)
    key = "sum", plan.split, x_MK.dtype, bias is None or bias.dtype, outputs, first_n, plan.early
    tail = tokens, outputs, first_n, plan.split, 1024, plan.early > 0
    grid = tokens, -(-(outputs - first_n) // 1024), 1
    return Prepared(int4_portable.sum_parts_kernel, key, grid, tail)


def dequantize_launch(weight: Int4Weight, matrix: Tensor) -> tuple[tuple[int, int, int], tuple]:
    """Return a grid, and arguments of which the first five are tensors or None."""
    row_blocks, tiles, _ = weight.words.shape
    tail = *sizes_of(weight), weight.group_size, 1, 2
    return (-(-tiles // 2), row_blocks, 1), (*weight[:3], weight.levels, matrix, *tail)


def operands_of(weight: Int4Weight, bias: Tensor | None, x: Tensor) -> tuple:
    """Return the tensors between x and y, of which none is None."""
    # A kernel does not read the pointer that stands for what a weight does not have.
    zero_point = weight.words if weight.zero_point is None else weight.zero_point
    levels = weight.words if weight.levels is None else weight.levels
    return weight.words, weight.scale, zero_point, levels, x if bias is None else bias


def sizes_of(weight: Int4Weight, x_MK: Tensor | None = None) -> tuple:
    """Return N, K, row blocks, tiles and groups; with x, K is the length of its rows, which may be filled up."""
    row_blocks, tiles, _ = weight.words.shape
    inputs = weight.in_features if x_MK is None else x_MK.shape[1]
    return weight.out_features, inputs, row_blocks, tiles, weight.scale.shape[1]


def _constants(weight: Int4Weight, bias: Tensor | None) -> tuple:
    """Return the constexprs that follow from the weight and the bias."""
    whole_row = weight.group_size == weight.in_features
    group = weight.words.shape[1] * INPUTS if whole_row else weight.group_size
    halves = 1 if group % INPUTS == 0 else 2
    return group, halves, weight.zero_point is not None, weight.levels is not None, bias is not None


def _kind(weight: Int4Weight, bias: Tensor | None) -> tuple:
    """Return what a kernel is compiled for, but for its plan and sizes."""
    levels = None if weight.levels is None else weight.scale.dtype  # else the scale is of the dtype of x
    tensors = weight.words, weight.scale, weight.zero_point, weight.levels
    aligned = tuple(t is None or t.data_ptr() % 16 == 0 for t in tensors)
    return bias is None or bias.dtype, weight.zero_point is None, levels, weight.group_size, aligned
