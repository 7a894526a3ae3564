"""fake_quantize and round_dynamic as operators that torch.compile keeps whole.

Inductor's generated code rounds differently from eager PyTorch: it drops float32 -> bf16 -> float32 casts, so the step
size would not be rounded to the stored scale, and on a GPU it divides approximately. Either changes codes, and the
model that trained would not be the one that ships. Calling the eager arithmetic as one operator keeps every bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import numerics
from .quantizers import dynamic
from .spec import Dynamic, QuantSpec


def fake_quantize(x: Tensor, step_size: Tensor, spec: QuantSpec, grad_scale: float) -> Tensor:
    """Do what ``numerics.fake_quantize`` does, inside a compiled graph."""
    return _forward(x, step_size, spec.bits, spec.signed is not False, spec.scale_dtype.value, grad_scale)


def _spec(bits: int, signed: bool, scale_dtype: str) -> QuantSpec:
    """Return a spec with what the arithmetic reads; the granularity is in the step size's shape."""
    return QuantSpec(bits=bits, signed=signed, scale_dtype=scale_dtype)


@torch.library.custom_op("qat::fake_quantize", mutates_args=())
def _forward(x: Tensor, step_size: Tensor, bits: int, signed: bool, scale_dtype: str, grad_scale: float) -> Tensor:
    return numerics.arithmetic(x, step_size).fake_quantized(x, step_size, _spec(bits, signed, scale_dtype))


@torch.library.custom_op("qat::fake_quantize_backward", mutates_args=())
def _backward(
    grad_output: Tensor, x: Tensor, step_size: Tensor, bits: int, signed: bool, scale_dtype: str, grad_scale: float
) -> tuple[Tensor, Tensor]:
    spec = _spec(bits, signed, scale_dtype)
    gradients = numerics.arithmetic(x, step_size).fake_quantize_gradients
    grad_x, grad_step = gradients(grad_output, x, step_size, spec, grad_scale)
    layout = _layout(x, step_size)
    return grad_x if grad_x.stride() == layout.stride() else layout.copy_(grad_x), grad_step


@_forward.register_fake
def _(x, step_size, bits, signed, scale_dtype, grad_scale):
    return _layout(x, step_size)


@_backward.register_fake
def _(grad_output, x, step_size, bits, signed, scale_dtype, grad_scale):
    return _layout(x, step_size), torch.empty_like(step_size)


def _layout(x: Tensor, step_size: Tensor) -> Tensor:
    """Return an empty tensor like the fake-quantized x."""
    return x.new_empty(x.shape) if step_size.shape[1] > 1 else torch.empty_like(x)


def _keep(ctx, inputs, output) -> None:
    x, step_size, *ctx.grid = inputs
    ctx.save_for_backward(x, step_size)


def _gradients(ctx, grad_output: Tensor):
    grad_x, grad_step = _backward(grad_output, *ctx.saved_tensors, *ctx.grid)
    return grad_x, grad_step, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def round_dynamic(x: Tensor, kind: Dynamic) -> Tensor:
    """Do what ``quantizers.dynamic.round_dynamic`` does, inside a compiled graph."""
    return _round(x, kind.value)


@torch.library.custom_op("qat::round_dynamic", mutates_args=())
def _round(x: Tensor, kind: str) -> Tensor:
    return dynamic.arithmetic(x).rounded(x, Dynamic(kind)).contiguous()


@torch.library.custom_op("qat::round_dynamic_backward", mutates_args=())
def _round_backward(grad_output: Tensor, x: Tensor, kind: str) -> Tensor:
    return dynamic.arithmetic(x).rounded_gradient(grad_output, x, Dynamic(kind)).contiguous()


@_round.register_fake
def _(x, kind):
    return x.new_empty(x.shape)


@_round_backward.register_fake
def _(grad_output, x, kind):
    return x.new_empty(x.shape)


def _keep_input(ctx, inputs, output) -> None:
    x, ctx.kind = inputs
    ctx.save_for_backward(x)


def _round_gradients(ctx, grad_output: Tensor):
    return _round_backward(grad_output, *ctx.saved_tensors, ctx.kind), None


_round.register_autograd(_round_gradients, setup_context=_keep_input)
