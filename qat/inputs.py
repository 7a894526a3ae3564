"""What a network is called with: a tensor, several in a tuple, or named ones in a dict; and what such inputs look like.

An example of them is plain JSON, as checkpoints and artifacts hold it: of a tensor its shape without the batch, its
dtype and its range; of several {"inputs": a list of these, or a dict by name}.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArtifactError

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
SEVERAL = "inputs"  # the key of an example that holds those of several tensors
LARGEST = torch.finfo(torch.float32).max
RANGES = {"float32": (-LARGEST, LARGEST), "int64": (-(2**63), 2**63 - 1), "uint8": (0, 255), "bool": (0, 1)}  # by dtype
MOST = 2**31  # numbers of one input in a row


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
    fits = all(
        isinstance(part, Tensor) and _without_range(part) is None and part.dim() >= least and part.numel()
        for part in parts
    )
    return None if fits and len({part.shape[0] for part in parts}) == 1 else described(inputs) or "empty"


def unbound(network: nn.Module, inputs: Any) -> str | None:
    """Return how a network's forward takes other arguments than these inputs; None where it may take them."""
    if network._forward_pre_hooks:  # which may make others of them
        return None
    try:
        signature = inspect.signature(network.forward)
    except (TypeError, ValueError):  # none that Python can see
        return None
    try:
        call(signature.bind, inputs)
    except TypeError as error:
        bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
        return f"{type(network).__name__}.forward{inspect.Signature(bare)}: {error}"
    return None


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
    """Return random inputs that look like an example.

    Raises:
        ArtifactError: the example, which is read from a file, is none that ``example_like`` makes.
    """
    if (what := _damage(example)) is not None:
        raise ArtifactError(
            f"what inputs look like is damaged: {what}; convert the checkpoint again, or save the model again with "
            "qat.save(model, out, example=...)"
        )
    generator = torch.Generator().manual_seed(seed)
    if SEVERAL not in example:
        return _random(example, batch, generator)
    return mapped(example[SEVERAL], lambda one: _random(one, batch, generator))


def _looks(x: Tensor) -> dict[str, Any]:
    exact = str(x.dtype).removeprefix("torch.")
    dtype = "float32" if x.is_floating_point() else exact if exact in RANGES else "int64"
    values = x.byte() if dtype == "bool" else x.to(getattr(torch, dtype))
    if dtype == "float32":  # a mask's -inf is no end of a range
        finite = values[values.isfinite()]
        values = finite if finite.numel() else values.new_zeros(1)
    low, high = values.aminmax()
    return {"shape": list(x.shape[1:]), "dtype": dtype, "low": low.item(), "high": high.item()}


def _damage(example: Any) -> str | None:
    """Return what keeps an example from being one; None for nothing."""
    looks = example.get(SEVERAL, example) if isinstance(example, Mapping) else example
    if looks is example:
        return _damage_of_one(example)
    if not isinstance(looks, Mapping | list) or not looks:
        return f"{looks!r:.60}, where a list of inputs is, or a dict of them"
    items = looks.items() if isinstance(looks, Mapping) else enumerate(looks)
    for name, one in items:
        if isinstance(looks, Mapping) and not name.isidentifier():
            return f"an input is called {name!r:.60}, which no argument is"
        if (what := _damage_of_one(one)) is not None:
            return f"of the input {name!r}, {what}"
    return None


def _damage_of_one(looks: Any) -> str | None:
    if not isinstance(looks, Mapping) or not {"shape", "dtype", "low", "high"} <= looks.keys():
        return f"{looks!r:.60}, where shape, dtype, low and high are"
    shape, dtype, low, high = (looks[key] for key in ("shape", "dtype", "low", "high"))
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        return f"a shape of {shape!r:.60}"
    if math.prod(shape) > MOST:
        return f"a shape of {shape!r:.60}, more than {MOST:,} numbers a row"
    if not isinstance(dtype, str) or dtype not in RANGES:
        return f"a dtype {dtype!r:.60} (known: {', '.join(RANGES)})"
    least, most = RANGES[dtype]
    if not all(type(end) in (int, float) for end in (low, high)) or not least <= low <= high <= most:
        return f"a range from {low!r:.60} to {high!r:.60} of {dtype}"
    return None


def _random(example: dict[str, Any], batch: int, generator: torch.Generator) -> Tensor:
    shape, low, high = [batch, *example["shape"]], example["low"], example["high"]
    if example["dtype"] != "float32":
        dtype, end = getattr(torch, example["dtype"]), min(int(high) + 1, RANGES["int64"][1])  # which is left out
        return torch.randint(min(int(low), end - 1), end, shape, generator=generator, dtype=dtype, device="cpu")
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") * (high - low) + low


def _without_range(x: Tensor) -> str | None:
    """Return what kind of tensor has no lowest and highest number that can be read; None for the usual kind."""
    if x.is_complex() or x.is_quantized:
        return str(x.dtype)
    if x.is_nested:
        return "nested"
    return str(x.layout) if x.layout != torch.strided else "on the meta device" if x.is_meta else None


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    kind = _without_range(value)
    return "a nested tensor" if kind == "nested" else f"{list(value.shape)}" + (f" {kind}" if kind else "")
