"""The product of a fake-quant layer as an operator that torch.compile keeps whole: see ``qat.compiled``."""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import grid
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
    steps = [None if rounding is None else rounding.step_size for rounding in (x_rounding, weight_rounding)]
    how = *_flat(x_rounding), *_flat(weight_rounding), _flat_convolution(convolution), dtype
    return _product(x, weight, bias, *steps, *how)


def _flat(rounding: Rounding | None) -> tuple[str, int, bool, float]:
    """Return a rounding without its step size as what an operator takes: (kind, bits, signed, gradient scale)."""
    if rounding is None:
        return "", 0, False, 1.0
    if rounding.step_size is None:
        return rounding.grid.value, 0, False, 1.0
    spec = rounding.grid
    return spec.scale_dtype.value, spec.bits, spec.signed is not False, rounding.grad_scale


def _rounding(step_size: Tensor | None, kind: str, bits: int, signed: bool, grad_scale: float) -> Rounding | None:
    if step_size is None:
        return Rounding(Dynamic(kind)) if kind else None
    return Rounding(grid(bits, signed, kind), step_size, grad_scale)


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
    return CHANNELS_LAST[x.dim()] if in_channels_last(x) else torch.contiguous_format


def _keep_product(ctx, inputs, output) -> None:
    x, weight, _, x_step, weight_step, *ctx.how = inputs
    ctx.save_for_backward(x, weight, x_step, weight_step)


def _product_gradients(ctx, grad: Tensor):
    wanted = list(ctx.needs_input_grad[:5])
    grads = iter(_product_backward(grad, *ctx.saved_tensors, wanted, *ctx.how))
    return *(next(grads) if is_wanted else None for is_wanted in wanted), *(None for _ in ctx.how)


_product.register_autograd(_product_gradients, setup_context=_keep_product)
