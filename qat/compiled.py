"""Fake quantization, of every kind, as operators that torch.compile keeps whole.

Inductor's generated code rounds differently from eager PyTorch: it drops float32 -> bf16 -> float32 casts, so the step
size would not be rounded to the stored scale, and on a GPU it divides approximately. Either changes codes, and the
model that trained would not be the one that ships. Calling the eager arithmetic as one operator keeps every bit.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import codebook, numerics
from .quantizers import dynamic, lsq_plus, minmax, pact
from .spec import Dynamic, QuantSpec


def fake_quantize(
    x: Tensor, step_size: Tensor, spec: QuantSpec, grad_scale: float, zero_point: Tensor | None
) -> Tensor:
    """Do what ``numerics.fake_quantize`` does, inside a compiled graph."""
    return _forward(x, step_size, zero_point, *flat(spec), grad_scale)


def flat(spec: QuantSpec) -> tuple[int, bool, str, str]:
    """Return what ``grid`` takes."""
    real = "" if spec.zero_point_dtype is None else spec.zero_point_dtype.value
    return spec.bits, spec.signed is not False, spec.scale_dtype.value, real


@cache
def grid(bits: int, signed: bool, scale_dtype: str, zero_point_dtype: str = "") -> QuantSpec:
    """Return a spec with what the arithmetic reads; the granularity is in the step size's shape."""
    real = {"symmetric": False, "zero_point_dtype": zero_point_dtype} if zero_point_dtype else {}
    return QuantSpec(bits=bits, signed=signed, scale_dtype=scale_dtype, **real)


@torch.library.custom_op("qat::fake_quantize", mutates_args=())
def _forward(
    x: Tensor,
    step_size: Tensor,
    zero_point: Tensor | None,
    bits: int,
    signed: bool,
    scale_dtype: str,
    zero_point_dtype: str,
    grad_scale: float,
) -> Tensor:
    spec = grid(bits, signed, scale_dtype, zero_point_dtype)
    return numerics.arithmetic(x, step_size).fake_quantized(x, step_size, spec, x.dtype, zero_point)


@torch.library.custom_op("qat::fake_quantize_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    x: Tensor,
    step_size: Tensor,
    zero_point: Tensor | None,
    bits: int,
    signed: bool,
    scale_dtype: str,
    zero_point_dtype: str,
    grad_scale: float,
) -> tuple[Tensor, Tensor]:
    how = grid(bits, signed, scale_dtype, zero_point_dtype), grad_scale, (True, True), zero_point
    grad_x, grad_step = numerics.arithmetic(x, step_size).fake_quantize_gradients(grad_output, x, step_size, *how)
    layout = _layout(x, step_size)
    return grad_x if grad_x.stride() == layout.stride() else layout.copy_(grad_x), grad_step


@_forward.register_fake
def _(x, step_size, *how):
    return _layout(x, step_size)


@_backward.register_fake
def _(grad_output, x, step_size, *how):
    return _layout(x, step_size), torch.empty_like(step_size)


def _layout(x: Tensor, step_size: Tensor) -> Tensor:
    """Return an empty tensor like the fake-quantized x."""
    return x.new_empty(x.shape) if step_size.shape[1] > 1 else torch.empty_like(x)


def _keep(ctx, inputs, output) -> None:
    x, step_size, zero_point, *ctx.grid = inputs
    ctx.save_for_backward(x, step_size, zero_point)


def _gradients(ctx, grad_output: Tensor):
    grad_x, grad_step = _backward(grad_output, *ctx.saved_tensors, *ctx.grid)
    return grad_x, grad_step, *(None for _ in range(6))


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


def codebook_fake_quantize(x: Tensor, shape: tuple[int, int], levels: Tensor, scale_levels: Tensor | None) -> Tensor:
    """Do what ``codebook.fake_quantize`` does, inside a compiled graph."""
    return _codebook(x, *shape, levels, scale_levels)


@torch.library.custom_op("qat::round_to_codebook", mutates_args=())
def _codebook(x: Tensor, rows: int, groups: int, levels: Tensor, scale_levels: Tensor | None) -> Tensor:
    return codebook.fake_quantized(x, (rows, groups), levels, scale_levels).contiguous()


@_codebook.register_fake
def _(x, rows, groups, levels, scale_levels):
    return x.new_empty(x.shape)


_codebook.register_autograd(lambda ctx, grad_output: (grad_output, None, None, None, None))


def by_rule(
    rule: ModuleType, x: Tensor, step_size: Tensor, offset: Tensor | None, spec: QuantSpec, grad_scale: float
) -> Tensor:
    """Do what ``quantizers.rules.fake_quantize`` does, inside a compiled graph."""
    return _by_rule(x, step_size, offset, rule.__name__, *flat(spec)[:3], grad_scale)


@torch.library.custom_op("qat::fake_quantize_by_rule", mutates_args=())
def _by_rule(
    x: Tensor,
    step_size: Tensor,
    offset: Tensor | None,
    rule: str,
    bits: int,
    signed: bool,
    scale_dtype: str,
    grad_scale: float,
) -> Tensor:
    y = RULES[rule].fake_quantized(x, step_size, offset, grid(bits, signed, scale_dtype))
    layout = _layout(x, step_size)
    return y if y.stride() == layout.stride() else layout.copy_(y)


@torch.library.custom_op("qat::fake_quantize_by_rule_backward", mutates_args=())
def _by_rule_backward(
    grad_output: Tensor,
    x: Tensor,
    step_size: Tensor,
    offset: Tensor | None,
    rule: str,
    bits: int,
    signed: bool,
    scale_dtype: str,
    grad_scale: float,
) -> list[Tensor]:
    spec = grid(bits, signed, scale_dtype)
    grad_x, *others = RULES[rule].gradients(grad_output, x, step_size, offset, spec, grad_scale)
    layout = _layout(x, step_size)
    grad_x = grad_x if grad_x.stride() == layout.stride() else layout.copy_(grad_x)
    return [grad_x, *(grad for grad in others if grad is not None)]


@_by_rule.register_fake
def _(x, step_size, offset, *how):
    return _layout(x, step_size)


@_by_rule_backward.register_fake
def _(grad_output, x, step_size, offset, rule, *how):
    learned = [step_size, offset] if rule == lsq_plus.__name__ else [step_size]
    return [_layout(x, step_size), *map(torch.empty_like, learned)]


def _keep_by_rule(ctx, inputs, output) -> None:
    *tensors, ctx.rule = inputs[:4]
    ctx.save_for_backward(*tensors)
    ctx.how = inputs[4:]


def _by_rule_gradients(ctx, grad_output: Tensor):
    grads = _by_rule_backward(grad_output, *ctx.saved_tensors, ctx.rule, *ctx.how)
    return *grads, *(None for _ in range(8 - len(grads)))


_by_rule.register_autograd(_by_rule_gradients, setup_context=_keep_by_rule)
RULES = {rule.__name__: rule for rule in (lsq_plus, pact)}


def minmax_fake_quantize(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Do what ``quantizers.minmax.fake_quantize`` does, inside a compiled graph."""
    group_size = spec.group_size or 0
    return _minmax(weight, spec.bits, spec.granularity.value, group_size, spec.symmetric, spec.scale_dtype.value)


@torch.library.custom_op("qat::minmax_fake_quantize", mutates_args=())
def _minmax(weight: Tensor, bits: int, granularity: str, group_size: int, symmetric: bool, scale_dtype: str) -> Tensor:
    where = {"granularity": granularity, "group_size": group_size or None}
    spec = QuantSpec(bits=bits, **where, signed=True, symmetric=symmetric, scale_dtype=scale_dtype)
    y = minmax.fake_quantized(weight, spec)
    layout = torch.empty_like(weight)
    return y if y.stride() == layout.stride() else layout.copy_(y)


@_minmax.register_fake
def _(weight, *spec):
    return torch.empty_like(weight)


_minmax.register_autograd(lambda ctx, grad_output: (grad_output, *(None,) * 5))


def moved_zero_point(
    a: Tensor, b: Tensor, scale: Tensor, zero_point: Tensor | None, scaling: float, spec: QuantSpec
) -> Tensor:
    """Do what ``layers.qa_lora.moved_zero_point`` does, inside a compiled graph."""
    return _moved(a, b, scale, zero_point, scaling, spec.zero_point_dtype.value)


@torch.library.custom_op("qat::moved_zero_point", mutates_args=())
def _moved(a: Tensor, b: Tensor, scale: Tensor, zero_point: Tensor | None, scaling: float, dtype: str) -> Tensor:
    from .layers import qa_lora

    spec = QuantSpec(symmetric=False, zero_point_dtype=dtype)
    return qa_lora.moved_zero_point(a, b, scale, zero_point, scaling, spec)


@_moved.register_fake
def _(a, b, scale, zero_point, scaling, dtype):
    return a.new_empty(b.shape[0], a.shape[1], dtype=getattr(torch, dtype))
