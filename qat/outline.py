"""Modules whose parameters take no memory: what is filled afterwards, or only traced, need not be made first.

Buffers are made as ever: those that no state dict holds, such as rotation frequencies, have their values from here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let every parameter that a module registers lie on the meta device; ties between them hold.

    torch.nn.init leaves them alone meanwhile: drawing numbers that nobody keeps, it would import all of torch._dynamo.
    """
    register = nn.Module.register_parameter
    initialisers = {name: getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and name[0] != "_"}

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    for name, initialise in initialisers.items():
        setattr(nn.init, name, _but_on_meta(initialise))
    try:
        yield
    finally:
        nn.Module.register_parameter = register
        for name, initialise in initialisers.items():
            setattr(nn.init, name, initialise)


def _but_on_meta(initialise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(initialise)
    def run(*arguments: Any, **options: Any) -> Tensor:
        tensor = arguments[0] if arguments else options["tensor"]
        return tensor if tensor.is_meta else initialise(*arguments, **options)

    return run


def to_meta_(module: nn.Module, names: set[str]) -> None:
    """Move the parameters and buffers of these names to the meta device, in place; ties between them hold."""
    replace_(module, lambda name, tensor: name in names, lambda tensor: tensor.detach().to("meta"))


def fake_(module: nn.Module) -> None:
    """Replace what lies on the meta device by torch's fake tensors of the CPU, for tracing; ties between them hold."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        replace_(
            module, lambda name, tensor: tensor.is_meta, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)
        )


def replace_(
    module: nn.Module, wanted: Callable[[str, Tensor], bool], replacement: Callable[[Tensor], Tensor]
) -> list[tuple[dict[str, Tensor], str, Tensor]]:
    """Put other tensors in the place of a module's parameters and buffers, in place; ties between them hold.

    Args:
        module: with everything below it.
        wanted: from a tensor's name, one of several where modules are shared, and the tensor: is it replaced?
        replacement: from a tensor to the one in its place; of a parameter, it is made a parameter.

    Returns:
        What was replaced: the dictionary of a module that held it, its key there, and the tensor.
    """
    made: dict[Tensor, Tensor] = {}  # it holds the old ones, so that no new one takes an identity that was seen
    replaced: dict[tuple[int, str], tuple[dict[str, Tensor], str, Tensor]] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for store in (owner._parameters, owner._buffers):
            for leaf, tensor in store.items():
                name, place = f"{prefix}.{leaf}".removeprefix("."), (id(store), leaf)
                if tensor is None or place in replaced or not wanted(name, tensor):
                    continue
                if tensor not in made:
                    other = replacement(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(other, tensor.requires_grad) if is_parameter else other
                store[leaf] = made[tensor]
                replaced[place] = store, leaf, tensor
    return list(replaced.values())
