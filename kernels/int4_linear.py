"""W4A16 linear: int4 weights stay packed in memory and are dequantized in registers.

    y_MN = x_MK @ W_NK^T + bias_N        W_NK = round_to_x_dtype((float32(code_NK) - zero_point) * float32(scale))

M tokens (all leading axes of x), N outputs, K inputs: x_MK and y_MN are bf16, fp16 or fp32; the weight is laid out by
``int4_layout.prepack``. A zero point is an integer (int8) or a float.

Arithmetic: W_NK equals ``qat.numerics.dequantize(codes, scale, x.dtype, zero_point)``, or ``qat.codebook.dequantize``,
bit for bit. Products are summed in float32, the bias is added in float32, and the sum is rounded once to the dtype of
x. There are no atomics: a result does not change from run to run. Autocast does not apply inside: x arrives in the
dtype to compute in.

With levels, 16 of them, W_NK = round_to_x_dtype(levels[u_NK] * float32(scale)) instead: NF4 and other codebooks.

Three ways, behind one operator (``int4_plans`` chooses by shape, never by a search at run time; ``int4_run`` launches):

- ``int4_decode``, on Hopper ``int4_stream``, ``int4_few`` and ``int4_batch``: 16-bit x and a codebook, or the scale in
  the dtype of x and an integer zero point, on NVIDIA GPUs since Ampere;
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
from qat.double_quantization import BLOCK
from qat.errors import LayerError
from qat.numerics import dequantize
from qat.packing import unpack

from .int4_layout import GROUP_MULTIPLE, INPUTS, ROWS, SIZES, TENSORS, Int4Weight
from .nested_scale import LEVELS, nested_scale_reference

try:
    from . import int4_run
    from .rounding import INTERPRETED
except ImportError:  # there is no Triton for macOS
    int4_run = None

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
    wanted = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wanted or w.scale.requires_grad or torch.compiler.is_compiling() or not _is_plain(x):
        return torch.ops.qat.int4_linear(x, *w.tensors(), bias, *w.sizes())
    return _product(x, weight, bias)  # torch's dispatcher and back takes longer than a small matmul


def int4_dequantize(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K) in ``dtype``: the bits of ``qat.numerics.dequantize``."""
    w = weight
    if w.scale.requires_grad or torch.compiler.is_compiling() or not _is_plain(w.words):
        return torch.ops.qat.int4_dequantize(*w.tensors(), *w.sizes(), dtype)
    return _matrix(weight, dtype)


def int4_linear_reference(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """Return what ``int4_linear`` returns, in torch.

    In float32 the products of 16-bit operands are exact, so this differs from a kernel by the order of the sum alone.
    """
    w = int4_dequantize_reference(weight, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), w.float(), None if bias is None else bias.float()).to(x.dtype)


def int4_dequantize_reference(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Return what ``int4_dequantize`` returns, in torch."""
    if weight.nest is not None:
        scale = nested_scale_reference(weight.scale, weight.nest, weight.out_features)
        weight = weight._replace(scale=scale, nest=None)
    packed, scale, zero_point = weight.checkpoint()
    if weight.levels is None:
        return dequantize(unpack(packed, 4, weight.in_features), scale, dtype, zero_point)
    return codebook.dequantize(unpack(packed, 4, weight.in_features, 0), scale, weight.levels[None], dtype)


def backend(device: torch.device) -> str:
    """Return what ``int4_linear`` runs on ``device``: "triton", "triton interpreter" or "torch reference"."""
    if int4_run is None:
        return "torch reference"
    if INTERPRETED.value:
        return "triton interpreter"
    return "triton" if device.type in ("cuda", "xpu") else "torch reference"


def _is_plain(x: Tensor) -> bool:
    """Return whether x is a tensor to everyone and no more: no subclass, dispatch mode, functorch transform, trace."""
    modes = torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None
    return type(x) is Tensor and not modes and not torch._C._is_tracing()


def _product(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    y = None if int4_run is None else int4_run.int4_recipe.repeat(x, weight, bias)
    if y is not None:
        return y
    check(x, weight, bias)
    if backend(x.device) == "torch reference":
        return int4_linear_reference(x, weight, bias)
    if not x.is_contiguous() or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    if bias is not None and (not bias.is_contiguous() or bias.data_ptr() % 16):
        bias = bias.clone(memory_format=torch.contiguous_format)
    return int4_run.multiply(x, weight, bias)


def _matrix(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    if backend(weight.words.device) == "torch reference":
        return int4_dequantize_reference(weight, dtype)
    return int4_run.dequantized(weight, dtype)


def _setup_context(ctx, inputs, output) -> None:
    _, *tensors, bias, out_features, in_features, group_size = inputs
    if ctx.needs_input_grad[2]:
        raise LayerError("int4_linear has no gradient for its scale: the weight is frozen; pass scale.detach()")
    ctx.save_for_backward(*tensors)
    ctx.sizes = out_features, in_features, group_size
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad_y: Tensor):
    """grad_x = grad_y @ W with W in the dtype of x; grad_bias = the sum of grad_y over tokens, in float32."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        matrix = int4_dequantize(Int4Weight.of(*ctx.saved_tensors, *ctx.sizes), grad_y.dtype)
        with torch.autocast(grad_y.device.type, enabled=False):
            grad_x = grad_y @ matrix
    if ctx.needs_input_grad[6]:
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, None, grad_bias, None, None, None


_library = torch.library.Library("qat", "FRAGMENT")
_library.define(f"int4_linear(Tensor x, {TENSORS}, Tensor? bias, {SIZES}) -> Tensor")
_library.define(f"int4_dequantize({TENSORS}, {SIZES}, ScalarType dtype) -> Tensor")


@torch.library.impl(_library, "int4_linear", "CompositeExplicitAutograd")
def _linear_impl(x, words, scale, zero_point, levels, nest, bias, *sizes):
    return _product(x, Int4Weight.of(words, scale, zero_point, levels, nest, *sizes), bias)


@torch.library.impl(_library, "int4_dequantize", "CompositeExplicitAutograd")
def _dequantize_impl(*arguments):
    *weight, dtype = arguments
    return _matrix(Int4Weight.of(*weight), dtype)


@torch.library.register_fake("qat::int4_linear", lib=_library)
def _linear_fake(x, words, scale, zero_point, levels, nest, bias, *sizes):
    weight = Int4Weight.of(words, scale, zero_point, levels, nest, *sizes)
    check(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.out_features)


@torch.library.register_fake("qat::int4_dequantize", lib=_library)
def _dequantize_fake(words, scale, zero_point, levels, nest, out_features, in_features, group_size, dtype):
    return words.new_empty(out_features, in_features, dtype=dtype)


torch.library.register_autograd("qat::int4_linear", _backward, setup_context=_setup_context, lib=_library)


def check(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> None:
    """Raise LayerError for what ``int4_linear`` does not take: a kernel would read past the ends of its arguments."""
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
    scale = weight.scale if weight.nest is None else weight.nest
    for name, tensor in (("x", x), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise LayerError(f"{name} is {tensor.dtype}: cast it to bfloat16, float16 or float32")
    if weight.zero_point is not None and weight.zero_point.dtype not in (torch.int8, *_FLOATS):
        raise LayerError(f"zero_point is {weight.zero_point.dtype}: cast it to int8, bfloat16, float16 or float32")
    if weight.levels is not None and (weight.zero_point is not None or weight.levels.shape != (16,)):
        raise LayerError(f"a codebook has 16 levels and no zero point, not {tuple(weight.levels.shape)}")
    if weight.nest is not None:
        count = 1 + LEVELS + -(-n * groups // BLOCK)
        if weight.scale.dtype != torch.uint8 or weight.nest.shape != (count,):
            found = f"{weight.scale.dtype} and {tuple(weight.nest.shape)}"
            raise LayerError(f"nested scales are uint8, and ({count},) that make scales of them, not {found}")
    names = "words", "scale", "zero_point", "levels", "nest"
    tensors = [(name, getattr(weight, name)) for name in names] + [("bias", bias)]
    for name, tensor in tensors:
        if tensor is not None and tensor.device != x.device:
            raise LayerError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
