"""Fake quantization whose gradients follow a rule of their own, in one place for autograd and for torch.compile.

A rule is a module with three functions, which choose what they run on:

    fake_quantized(x, step_size, offset, spec, dtype=None) -> the rounded x in ``dtype``, or its own
    gradients(grad_output, x, step_size, offset, spec, grad_scale) -> those of x, step size and offset (or None)
    requantize_(grad_output, x, step_size, offset, spec, grad_scale, wanted, dtype) -> the rounded x and the gradients
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..once import Function, once
from ..spec import QuantSpec


def fake_quantize(
    rule: ModuleType, x: Tensor, step_size: Tensor, offset: Tensor | None, spec: QuantSpec, grad_scale: float
) -> Tensor:
    """Return x rounded as the rule says, in its own dtype and shape.

    Args:
        rule: see above.
        x: any float dtype and shape.
        step_size: float32 (rows, groups), before rounding to the stored scale.
        offset: the rule's own, in the units of x; None where it has none.
        spec: the grid.
        grad_scale: what the gradients of step size and offset are multiplied by.
    """
    if torch.compiler.is_dynamo_compiling():
        from .. import compiled  # keeps Inductor's own rounding out

        return compiled.by_rule(rule, x, step_size, offset, spec, grad_scale)
    return _FakeQuantize.apply(rule, x, step_size, offset, spec, grad_scale)


class _FakeQuantize(Function):
    """Saves only its inputs; the backward computes the ratio again."""

    @staticmethod
    def forward(ctx, rule, x: Tensor, step_size: Tensor, offset: Tensor | None, spec: QuantSpec, grad_scale: float):
        ctx.save_for_backward(x, step_size, offset)
        ctx.rule, ctx.spec, ctx.grad_scale = rule, spec, grad_scale
        return rule.fake_quantized(x, step_size, offset, spec)

    @staticmethod
    @once
    def backward(ctx, grad_output: Tensor):
        return None, *ctx.rule.gradients(grad_output, *ctx.saved_tensors, ctx.spec, ctx.grad_scale), None, None
