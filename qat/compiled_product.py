"""The product of a fake-quant layer as an operator that torch.compile keeps whole: see ``qat.compiled``."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .compiled import RULES, flat, grid
from .layers import product as products
from .layers.conv import CHANNELS_LAST, in_channels_last
from .layers.product import Convolution
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
    return _product(x, weight, bias, *products.tensors_of(x_rounding, weight_rounding), *how)


def _flat(rounding: Rounding | None) -> tuple[str, float]:
    """Return a rounding without its tensors as what an operator takes: (words, gradient scale)."""
    if rounding is None:
        return "", 1.0
    if rounding.step_size is None:
        return rounding.grid.value, 1.0
    bits, signed, scale_dtype, zero_point_dtype = flat(rounding.grid)
    rule = "" if rounding.rule is None else rounding.rule.__name__
    return f"{bits},{signed:d},{scale_dtype},{zero_point_dtype},{rule}", rounding.grad_scale


@cache
def _rounding(words: str) -> Rounding | None:
    """Return the rounding that is meant, without its tensors and gradient scale."""
    if "," not in words:
        return Rounding(Dynamic(words)) if words else None
    bits, signed, *dtypes, rule = words.split(",")
    return Rounding(grid(int(bits), signed == "1", *dtypes), rule=RULES.get(rule))


def _roundings(tensors: list[Tensor | None], words: tuple[str, str], grad_scales: tuple[float, float]):
    """Return the roundings of x and the weight."""
    parts = zip(map(_rounding, words), tensors[:2], grad_scales, tensors[2:], strict=True)
    return [
        rounding if step is None else rounding._replace(step_size=step, grad_scale=grad_scale, offset=offset)
        for rounding, step, grad_scale, offset in parts
    ]


def _flat_convolution(convolution: Convolution | None) -> list[int]:
    if convolution is None:
        return []
    return [*convolution.stride, *convolution.padding, *convolution.dilation, convolution.groups]


def _convolution(flat: list[int]) -> Convolution | None:
    if not flat:
        return None
    n = len(flat) // 3
    return Convolution(flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], flat[-1])


@torch.library.custom_op("qat::product", mutates_args=())
def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_step: Tensor | None,
    weight_step: Tensor | None,
    x_offset: Tensor | None,
    weight_offset: Tensor | None,
    x_words: str,
    x_grad_scale: float,
    weight_words: str,
    weight_grad_scale: float,
    convolution: list[int],
    dtype: torch.dtype,
) -> Tensor:
    tensors = [x_step, weight_step, x_offset, weight_offset]
    roundings = _roundings(tensors, (x_words, weight_words), (x_grad_scale, weight_grad_scale))
    y = products.value(x, weight, bias, *roundings, _convolution(convolution), dtype)
    return y.contiguous(memory_format=_memory_format(x))


@torch.library.custom_op("qat::product_backward", mutates_args=())
def _product_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    x_step: Tensor | None,
    weight_step: Tensor | None,
    x_offset: Tensor | None,
    weight_offset: Tensor | None,
    wanted: list[bool],
    x_words: str,
    x_grad_scale: float,
    weight_words: str,
    weight_grad_scale: float,
    convolution: list[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    tensors = [x_step, weight_step, x_offset, weight_offset]
    roundings = _roundings(tensors, (x_words, weight_words), (x_grad_scale, weight_grad_scale))
    grads = products.gradients(grad, x, weight, *roundings, _convolution(convolution), dtype, tuple(wanted))
    layouts = _gradient_layouts(grad, x, weight, tensors, wanted)
    made = [made for made in grads if made is not None]
    return [
        made if (made.dtype, made.stride()) == (layout.dtype, layout.stride()) else layout.copy_(made)
        for made, layout in zip(made, layouts, strict=True)
    ]


@_product.register_fake
def _(x, weight, bias, x_step, weight_step, x_offset, weight_offset, *how):
    convolution, dtype = _convolution(how[-2]), how[-1]
    x, weight = torch.empty_like(x, dtype=dtype), torch.empty_like(weight, dtype=dtype)
    return products.multiply(x, weight, bias, convolution).contiguous(memory_format=_memory_format(x))


@_product_backward.register_fake
def _(grad, x, weight, x_step, weight_step, x_offset, weight_offset, wanted, *how):
    return _gradient_layouts(grad, x, weight, [x_step, weight_step, x_offset, weight_offset], wanted)


def _gradient_layouts(grad, x, weight, tensors, wanted) -> list[Tensor]:
    """Return an empty tensor like each gradient that is wanted."""
    bias = grad.new_empty(weight.shape[0]) if wanted[2] else None
    return [
        torch.empty_like(like) for like, is_wanted in zip((x, weight, bias, *tensors), wanted, strict=True) if is_wanted
    ]


def _memory_format(x: Tensor) -> torch.memory_format:
    return CHANNELS_LAST[x.dim()] if in_channels_last(x) else torch.contiguous_format


def _keep_product(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2], *inputs[3:7])
    ctx.how = inputs[7:]


def _product_gradients(ctx, grad: Tensor):
    wanted = list(ctx.needs_input_grad[:7])
    grads = iter(_product_backward(grad, *ctx.saved_tensors, wanted, *ctx.how))
    return *(next(grads) if is_wanted else None for is_wanted in wanted), *(None for _ in ctx.how)


_product.register_autograd(_product_gradients, setup_context=_keep_product)
