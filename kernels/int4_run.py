"""How an int4 matmul runs on the GPU at hand: the plan of ``int4_plans``, its kernel, its launch.

What was launched once is launched again by ``int4_recipe``, which takes less time than to work all this out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from qat import backend

from . import int4_batch, int4_portable, int4_recipe
from .int4_arguments import (
    Prepared,
    batch_launches,
    decode_launch,
    dequantize_launch,
    few_launches,
    first_in_parts,
    operands_of,
    sizes_of,
    stream_launch,
)
from .int4_layout import ROWS, Int4Weight
from .int4_plans import ANY_TOKENS, MANY_TOKENS_BY_TABLE, Batch, Decode, Dequantize, Few, Stream, choose
from .nested_scale import nested_scale
from .rounding import INTERPRETED

# Above this many tokens the portable kernel gives way to dequantizing.
PORTABLE_TOKENS = 32


def multiply(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias, (..., N); x and bias are contiguous and start at a multiple of 16 bytes."""
    y = int4_recipe.repeat(x, weight, bias)
    if y is not None:
        return y
    shape = torch.Size((*x.shape[:-1], weight.out_features))
    if shape.numel() == 0:
        return x.new_empty(shape)
    x_MK, plain, tokens = x.view(-1, weight.in_features), _plain(weight), shape[:-1].numel()
    one_plan, suits = backend.batch_invariant(), suits_nvidia(x_MK, plain)
    if one_plan and not (suits and limits(x.device.index)[1] == 90):
        return _portable(x_MK, plain, bias, PORTABLE_TOKENS).view(shape)
    if suits:
        if weight.in_features % ROWS:  # rows that 16-byte copies can start at
            x_MK = F.pad(x_MK, (0, -weight.in_features % ROWS))
        plan = plan_for(x_MK, plain, x.device.index)
        if weight.nest is not None and not isinstance(plan, Dequantize):
            plan = plan._replace(early=0)  # a kernel that starts early reads scales before they are there
        y_MN = run_plan(plan, x_MK, plain, bias)
        if not weight.in_features % ROWS and int4_recipe.addresses(x, weight, bias) is not None:
            int4_recipe.remember(x, weight, bias, _recipe(plan, x_MK, weight, bias, shape))
        return y_MN.view(shape)
    if tokens <= PORTABLE_TOKENS or INTERPRETED.value:
        block_m = min(PORTABLE_TOKENS, max(16, triton.next_power_of_2(tokens)))
        return _portable(x_MK, plain, bias, block_m).view(shape)
    return run_plan(Dequantize(), x_MK, plain, bias).view(shape)


def _recipe(plan, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None, shape: torch.Size) -> int4_recipe.Recipe:
    """Return how the launches of a plan that just ran on the current device are done again."""
    if weight.nest is not None or isinstance(plan, Dequantize):
        rows = tuple(x_MK.shape)  # and not x, which a recipe would keep alive
        return lambda x, weight, bias, _: run_plan(plan, x.view(rows), _plain(weight), bias).view(shape)
    if isinstance(plan, Decode | Stream):
        return int4_recipe.decode(_again(_in_one(plan, x_MK, weight, bias)), shape)
    product, sum_parts = _in_parts(plan, x_MK, weight, bias)
    sum_parts = None if sum_parts is None else _again(sum_parts)
    inputs = x_MK.shape[1] if isinstance(plan, Batch) else None
    return int4_recipe.batch(_again(product), sum_parts, shape, inputs, plan.split, shape[-1] - first_in_parts(plan))


def _again(prepared: Prepared) -> int4_recipe.Launch:
    """Return a kernel that was compiled for this, to be launched on the current device."""
    kernel, key, grid, tail = prepared
    device = torch.cuda.current_device()
    return int4_recipe.Launch(_kernels[kernel, device, key], grid, device, tail)


def _plain(weight: Int4Weight) -> Int4Weight:
    """Return the weight with its scales as values."""
    if weight.nest is None:
        return weight
    return weight._replace(scale=nested_scale(weight.scale, weight.nest, weight.out_features), nest=None)


def _on_nvidia(x: Tensor) -> bool:
    return x.is_cuda and torch.version.cuda is not None


def suits_nvidia(x: Tensor, weight: Int4Weight) -> bool:
    """Return whether x lies on an NVIDIA GPU whose tensor cores take the weight as it is held."""
    return _on_nvidia(x) and suits_kernels(x.dtype, weight, x.device.index)


def suits_kernels(dtype: torch.dtype, weight: Int4Weight, device: int) -> bool:
    """Return whether the kernels for NVIDIA take the weight, with x in ``dtype``, on that NVIDIA GPU."""
    if dtype == torch.float32:
        return False
    integers = weight.zero_point is None or weight.zero_point.dtype == torch.int8
    suits = weight.levels is not None or (weight.scale.dtype == dtype and integers)
    return suits and limits(device)[1] >= 80


_devices: dict[int, tuple[str, int, int]] = {}
_plans: dict[tuple, object] = {}
_kernels: dict[tuple, tuple] = {}


def limits(index: int) -> tuple[str, int, int]:
    """Return the name, compute capability and number of multiprocessors of a CUDA device."""
    if index not in _devices:
        found = torch.cuda.get_device_properties(index)
        _devices[index] = found.name, found.major * 10 + found.minor, found.multi_processor_count
    return _devices[index]


def plan_for(x_MK: Tensor, weight: Int4Weight, device: int):
    """Return the plan of ``int4_plans`` on that NVIDIA GPU, of which x may be on the meta device."""
    if backend.batch_invariant():
        return ANY_TOKENS
    tokens, in_features = x_MK.shape
    if weight.levels is not None and tokens > MANY_TOKENS_BY_TABLE:
        return Dequantize()
    out_features = weight.out_features
    key = tokens, out_features, in_features, device, x_MK.dtype
    if key not in _plans:
        kind = "float16" if x_MK.dtype == torch.float16 else "bfloat16"
        _plans[key] = choose(tokens, out_features, in_features, *limits(device), kind)
    return _plans[key]


def run_plan(plan, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """Run one plan of ``int4_plans``, for the operator and for ``benchmarks.tune``.

    x is (M, K) and contiguous; its rows may be longer than K, filled up with zeros.
    """
    if isinstance(plan, Dequantize):
        matrix = dequantized(weight, x_MK.dtype)
        if x_MK.shape[1] > weight.in_features:
            x_MK = x_MK[:, : weight.in_features]
        bias = None if bias is None else bias.to(x_MK.dtype)
        if not torch.is_autocast_enabled(x_MK.device.type):
            return F.linear(x_MK, matrix, bias)
        with torch.autocast(x_MK.device.type, enabled=False):
            return F.linear(x_MK, matrix, bias)
    y_MN = x_MK.new_empty(x_MK.shape[0], weight.out_features)
    run = _decode if isinstance(plan, Decode | Stream) else _several
    if x_MK.device.index == torch.cuda.current_device():
        run(plan, x_MK, weight, bias, y_MN)
    else:
        with torch.cuda.device(x_MK.device.index):
            run(plan, x_MK, weight, bias, y_MN)
    return y_MN


def launch(kernel, key: tuple, grid: tuple, arguments: tuple, warps: int, early: int) -> None:
    """Launch a kernel; after the first time without Triton's own look-up, which takes longer than a small matmul."""
    device = torch.cuda.current_device()
    key = kernel, device, key
    compiled = _kernels.get(key)
    if compiled is None:
        _kernels[key] = kernel[grid](*arguments, num_warps=warps, launch_pdl=early > 0)
        return
    stream = triton.runtime.driver.active.get_current_stream(device)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def compile_plan(plan, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None) -> list:
    """Start to compile what ``run_plan`` would launch, in Triton's current mode, for tensors on the meta device.

    Returns:
        What Triton returns: the kernels, or in its asynchronous mode what stands for them until they are done.
    """
    kernels = []

    def compile(kernel, key: tuple, grid: tuple, arguments: tuple, warps: int, early: int) -> None:
        kernels.append(kernel.warmup(*arguments, grid=grid, num_warps=warps, launch_pdl=early > 0))

    if isinstance(plan, Dequantize):
        matrix = x_MK.new_empty(weight.out_features, weight.in_features)
        grid, arguments = dequantize_launch(weight, matrix)
        kernels.append(int4_portable.dequantize_kernel.warmup(*arguments, grid=grid, num_warps=4))
    else:
        run = _decode if isinstance(plan, Decode | Stream) else _several
        run(plan, x_MK, weight, bias, x_MK.new_empty(x_MK.shape[0], weight.out_features), compile)
    return kernels


def _in_one(plan: Decode | Stream, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None) -> Prepared:
    return (decode_launch if isinstance(plan, Decode) else stream_launch)(plan, x_MK, weight, bias)


def _decode(
    plan: Decode | Stream,
    x_MK: Tensor,
    weight: Int4Weight,
    bias: Tensor | None,
    y_MN: Tensor,
    launch: Callable = launch,
) -> None:
    kernel, key, grid, tail = _in_one(plan, x_MK, weight, bias)
    arguments = x_MK, *operands_of(weight, bias, x_MK), y_MN, x_MK.shape[0], *tail
    launch(kernel, key, grid, arguments, plan.warps, plan.early)


def _in_parts(
    plan: Few | Batch, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None
) -> tuple[Prepared, Prepared | None]:
    return (few_launches if isinstance(plan, Few) else batch_launches)(plan, x_MK, weight, bias)


def _several(
    plan: Few | Batch, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None, y_MN: Tensor, launch: Callable = launch
) -> None:
    (kernel, key, grid, tail), sum_parts = _in_parts(plan, x_MK, weight, bias)
    x = x_MK if isinstance(plan, Few) else int4_batch.descriptor(x_MK, plan.block_m)
    parts = y_MN
    if plan.split > 1:
        tokens, outputs = y_MN.shape
        parts = x_MK.new_empty(plan.split, tokens, outputs - first_in_parts(plan), dtype=torch.float32)
    arguments = x, *operands_of(weight, bias, x_MK), y_MN, parts, x_MK.shape[0], *tail
    launch(kernel, key, grid, arguments, plan.warps, plan.early)
    if sum_parts is not None:
        kernel, key, grid, tail = sum_parts
        launch(kernel, key, grid, (parts, bias, y_MN, *tail), 4, plan.early)


def _portable(x_MK: Tensor, weight: Int4Weight, bias: Tensor | None, block_m: int) -> Tensor:
    y_MN = x_MK.new_empty(x_MK.shape[0], weight.out_features)
    row_blocks = weight.words.shape[0]
    blocks = 4
    with torch.accelerator.device_index(x_MK.device.index):
        int4_portable.matmul_kernel[(triton.cdiv(x_MK.shape[0], block_m) * triton.cdiv(row_blocks, blocks),)](
            x_MK,
            weight.words,
            weight.scale,
            weight.zero_point,
            weight.levels,
            bias,
            y_MN,
            x_MK.shape[0],
            *sizes_of(weight),
            weight.group_size,
            BLOCK_M=block_m,
            BLOCKS=blocks,
            num_warps=4,
            num_stages=2,
        )
    return y_MN


def dequantized(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Return the whole weight (N, K) in ``dtype``."""
    weight = _plain(weight)
    matrix = int4_recipe.repeat_dequantized(weight, dtype)
    if matrix is not None:
        return matrix
    matrix = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.words.device)
    if not matrix.numel():
        return matrix
    grid, arguments = dequantize_launch(weight, matrix)
    with torch.accelerator.device_index(matrix.device.index):
        compiled = int4_portable.dequantize_kernel[grid](*arguments, num_warps=4)
    if _on_nvidia(matrix) and int4_recipe.addresses(weight.words, weight, None) is not None:
        again = int4_recipe.Launch(compiled, grid, matrix.device.index, arguments[5:])
        int4_recipe.remember_dequantized(weight, matrix, again)
    return matrix
