"""What a network is called with: a tensor, several in a tuple, or named ones in a dict; and what such inputs look like.

An example of them is plain JSON, as checkpoints and artifacts hold it: of a tensor its shape without the batch, its
dtype and its range; of several {"inputs": a list of these, or a dict by name}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
SEVERAL = "inputs"  # the key of an example that holds those of several tensors
INTEGERS = ("int64", "uint8", "bool")


def call(network: Callable[..., Any], inputs: Any) -> Any:
    """Return what a network makes of inputs: of a tuple or list it takes each by position, of a dict by name."""
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, tuple | list) else network(inputs)


def mapped(inputs: Any, change: Callable[[Any], Any]) -> Any:
    """Return inputs with each of their tensors changed."""
    if isinstance(inputs, Mapping):
        return {name: change(value) for name, value in inputs.items()}
    return tuple(map(change, inputs)) if isinstance(inputs, tuple | list) else change(inputs)


def tensors(inputs: Any) -> tuple[Any, ...]:
    """Return the tensors of inputs, in their order."""
    if isinstance(inputs, Mapping):
        return tuple(inputs.values())
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def by_name(inputs: Inputs, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of inputs under names in a file: "prefix", "prefix/0" and so on, or "prefix/NAME"."""
    if isinstance(inputs, Tensor):
        return {prefix: inputs}
    items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    return {f"{prefix}/{name}": value for name, value in items}


def from_names(found: Mapping[str, Tensor], prefix: str) -> Inputs:
    """Return the inputs of which ``by_name`` made these."""
    if prefix in found:
        return found[prefix]
    named = {name.removeprefix(f"{prefix}/"): value for name, value in found.items()}
    return tuple(named[str(index)] for index in range(len(named))) if "0" in named else named


def misfit(inputs: Any) -> str | None:
    """Return what inputs are where they are no batch whose like can be made, with the batch as first axis; or None."""
    if not isinstance(inputs, Tensor | tuple | Mapping):
        return f"a {type(inputs).__name__}"
    parts = tensors(inputs)
    if isinstance(inputs, Mapping) and not all(isinstance(name, str) and name.isidentifier() for name in inputs):
        return f"a {type(inputs).__name__} of {', '.join(map(repr, inputs))}"
    least = 2 if isinstance(inputs, Tensor) else 1
    fits = all(isinstance(part, Tensor) and part.dim() >= least and part.numel() for part in parts)
    return None if fits and len({part.shape[0] for part in parts}) == 1 else described(inputs) or "empty"


def described(inputs: Any) -> str:
    """Return the shapes of inputs for a message."""
    if not isinstance(inputs, Mapping):
        return ", ".join(map(_shape, tensors(inputs)))
    return ", ".join(f"{name} {_shape(value)}" for name, value in inputs.items())


def example_like(inputs: Inputs) -> dict[str, Any]:
    """Return what a batch of inputs looks like, as an example."""
    if isinstance(inputs, Tensor):
        return _looks(inputs)
    looks = mapped(inputs, _looks)
    return {SEVERAL: looks if isinstance(looks, dict) else list(looks)}


def random_input(example: dict[str, Any], batch: int = 2, seed: int = 0) -> Inputs:
    """Return random inputs that look like an example."""
    generator = torch.Generator().manual_seed(seed)
    if SEVERAL not in example:
        return _random(example, batch, generator)
    return mapped(example[SEVERAL], lambda one: _random(one, batch, generator))


def _looks(x: Tensor) -> dict[str, Any]:
    exact = str(x.dtype).removeprefix("torch.")
    dtype = "float32" if x.is_floating_point() else exact if exact in INTEGERS else "int64"
    low, high = (x.byte() if x.dtype == torch.bool else x).aminmax()
    return {"shape": list(x.shape[1:]), "dtype": dtype, "low": low.item(), "high": high.item()}


def _random(example: dict[str, Any], batch: int, generator: torch.Generator) -> Tensor:
    shape, low, high = [batch, *example["shape"]], example["low"], example["high"]
    if example["dtype"] in INTEGERS:
        dtype = getattr(torch, example["dtype"])
        return torch.randint(int(low), int(high) + 1, shape, generator=generator, dtype=dtype, device="cpu")
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") * (high - low) + low


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
