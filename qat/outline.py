"""Modules whose parameters take no memory: what is filled afterwards, or only traced, need not be made first.

Buffers are made as ever: those that no state dict holds, such as rotation frequencies, have their values from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let every parameter that a module registers lie on the meta device; ties between them hold."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def to_meta_(module: nn.Module, names: set[str]) -> None:
    """Move the parameters and buffers of these names to the meta device, in place; ties between them hold."""
    _replace_(module, lambda name, tensor: name in names, lambda tensor: tensor.detach().to("meta"))


def fake_(module: nn.Module) -> None:
    """Replace what lies on the meta device by torch's fake tensors of the CPU, for tracing; ties between them hold."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        _replace_(
            module, lambda name, tensor: tensor.is_meta, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)
        )


def _replace_(
    module: nn.Module, wanted: Callable[[str, Tensor], bool], replacement: Callable[[Tensor], Tensor]
) -> None:
    made: dict[Tensor, Tensor] = {}  # it holds the old ones, so that no new one takes an identity that was seen
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for store in (owner._parameters, owner._buffers):
            for leaf, tensor in store.items():
                if tensor is None or not wanted(f"{prefix}.{leaf}".removeprefix("."), tensor):
                    continue
                if tensor not in made:
                    other = replacement(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(other, tensor.requires_grad) if is_parameter else other
                store[leaf] = made[tensor]
