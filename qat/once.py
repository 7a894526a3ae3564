"""What fake quantization's autograd functions are not for is one error: second derivatives, and torch.func.

Torch's own errors name a decorator, or a method to override; and of a second derivative that would run through saved
tensors alone, torch leaves that part out without a word. What a layer gives may be changed in place: see ``no_view``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import StateError

TWICE = (
    "fake quantization has no second derivatives, which gradient penalties (create_graph=True) take: keep it off the "
    "layers that such a loss goes through, by rules with weight and activation null"
)
TRANSFORMED = (
    "torch.func's transforms (vmap, grad, jvp and others) do not run fake quantization: call the model on a batch, and "
    "backward() on its loss"
)
TRACED = "a trace of fake quantization runs, but cannot be saved: trace the model after qat.freeze(model)"


class Function(torch.autograd.Function):
    """An autograd function that says what it is not for."""

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """Run the function.

        Raises:
            StateError: inside a transform of torch.func.
        """
        if torch._C._are_functorch_transforms_active():
            raise StateError(TRANSFORMED)
        if torch._C._is_tracing():
            warnings.warn(TRACED, stacklevel=2)
        return super().apply(*arguments)


def no_view(y: Tensor) -> Tensor:
    """Return y as no view: a view that an autograd function gave, torch lets nobody change, as ``y += x`` does."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():  # which see operators alone
        return torch.ops.aten._unsafe_view(y, y.shape)
    return y.data  # a tenth of the operator's time


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backward run without a graph; whoever asks for a gradient of what it gave is told by a StateError."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            made = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return made
        return _Refused.apply(*(part if part is None else part.detach().requires_grad_() for part in made))

    return run


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads

    @staticmethod
    def backward(ctx, *grads: Tensor):
        raise StateError(TWICE)
