"""Rounding of a layer's input that a compiler sees into: fused with what makes the input, it moves no bytes of its own.

The arithmetic is the reference's, in the form of ``qat.exact`` that keeps its bits. The sum for a step size's gradient
is the compiler's own, in an order that depends on the shapes alone.

A product then keeps its rounded input for the backward, where the plain one keeps the input; what the gradient's mask
needs is computed again from what the layers before keep. Only an input that is kept anyway, such as attention's output,
is there twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend, exact, numerics
from .quantizers import dynamic
from .quantizers.rounding import Rounding
from .spec import Dynamic, QuantSpec


def takes(x: Tensor, rounding: Rounding) -> bool:
    """Return whether ``rounded`` does this rounding, LSQ's or a runtime's.

    Intel's GPUs may lack float64, which ``qat.exact`` needs.
    """
    allowed = x.device.type == "cpu" or (x.device.type == "cuda" and backend.traced_rounding())
    return allowed and rounding.rule is None and rounding.grid is not Dynamic.q8_0


def rounded(x: Tensor, rounding: Rounding, dtype: torch.dtype) -> Tensor:
    """Do what ``rounding(x)`` does, in ``dtype``, inside a compiled graph."""
    if rounding.step_size is None:
        return _Dynamic.apply(x, rounding.grid, dtype)
    return _Learned.apply(x, rounding.step_size, rounding.grid, rounding.grad_scale, dtype)


class _Learned(torch.autograd.Function):
    """Returns a tensor of its own: where it is ``to`` the dtype it has, Dynamo of torch 2.11 gives a gradient of 0."""

    @staticmethod
    def forward(ctx, x: Tensor, step_size: Tensor, spec: QuantSpec, grad_scale: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, step_size)
        ctx.spec, ctx.grad_scale = spec, grad_scale
        return exact.rounded(numerics.fake_quantized(x, step_size, spec, dtype)).clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, step_size = ctx.saved_tensors
        return *numerics.fake_quantize_gradients(grad, x, step_size, ctx.spec, ctx.grad_scale), None, None, None


class _Dynamic(torch.autograd.Function):
    """Returns a tensor of its own, as ``_Learned`` does."""

    @staticmethod
    def forward(ctx, x: Tensor, kind: Dynamic, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return exact.rounded(dynamic.rounded(x, kind, dtype)).clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        return dynamic.rounded_gradient(grad, x, ctx.kind), None, None
