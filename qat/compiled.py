"""fake_quantize, round_dynamic and the product of fake-quant layers as operators that torch.compile keeps whole.

Inductor's generated code rounds differently from eager PyTorch: it drops float32 -> bf16 -> float32 casts, so the step
size would not be rounded to the stored scale, and on a GPU it divides approximately. Either changes codes, and the
model that trained would not be the one that ships. Calling the eager arithmetic as one operator keeps every bit.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import codebook, numerics
from .layers import product as products
from .layers.product import Convolution
from .quantizers import asymmetric, dynamic, lsq_plus, minmax, pact
from .quantizers.rounding import Rounding
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


def codebook_fake_quantize(x: Tensor, shape: tuple[int, int], levels: Tensor, scale_levels: Tensor | None) -> Tensor:
    """Do what ``codebook.fake_quantize`` does, inside a compiled graph."""
    return _codebook(x, *shape, levels, scale_levels)


@torch.library.custom_op("qat::codebook_fake_quantize", mutates_args=())
def _codebook(x: Tensor, rows: int, groups: int, levels: Tensor, scale_levels: Tensor | None) -> Tensor:
    return codebook.fake_quantized(x, (rows, groups), levels, scale_levels)


@_codebook.register_fake
def _(x, rows, groups, levels, scale_levels):
    return torch.empty_like(x)


_codebook.register_autograd(lambda ctx, grad_output: (grad_output, None, None, None, None))


def by_rule(
    rule: ModuleType, x: Tensor, step_size: Tensor, offset: Tensor | None, spec: QuantSpec, grad_scale: float
) -> Tensor:
    """Do what ``quantizers.rules.fake_quantize`` does, inside a compiled graph."""
    grid = spec.bits, spec.signed is not False, spec.scale_dtype.value
    return _by_rule(x, step_size, offset, rule.__name__, *grid, grad_scale)


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
    y = _RULES[rule].fake_quantized(x, step_size, offset, _spec(bits, signed, scale_dtype))
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
    spec = _spec(bits, signed, scale_dtype)
    grad_x, *others = _RULES[rule].gradients(grad_output, x, step_size, offset, spec, grad_scale)
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
_RULES = {rule.__name__: rule for rule in (asymmetric, lsq_plus, pact)}


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


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_rounding: Rounding | None,
    weight_rounding: Rounding | None,
    convolution: Convolution | None,
    dtype: torch.dtype,
) -> Tensor:
    """Do what ``layers.product.product`` does, inside a compiled graph."""
    steps = [None if rounding is None else rounding.step_size for rounding in (x_rounding, weight_rounding)]
    how = *_flat(x_rounding), *_flat(weight_rounding), _flat_convolution(convolution), dtype
    return _product(x, weight, bias, *steps, *how)


def _flat(rounding: Rounding | None) -> tuple[str, int, bool, float]:
    """Return a rounding without its step size as what an operator takes: (kind, bits, signed, gradient scale)."""
    if rounding is None:
        return "", 0, False, 1.0
    if rounding.step_size is None:
        return rounding.grid.value, 0, False, 1.0
    grid = rounding.grid
    return grid.scale_dtype.value, grid.bits, grid.signed is not False, rounding.grad_scale


def _rounding(step_size: Tensor | None, kind: str, bits: int, signed: bool, grad_scale: float) -> Rounding | None:
    if step_size is None:
        return Rounding(Dynamic(kind)) if kind else None
    return Rounding(_spec(bits, signed, kind), step_size, grad_scale)


def _flat_convolution(convolution: Convolution | None) -> list[int]:
    if convolution is None:
        return []
    return [*convolution.stride, *convolution.padding, *convolution.dilation, convolution.groups]


def _convolution(flat: list[int]) -> Convolution | None:
    return Convolution(flat[0:2], flat[2:4], flat[4:6], flat[6]) if flat else None


@torch.library.custom_op("qat::product", mutates_args=())
def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_step: Tensor | None,
    weight_step: Tensor | None,
    x_kind: str,
    x_bits: int,
    x_signed: bool,
    x_grad_scale: float,
    weight_kind: str,
    weight_bits: int,
    weight_signed: bool,
    weight_grad_scale: float,
    convolution: list[int],
    dtype: torch.dtype,
) -> Tensor:
    x_rounding = _rounding(x_step, x_kind, x_bits, x_signed, x_grad_scale)
    weight_rounding = _rounding(weight_step, weight_kind, weight_bits, weight_signed, weight_grad_scale)
    y = products.value(x, weight, bias, x_rounding, weight_rounding, _convolution(convolution), dtype)
    return y.contiguous(memory_format=_memory_format(x))


@torch.library.custom_op("qat::product_backward", mutates_args=())
def _product_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    x_step: Tensor | None,
    weight_step: Tensor | None,
    wanted: list[bool],
    x_kind: str,
    x_bits: int,
    x_signed: bool,
    x_grad_scale: float,
    weight_kind: str,
    weight_bits: int,
    weight_signed: bool,
    weight_grad_scale: float,
    convolution: list[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    x_rounding = _rounding(x_step, x_kind, x_bits, x_signed, x_grad_scale)
    weight_rounding = _rounding(weight_step, weight_kind, weight_bits, weight_signed, weight_grad_scale)
    how = _convolution(convolution), dtype, tuple(wanted)
    grads = products.gradients(grad, x, weight, x_rounding, weight_rounding, *how)
    layouts = _gradient_layouts(grad, x, weight, x_step, weight_step, wanted)
    made = [made for made in grads if made is not None]
    return [
        made if (made.dtype, made.stride()) == (layout.dtype, layout.stride()) else layout.copy_(made)
        for made, layout in zip(made, layouts, strict=True)
    ]


@_product.register_fake
def _(x, weight, bias, x_step, weight_step, *how):
    convolution, dtype = _convolution(how[-2]), how[-1]
    x, weight = torch.empty_like(x, dtype=dtype), torch.empty_like(weight, dtype=dtype)
    return products.multiply(x, weight, bias, convolution).contiguous(memory_format=_memory_format(x))


@_product_backward.register_fake
def _(grad, x, weight, x_step, weight_step, wanted, *how):
    return _gradient_layouts(grad, x, weight, x_step, weight_step, wanted)


def _gradient_layouts(grad, x, weight, x_step, weight_step, wanted) -> list[Tensor]:
    """Return an empty tensor like each gradient that is wanted."""
    bias = grad.new_empty(weight.shape[0]) if wanted[2] else None
    return [
        torch.empty_like(like)
        for like, is_wanted in zip((x, weight, bias, x_step, weight_step), wanted, strict=True)
        if is_wanted
    ]


def _memory_format(x: Tensor) -> torch.memory_format:
    in_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if in_channels_last else torch.contiguous_format


def _keep_product(ctx, inputs, output) -> None:
    x, weight, _, x_step, weight_step, *ctx.how = inputs
    ctx.save_for_backward(x, weight, x_step, weight_step)


def _product_gradients(ctx, grad: Tensor):
    wanted = list(ctx.needs_input_grad[:5])
    grads = iter(_product_backward(grad, *ctx.saved_tensors, wanted, *ctx.how))
    return *(next(grads) if is_wanted else None for is_wanted in wanted), *(None for _ in ctx.how)


_product.register_autograd(_product_gradients, setup_context=_keep_product)
