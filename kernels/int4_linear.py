"""W4A16 linear: int4 weights stay packed in memory and are dequantized in registers.

    y_MN = x_MK @ W_NK^T + bias_N        W_NK = round_to_x_dtype((float32(code_NK) - zero_point) * float32(scale))

M tokens (all leading axes of x), N outputs, K inputs: x_MK and y_MN are bf16, fp16 or fp32; the weight is laid out by
``int4_layout.prepack``. A zero point is an integer (int8) or a float.

Arithmetic: W_NK equals ``qat.numerics.dequantize(codes, scale, x.dtype, zero_point)`` bit for bit. Products are summed
in float32, the bias is added in float32, and the sum is rounded once to the dtype of x. There are no atomics: a result
does not change from run to run. Autocast does not apply inside: x arrives in the dtype to compute in.

Three ways, behind one operator (``int4_plans`` chooses by shape, never by a search at run time):

- ``int4_nvidia``: 16-bit x, the scale in the dtype of x and an integer zero point, on NVIDIA GPUs since Ampere;
- ``int4_portable``: everything else, on every GPU, while the tokens are few;
- dequantize the weight, then torch's matmul, with torch's settings for it (a sum may be reduced in bf16): where the
  tokens are many.

Bytes moved, at least: N * K / 2 + N * groups * (bytes of a scale) for the weight, and (M * K + M * N) * (bytes of x).

The reference is ``int4_linear_reference`` below: it is the CPU path, and the path wherever Triton is not installed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qat import codebook
from qat.errors import LayerError
from qat.numerics import dequantize
from qat.packing import unpack

from .int4_layout import GROUP_MULTIPLE, INPUTS, ROWS, Int4Weight
from .int4_plans import Decode, Dequantize, choose

try:
    import triton

    from . import int4_nvidia, int4_portable
except ImportError:  # there is no Triton for macOS
    triton = None

# Above this many tokens the portable kernel gives way to dequantizing.
PORTABLE_TOKENS = 32

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def int4_linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ W^T + bias`` for an int4 weight; differentiable in x and bias, the weight being frozen.

    Args:
        x: (..., K) bf16, fp16 or fp32.
        weight: from ``prepack``. Its group size is a multiple of 32 that divides K, or K for the whole row.
        bias: (N,) bf16, fp16 or fp32, or None.

    Returns:
        (..., N) in the dtype of x, contiguous.

    Raises:
        LayerError: a group size, shape, dtype or device other than these, or a scale that requires a gradient.
    """
    w = weight
    arguments = x, w.words, w.scale, w.zero_point, w.levels, bias, w.out_features, w.in_features, w.group_size
    wanted = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wanted or w.scale.requires_grad or torch.compiler.is_compiling():
        return torch.ops.qat.int4_linear(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # an autograd kernel in Python takes longer than a small matmul
        return torch.ops.qat.int4_linear(*arguments)


def int4_dequantize(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K) in ``dtype``: the bits of ``qat.numerics.dequantize``."""
    w = weight
    return torch.ops.qat.int4_dequantize(
        w.words, w.scale, w.zero_point, w.levels, w.out_features, w.in_features, w.group_size, dtype
    )


def int4_linear_reference(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """Return what ``int4_linear`` returns, in torch.

    In float32 the products of 16-bit operands are exact, so this differs from a kernel by the order of the sum alone.
    """
    w = int4_dequantize_reference(weight, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), w.float(), None if bias is None else bias.float()).to(x.dtype)


def int4_dequantize_reference(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Return what ``int4_dequantize`` returns, in torch."""
    packed, scale, zero_point = weight.checkpoint()
    if weight.levels is None:
        return dequantize(unpack(packed, 4, weight.in_features), scale, dtype, zero_point)
    return codebook.dequantize(unpack(packed, 4, weight.in_features, 0), scale, weight.levels[None], dtype)


def backend(device: torch.device) -> str:
    """Return what ``int4_linear`` runs on ``device``: "triton", "triton interpreter" or "torch reference"."""
    if triton is None:
        return "torch reference"
    if int4_portable.INTERPRETED.value:
        return "triton interpreter"
    return "triton" if device.type in ("cuda", "xpu") else "torch reference"


def _linear(x, words, scale, zero_point, levels, bias, out_features, in_features, group_size) -> Tensor:
    weight = Int4Weight(words, scale, zero_point, out_features, in_features, group_size, levels)
    _check(x, weight, bias)
    if backend(x.device) == "torch reference":
        return int4_linear_reference(x, weight, bias)
    x_MK = x if x.dim() == 2 else x.reshape(-1, in_features)
    if not x_MK.is_contiguous() or x_MK.data_ptr() % 16:
        x_MK = x_MK.clone(memory_format=torch.contiguous_format)
    if bias is not None and (not bias.is_contiguous() or bias.data_ptr() % 16):
        bias = bias.clone(memory_format=torch.contiguous_format)
    y_MN = _run(x_MK, weight, bias)
    return y_MN if x.dim() == 2 else y_MN.view(*x.shape[:-1], out_features)


def _run(x_MK: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    tokens = x_MK.shape[0]
    if tokens == 0 or weight.out_features == 0:
        return x_MK.new_empty(tokens, weight.out_features)
    if _suits_nvidia(x_MK, weight):
        if weight.in_features % ROWS:  # rows that 16-byte copies can start at
            x_MK = F.pad(x_MK, (0, -weight.in_features % ROWS))
        plan = _plan(tokens, weight.out_features, x_MK.shape[1], x_MK.device.index)
        return run_plan(plan, x_MK, weight, bias)
    if tokens <= PORTABLE_TOKENS or int4_portable.INTERPRETED.value:
        return _portable(x_MK, weight, bias)
    return run_plan(Dequantize(), x_MK, weight, bias)


def _suits_nvidia(x: Tensor, weight: Int4Weight) -> bool:
    if x.device.type != "cuda" or torch.version.cuda is None or x.dtype == torch.float32:
        return False
    integers = weight.zero_point is None or weight.zero_point.dtype == torch.int8
    suits = weight.levels is not None or (weight.scale.dtype == x.dtype and integers)
    return suits and _device(x.device.index)[1] >= 80


_devices: dict[int, tuple[str, int, int]] = {}
_plans: dict[tuple[int, int, int, int], object] = {}
_kernels: dict[tuple, tuple] = {}


def _device(index: int) -> tuple[str, int, int]:
    """Return the name, compute capability and number of multiprocessors of a CUDA device."""
    if index not in _devices:
        found = torch.cuda.get_device_properties(index)
        _devices[index] = found.name, found.major * 10 + found.minor, found.multi_processor_count
    return _devices[index]


def _plan(tokens: int, out_features: int, in_features: int, device_index: int):
    key = tokens, out_features, in_features, device_index
    if key not in _plans:
        _plans[key] = choose(tokens, out_features, in_features, *_device(device_index))
    return _plans[key]


def run_plan(plan, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """Run one plan of ``int4_plans``, for the operator and for ``benchmarks.tune``.

    x is (M, K) and contiguous; its rows may be longer than K, filled up with zeros.
    """
    if isinstance(plan, Dequantize):
        matrix = _dequantize(weight, x_MK.dtype)
        with torch.autocast(x_MK.device.type, enabled=False):
            return F.linear(x_MK[:, : weight.in_features], matrix, None if bias is None else bias.to(x_MK.dtype))
    y_MN = x_MK.new_empty(x_MK.shape[0], weight.out_features)
    run = _decode if isinstance(plan, Decode) else _batch
    if x_MK.device.index == torch.cuda.current_device():
        run(plan, x_MK, weight, bias, y_MN)
    else:
        with torch.cuda.device(x_MK.device.index):
            run(plan, x_MK, weight, bias, y_MN)
    return y_MN


def _decode(plan: Decode, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None, y_MN: Tensor) -> None:
    operands = _operands(weight, bias, x_MK)
    sizes = _sizes(weight, x_MK)
    arguments = x_MK, *operands, y_MN, x_MK.shape[0], *sizes
    key = plan, x_MK.dtype, *_kind(weight, bias), *sizes
    mask_k = weight.words.shape[1] % (plan.warps * plan.tiles) != 0 or weight.in_features % INPUTS != 0
    constants = (*_constants(weight, bias), mask_k, plan.warps, plan.blocks, plan.block_m, plan.tiles, plan.stages)
    grid = -(-weight.words.shape[0] // plan.blocks), 1, 1
    _launch(int4_nvidia.decode_kernel, key, grid, (*arguments, *constants, plan.early), plan.warps, plan.early)


def _batch(plan, x_MK: Tensor, weight: Int4Weight, bias: Tensor | None, y_MN: Tensor) -> None:
    tokens, out_features = y_MN.shape
    x = int4_nvidia.descriptor(x_MK, plan.block_m)
    parts = y_MN
    if plan.split > 1:
        parts = x_MK.new_empty(plan.split, tokens, out_features, dtype=torch.float32)
    operands = _operands(weight, bias, x_MK)
    sizes = _sizes(weight, x_MK)
    arguments = x, *operands, y_MN, parts, tokens, *sizes
    key = plan, x_MK.dtype, *_kind(weight, bias), *sizes
    constants = *_constants(weight, bias), *plan
    grid = -(-weight.words.shape[0] // plan.blocks) * -(-tokens // plan.block_m), plan.split, 1
    _launch(int4_nvidia.batch_kernel, key, grid, (*arguments, *constants), plan.warps, plan.early)
    if plan.split > 1:
        aligned = y_MN.numel() % 16 == 0, y_MN.numel() == 1
        key = "sum", plan.split, x_MK.dtype, bias is None or bias.dtype, out_features, aligned, plan.early
        arguments = parts, bias, y_MN, y_MN.numel(), out_features, plan.split, 1024, plan.early > 0
        grid = -(-y_MN.numel() // 1024), 1, 1
        _launch(int4_portable.sum_parts_kernel, key, grid, arguments, 4, plan.early)


def _operands(weight: Int4Weight, bias: Tensor | None, x: Tensor) -> tuple:
    # A kernel does not read the pointer that stands for what a weight does not have.
    zero_point = weight.words if weight.zero_point is None else weight.zero_point
    levels = weight.words if weight.levels is None else weight.levels
    return weight.words, weight.scale, zero_point, levels, x if bias is None else bias


def _sizes(weight: Int4Weight, x_MK: Tensor | None = None) -> tuple:
    row_blocks, tiles, _ = weight.words.shape
    inputs = weight.in_features if x_MK is None else x_MK.shape[1]
    return weight.out_features, inputs, row_blocks, tiles, weight.scale.shape[1]


def _constants(weight: Int4Weight, bias: Tensor | None) -> tuple:
    whole_row = weight.group_size == weight.in_features
    group = weight.words.shape[1] * INPUTS if whole_row else weight.group_size
    halves = 1 if group % INPUTS == 0 else 2
    return group, halves, weight.zero_point is not None, weight.levels is not None, bias is not None


def _kind(weight: Int4Weight, bias: Tensor | None) -> tuple:
    """Return what a kernel is compiled for, but for its plan and sizes."""
    levels = None if weight.levels is None else weight.scale.dtype  # else the scale is of the dtype of x
    return bias is None or bias.dtype, weight.zero_point is None, levels, weight.group_size


def _launch(kernel, key: tuple, grid: tuple, arguments: tuple, warps: int, early: int) -> None:
    """Launch a kernel; after the first time without Triton's own look-up, which takes longer than a small matmul."""
    device = torch.cuda.current_device()
    key = kernel, device, key
    compiled = _kernels.get(key)
    if compiled is None:
        _kernels[key] = kernel[grid](*arguments, num_warps=warps, launch_pdl=early > 0)
        return
    stream = triton.runtime.driver.active.get_current_stream(device)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def _portable(x_MK: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    y_MN = x_MK.new_empty(x_MK.shape[0], weight.out_features)
    row_blocks = weight.words.shape[0]
    block_m, blocks = min(32, max(16, triton.next_power_of_2(x_MK.shape[0]))), 4
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
            *_sizes(weight),
            weight.group_size,
            BLOCK_M=block_m,
            BLOCKS=blocks,
            num_warps=4,
            num_stages=2,
        )
    return y_MN


def _dequantize(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    if backend(weight.words.device) == "torch reference":
        return int4_dequantize_reference(weight, dtype)
    matrix = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.words.device)
    row_blocks, tiles, _ = weight.words.shape
    if matrix.numel():
        with torch.accelerator.device_index(matrix.device.index):
            int4_portable.dequantize_kernel[(triton.cdiv(tiles, 2), row_blocks)](
                weight.words,
                weight.scale,
                weight.zero_point,
                weight.levels,
                matrix,
                *_sizes(weight),
                weight.group_size,
                BLOCKS=1,
                TILES=2,
                num_warps=4,
            )
    return matrix


def _setup_context(ctx, inputs, output) -> None:
    _, words, scale, zero_point, levels, bias, *sizes = inputs
    if ctx.needs_input_grad[2]:
        raise LayerError("int4_linear has no gradient for its scale: the weight is frozen; pass scale.detach()")
    ctx.save_for_backward(words, scale, zero_point, levels)
    ctx.sizes = sizes
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad_y: Tensor):
    """grad_x = grad_y @ W with W in the dtype of x; grad_bias = the sum of grad_y over tokens, in float32."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        matrix = torch.ops.qat.int4_dequantize(*ctx.saved_tensors, *ctx.sizes, grad_y.dtype)
        with torch.autocast(grad_y.device.type, enabled=False):
            grad_x = grad_y @ matrix
    if ctx.needs_input_grad[5]:
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None, None, None


_library = torch.library.Library("qat", "FRAGMENT")
_WEIGHT = "Tensor words, Tensor scale, Tensor? zero_point, Tensor? levels"
_SIZES = "int out_features, int in_features, int group_size"
_library.define(f"int4_linear(Tensor x, {_WEIGHT}, Tensor? bias, {_SIZES}) -> Tensor")
_library.define(f"int4_dequantize({_WEIGHT}, {_SIZES}, ScalarType dtype) -> Tensor")
_library.impl("int4_linear", _linear, "CompositeExplicitAutograd")


@torch.library.impl(_library, "int4_dequantize", "CompositeExplicitAutograd")
def _dequantize_impl(words, scale, zero_point, levels, out_features, in_features, group_size, dtype):
    return _dequantize(Int4Weight(words, scale, zero_point, out_features, in_features, group_size, levels), dtype)


@torch.library.register_fake("qat::int4_linear", lib=_library)
def _linear_fake(x, words, scale, zero_point, levels, bias, out_features, in_features, group_size):
    _check(x, Int4Weight(words, scale, zero_point, out_features, in_features, group_size, levels), bias)
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("qat::int4_dequantize", lib=_library)
def _dequantize_fake(words, scale, zero_point, levels, out_features, in_features, group_size, dtype):
    return words.new_empty(out_features, in_features, dtype=dtype)


torch.library.register_autograd("qat::int4_linear", _backward, setup_context=_setup_context, lib=_library)


def _check(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> None:
    n, k, group_size = weight.out_features, weight.in_features, weight.group_size
    if k < 1 or x.dim() < 1 or x.shape[-1] != k:
        raise LayerError(f"x has shape {tuple(x.shape)}, and in_features={k}: its last axis must be that long")
    if group_size != k and (group_size < 1 or k % group_size or group_size % GROUP_MULTIPLE):
        raise LayerError(
            f"group_size={group_size} with {k} inputs: int4_linear takes a multiple of {GROUP_MULTIPLE} that "
            f"divides the inputs, or the whole row: group_size={k}, which is granularity='channel'"
        )
    row_blocks, tiles, groups = -(-n // ROWS), -(-k // INPUTS), k // group_size
    if weight.words.dtype != torch.int32 or tuple(weight.words.shape) != (row_blocks, tiles, ROWS * INPUTS // 8):
        raise LayerError(
            f"words is {weight.words.dtype} {tuple(weight.words.shape)}: {n} outputs and {k} inputs take torch.int32 "
            f"({row_blocks}, {tiles}, 128), from qat.kernels.int4_layout.prepack"
        )
    for name, tensor in (("scale", weight.scale), ("zero_point", weight.zero_point)):
        if tensor is not None and tuple(tensor.shape) != (row_blocks, groups, ROWS):
            raise LayerError(
                f"{name} is {tuple(tensor.shape)}: {n} outputs with group_size={group_size} and {k} inputs take "
                f"({row_blocks}, {groups}, {ROWS}), from qat.kernels.int4_layout.prepack"
            )
    if bias is not None and tuple(bias.shape) != (n,):
        raise LayerError(f"bias has shape {tuple(bias.shape)}: {n} outputs take ({n},)")
    for name, tensor in (("x", x), ("scale", weight.scale), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise LayerError(f"{name} is {tensor.dtype}: cast it to bfloat16, float16 or float32")
    if weight.zero_point is not None and weight.zero_point.dtype not in (torch.int8, *_FLOATS):
        raise LayerError(f"zero_point is {weight.zero_point.dtype}: cast it to int8, bfloat16, float16 or float32")
    if weight.levels is not None and (weight.zero_point is not None or weight.levels.shape != (16,)):
        raise LayerError(f"a codebook has 16 levels and no zero point, not {tuple(weight.levels.shape)}")
    tensors = [(name, getattr(weight, name)) for name in ("words", "scale", "zero_point", "levels")] + [("bias", bias)]
    for name, tensor in tensors:
        if tensor is not None and tensor.device != x.device:
            raise LayerError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
