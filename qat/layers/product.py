"""The product of a rounded input and a rounded weight, linear or convolution, as one step of autograd.

Composed of single operators, a fake-quant layer keeps its rounded input and weight for the backward, next to those that
the plain layer keeps. Here the plain layer's tensors are all that is kept: the backward rounds them again, and the pass
that does so for the input, and the one that masks the weight's gradient, work in place on gradients nobody else has.

The result, and every gradient, is that of the composition: same operators in between, same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LayerError
from ..once import Function, no_view, once
from ..quantizers.rounding import Rounding
from . import image

_SHORT = torch.bfloat16, torch.float16
_AS_IT_IS = nullcontext()
_PLAIN = Tensor, torch.nn.Parameter
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}  # by dimensions


class Convolution(NamedTuple):
    """How a convolution of 1, 2 or 3 dimensions convolves; None in its place means a linear map."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_rounding: Rounding | None,
    weight_rounding: Rounding | None,
    convolution: Convolution | None = None,
) -> Tensor:
    """Return the linear map or convolution of the rounded x and weight, in the dtype of x (autocast's, where it is on).

    Args:
        x: (..., K), or (B, C, ...) for a convolution.
        weight: (N, K), or (N, C / groups, ...).
        bias: (N,) or None.
        x_rounding: None leaves x as it is.
        weight_rounding: None leaves the weight as it is.
        convolution: None for a linear map.

    Raises:
        LayerError: x and weight are of different dtypes, without autocast.
    """
    if x_rounding is None and weight_rounding is None:
        return multiply(x, weight, bias, convolution)
    dtype, autocast = weight.dtype, autocast_dtype(x)
    if autocast is not None and torch.float64 not in (x.dtype, dtype):
        dtype = autocast
        x = x if x_rounding is not None else x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif x.dtype != dtype:
        raise LayerError(
            f"a layer's input, {list(x.shape)}, is {x.dtype}, and its weight, {list(weight.shape)}, {dtype}: cast one "
            "of them, or train under autocast"
        )
    if torch.compiler.is_dynamo_compiling():
        from .. import compiled_product, traced

        by_slopes = not x.requires_grad and image.takes(x, convolution)
        if x_rounding is not None and not by_slopes and traced.takes(x, x_rounding):
            x, x_rounding = traced.rounded(x, x_rounding, dtype), None
            if weight_rounding is None:
                return multiply(x, weight.to(dtype), bias, convolution)
        return compiled_product.product(x, weight, bias, x_rounding, weight_rounding, convolution, dtype)
    if not (type(x) in _PLAIN and type(weight) in _PLAIN):  # fake, distributed, functional
        x = x if x_rounding is None else x_rounding(widened(x))
        weight = weight if weight_rounding is None else weight_rounding(widened(weight))
        return multiply(x, weight, bias, convolution)
    how = x_rounding, weight_rounding, convolution, dtype
    return _Product.apply(x, weight, bias, *tensors_of(x_rounding, weight_rounding), how)


def tensors_of(x_rounding: Rounding | None, weight_rounding: Rounding | None) -> tuple[Tensor | None, ...]:
    """Return the step sizes of input and weight, then the offsets; None where there is none."""
    x_step = x_offset = weight_step = weight_offset = None
    if x_rounding is not None:
        x_step, x_offset = x_rounding.step_size, x_rounding.offset
    if weight_rounding is not None:
        weight_step, weight_offset = weight_rounding.step_size, weight_rounding.offset
    return x_step, weight_step, x_offset, weight_offset


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return autocast's dtype where x lies; None where it is off, and on the meta device, which has none."""
    if x.is_meta:
        return None
    device_type = "cuda" if x.is_cuda else x.device.type  # which makes a string at each call
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def widened(x: Tensor) -> Tensor:
    """Return what to round x from: float32 where x has 16 bits and autocast's dtype is another.

    A rounded tensor has the dtype of what it was made from, and autocast casts it to its own. From float32 that is the
    one rounding to the compute dtype that ``product`` does; from fp16, say, it would be a second one.
    """
    dtype = autocast_dtype(x)
    return x if dtype in (None, x.dtype) or x.dtype not in _SHORT else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context in which autocast is off where x lies; entering torch's costs more than asking."""
    return _AS_IT_IS if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def in_a_graph() -> bool:
    """Return whether what runs now is compiled, exported, traced or transformed by torch.func.

    Such graphs hold operators, no Python functions.
    """
    transformed = torch._C._are_functorch_transforms_active()
    return transformed or torch.compiler.is_compiling() or torch.jit.is_tracing()


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, convolution: Convolution | None) -> Tensor:
    """Return the plain linear map or convolution."""
    if convolution is None:
        return F.linear(x, weight, bias)
    return CONVOLUTIONS[len(convolution.stride)](x, weight, bias, *convolution)


def value(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_rounding: Rounding | None,
    weight_rounding: Rounding | None,
    convolution: Convolution | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the product in ``dtype``, without gradients."""
    with without_autocast(x):
        return multiply(_rounded(x, x_rounding, dtype), _rounded(weight, weight_rounding, dtype), bias, convolution)


def gradients(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    x_rounding: Rounding | None,
    weight_rounding: Rounding | None,
    convolution: Convolution | None,
    dtype: torch.dtype,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and ``tensors_of``, computed in ``dtype``; None for one not wanted.

    x may be None where ``takes_x`` says so.
    """
    x_wanted, weight_wanted, bias_wanted = wanted[:3]
    both_x, both_weight = (x_wanted, *wanted[3::2]), (weight_wanted, *wanted[4::2])
    grad_x = grad_weight = grad_bias = x_again = weight_again = None
    of_x, of_weight = [None, None], [None, None]  # gradients of step size and offset

    def weight_side(again: torch.dtype | None) -> None:
        nonlocal grad_weight, grad_bias, of_weight, weight_again
        value = _rounded(x, x_rounding, dtype) if x_again is None else x_again
        grad_weight, grad_bias = _weight_gradients(grad, value, weight, convolution, bias_wanted)
        if weight_rounding is not None:
            made = weight_rounding.backward_(grad_weight, weight, both_weight, again)
            weight_again, grad_weight, *of_weight = made

    def input_side(again: torch.dtype | None) -> None:
        nonlocal grad_x, of_x, x_again
        value = _rounded(weight, weight_rounding, dtype) if weight_again is None else weight_again
        if not x_wanted and image.takes(x, convolution):
            with without_autocast(grad):
                of_x = image.gradients(grad, x, value, x_rounding, convolution, both_x[1:])
            return
        grad_x = _input_gradient(grad, x, value, convolution)
        if x_rounding is not None:
            x_again, grad_x, *of_x = x_rounding.backward_(grad_x, x, both_x, again)

    # The side that comes first gets its rounded value for the other in the pass that makes its gradient; with a rounded
    # input, that is the input's, which is larger as a rule. A weight that is kept is there already. An image that needs
    # no gradient has no such pass.
    if not any(both_x):
        if any(both_weight):
            weight_side(None)
    elif not any(both_weight):
        input_side(None)
    elif x_rounding is None and weight_rounding.kept is None:
        weight_side(dtype)
        input_side(None)
    else:
        input_side(dtype)
        weight_side(None)
    if bias_wanted and grad_bias is None:
        grad_bias = rows(grad).sum(0) if convolution is None else grad.sum((0, *range(2, grad.dim())))
    return grad_x, grad_weight, grad_bias, of_x[0], of_weight[0], of_x[1], of_weight[1]


def takes_x(x_rounding: Rounding | None, convolution: Convolution | None, wanted: Sequence[bool]) -> bool:
    """Return whether ``gradients`` reads x; of a linear map with an x as it is, only what trains the weight does."""
    return x_rounding is not None or convolution is not None or any((wanted[1], wanted[4], wanted[6]))


def _rounded(tensor: Tensor, rounding: Rounding | None, dtype: torch.dtype) -> Tensor:
    if rounding is not None:
        return rounding.value(tensor, dtype)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, convolution: Convolution | None) -> Tensor:
    if convolution is None:
        return grad @ weight
    # The shape and layout of x are all it takes.
    like = x if x.dtype == grad.dtype else torch.empty_like(x, dtype=grad.dtype)
    return _convolution_backward(grad, like, weight, convolution, [True, False, False])[0]


def _weight_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, convolution: Convolution | None, bias_wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of the weight, and that of the bias where it is wanted and falls out of the same operator."""
    if convolution is None:
        return rows(grad).t() @ rows(x), None
    like = weight if weight.dtype == grad.dtype else torch.empty_like(weight, dtype=grad.dtype)
    return _convolution_backward(grad, x, like, convolution, [False, True, bias_wanted])[1:]


def rows(x: Tensor) -> Tensor:
    """Return x (..., K) as a matrix (M, K); one vector is one row."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _convolution_backward(grad, x, weight, convolution: Convolution, wanted: list[bool]):
    stride, padding, dilation, groups = convolution
    nothing = [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, nothing, groups, wanted
    )


class _Product(Function):
    """Keeps the weight, the step sizes and offsets, and x where a gradient takes it."""

    @staticmethod
    def forward(ctx, x, weight, bias, x_step, weight_step, x_offset, weight_offset, how) -> Tensor:
        *roundings, ctx.convolution, ctx.dtype = how
        kept = x if takes_x(roundings[0], ctx.convolution, ctx.needs_input_grad) else None
        ctx.save_for_backward(kept, weight, x_step, weight_step, x_offset, weight_offset)
        # Without their tensors, which autograd keeps: it may have moved them meanwhile.
        ctx.grids = [None if r is None else (r.grid, r.grad_scale, r.rule, r.kept) for r in roundings]
        return no_view(value(x, weight, bias, *how))

    @staticmethod
    @once
    def backward(ctx, grad: Tensor):
        x, weight, *tensors = ctx.saved_tensors
        roundings = [
            None if how is None else Rounding(how[0], step, how[1], offset, *how[2:])
            for how, step, offset in zip(ctx.grids, tensors[:2], tensors[2:], strict=True)
        ]
        wanted = ctx.needs_input_grad[:7]
        return *gradients(grad, x, weight, *roundings, ctx.convolution, ctx.dtype, wanted), None
