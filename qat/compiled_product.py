"""The product of a fake-quant layer as an operator that torch.compile keeps whole: see ``qat.compiled``.

Dynamo sees ``qat::product``. While that is traced it becomes an autograd function of two operators, one each way, and
these alone are in a compiled graph: autograd does not know them. An operator that it knows, as
``torch.library.custom_op`` makes one, goes through Python twice at each call, which takes longer than a launch.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .compiled import RULES, flat, grid
from .layers import product as products
from .layers.conv import CHANNELS_LAST, in_channels_last
from .layers.product import Convolution
from .once import no_view
from .quantizers.rounding import Rounding
from .spec import Dynamic


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
    how = *_flat(x_rounding), *_flat(weight_rounding), _flat_convolution(convolution), dtype
    return torch.ops.qat.product(x, weight, bias, *products.tensors_of(x_rounding, weight_rounding), *how)


def _flat(rounding: Rounding | None) -> tuple[str, float]:
    """Return a rounding without its tensors as what an operator takes: (words, gradient scale)."""
    if rounding is None:
        return "", 1.0
    if rounding.step_size is None:
        return rounding.grid.value, 1.0
    bits, signed, scale_dtype, zero_point_dtype = flat(rounding.grid)
    rule = "" if rounding.rule is None else rounding.rule.__name__
    return f"{bits},{signed:d},{scale_dtype},{zero_point_dtype},{rule}", rounding.grad_scale


def _flat_convolution(convolution: Convolution | None) -> list[int]:
    if convolution is None:
        return []
    return [*convolution.stride, *convolution.padding, *convolution.dilation, convolution.groups]


class _How(NamedTuple):
    """What the operators that run read in their words.

    Attributes:
        x, weight: the roundings, without their tensors and gradient scales.
    """

    x: Rounding | None
    weight: Rounding | None
    convolution: Convolution | None
    dtype: torch.dtype


@cache
def _how(words: str) -> _How:
    x, weight, convolution, dtype = words.split(";")
    return _How(_rounding(x), _rounding(weight), _convolution(convolution), getattr(torch, dtype))


def _rounding(words: str) -> Rounding | None:
    if "," not in words:
        return Rounding(Dynamic(words)) if words else None
    bits, signed, *dtypes, rule = words.split(",")
    return Rounding(grid(int(bits), signed == "1", *dtypes), rule=RULES.get(rule))


def _convolution(words: str) -> Convolution | None:
    if not words:
        return None
    *flat, groups = map(int, words.split(","))
    n = len(flat) // 3
    return Convolution(flat[:n], flat[n : 2 * n], flat[2 * n :], groups)


def _with_tensors(rounding: Rounding | None, step_size: Tensor | None, grad_scale: float, offset: Tensor | None):
    if step_size is None:
        return rounding
    return Rounding(rounding.grid, step_size, grad_scale, offset, rounding.rule)


_library = torch.library.Library("qat", "FRAGMENT")
_ROUNDED = "Tensor? x_step, Tensor? weight_step, Tensor? x_offset, Tensor? weight_offset"
_library.define(
    f"product(Tensor x, Tensor weight, Tensor? bias, {_ROUNDED}, str x_words, float x_grad_scale, str weight_words, "
    "float weight_grad_scale, int[] convolution, ScalarType dtype) -> Tensor"
)
_library.define(f"product_value(Tensor x, Tensor weight, Tensor? bias, {_ROUNDED}, str how) -> Tensor")
_library.define(
    f"product_gradients(Tensor grad, Tensor? x, Tensor weight, {_ROUNDED}, str how, float x_grad_scale, "
    "float weight_grad_scale, str wanted) -> Tensor[]"
)


@torch.library.impl(_library, "product", "CompositeImplicitAutograd")
def _product(*arguments) -> Tensor:
    """Become what autograd sees of the product, while it is traced."""
    *tensors, x_words, x_grad_scale, weight_words, weight_grad_scale, convolution, dtype = arguments
    how = ";".join((x_words, weight_words, ",".join(map(str, convolution)), str(dtype).removeprefix("torch.")))
    return _Product.apply(*tensors, how, x_grad_scale, weight_grad_scale)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, x_step, weight_step, x_offset, weight_offset, how, *grad_scales) -> Tensor:
        tensors = x_step, weight_step, x_offset, weight_offset
        of_x, _, convolution, _ = _how(how)
        kept = x if products.takes_x(of_x, convolution, ctx.needs_input_grad) else None
        ctx.save_for_backward(kept, weight, *tensors)
        ctx.how = how, *grad_scales
        return torch.ops.qat.product_value(x, weight, bias, *tensors, how)

    @staticmethod
    def backward(ctx, grad: Tensor):
        wanted = ctx.needs_input_grad[:7]
        words = "".join("1" if is_wanted else "0" for is_wanted in wanted)
        grads = iter(torch.ops.qat.product_gradients(grad, *ctx.saved_tensors, *ctx.how, words))
        return *(next(grads) if is_wanted else None for is_wanted in wanted), None, None, None


@torch.library.impl(_library, "product_value", "CompositeExplicitAutograd")
def _value(x, weight, bias, x_step, weight_step, x_offset, weight_offset, how) -> Tensor:
    of_x, of_weight, convolution, dtype = _how(how)
    roundings = _with_tensors(of_x, x_step, 1.0, x_offset), _with_tensors(of_weight, weight_step, 1.0, weight_offset)
    y = products.value(x, weight, bias, *roundings, convolution, dtype)
    return no_view(y.contiguous(memory_format=_memory_format(x)))


@torch.library.impl(_library, "product_gradients", "CompositeExplicitAutograd")
def _gradients(
    grad, x, weight, x_step, weight_step, x_offset, weight_offset, how, x_grad_scale, weight_grad_scale, wanted
) -> list[Tensor]:
    of_x, of_weight, convolution, dtype = _how(how)
    of_x = _with_tensors(of_x, x_step, x_grad_scale, x_offset)
    of_weight = _with_tensors(of_weight, weight_step, weight_grad_scale, weight_offset)
    wanted = tuple(word == "1" for word in wanted)
    grads = products.gradients(grad, x, weight, of_x, of_weight, convolution, dtype, wanted)
    likes = x, weight, None, x_step, weight_step, x_offset, weight_offset
    return [
        made.contiguous() if like is None else _laid_out_as(like, made)
        for made, like, is_wanted in zip(grads, likes, wanted, strict=True)
        if is_wanted
    ]


def _laid_out_as(like: Tensor, made: Tensor) -> Tensor:
    """Return a gradient in the dtype and layout that ``empty_like`` gives it in a traced graph."""
    if made.dtype == like.dtype and made.stride() == like.stride():
        return made
    layout = torch.empty_like(like)
    return made if (made.dtype, made.stride()) == (layout.dtype, layout.stride()) else layout.copy_(made)


@torch.library.register_fake("qat::product_value", lib=_library)
def _(x, weight, bias, x_step, weight_step, x_offset, weight_offset, how):
    _, _, convolution, dtype = _how(how)
    x, weight = torch.empty_like(x, dtype=dtype), torch.empty_like(weight, dtype=dtype)
    return products.multiply(x, weight, bias, convolution).contiguous(memory_format=_memory_format(x))


@torch.library.register_fake("qat::product_gradients", lib=_library)
def _(grad, x, weight, x_step, weight_step, x_offset, weight_offset, how, x_grad_scale, weight_grad_scale, wanted):
    bias = grad.new_empty(weight.shape[0])
    x = grad.new_empty(*grad.shape[:-1], weight.shape[1]) if x is None else x
    likes = x, weight, bias, x_step, weight_step, x_offset, weight_offset
    return [torch.empty_like(like) for like, word in zip(likes, wanted, strict=True) if word == "1"]


def _memory_format(x: Tensor) -> torch.memory_format:
    return CHANNELS_LAST[x.dim()] if in_channels_last(x) else torch.contiguous_format
