"""What a network gives, as tensors with names: one tensor, a language model's logits, or several of a detector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, first_line
from ..inputs import Inputs
from ..modes import call_without_cache

ONLY = "output"  # the name of a tensor that has none


def outputs(network: nn.Module, x: Inputs) -> dict[str, Tensor]:
    """Return a network's outputs by name; of an output with the field ``logits``, as transformers has, only those.

    A dict gives its keys, a list or tuple "output_0", "output_1" and so on, and what lies inside others both names. As
    in training, a model of transformers makes no key-value cache, which some of its kinds fail at.

    Raises:
        ArtifactError: there is no tensor among them.
    """
    made = call_without_cache(network, x)
    made = getattr(made, "logits", made)
    found = {ONLY: made} if isinstance(made, Tensor) else dict(_tensors(made, ""))
    if not found:
        raise ArtifactError(
            f"the network gives a {type(made).__name__} without a tensor in it: let it give its outputs"
        )
    return found


def outputs_of_random(network: nn.Module, x: Inputs) -> dict[str, Tensor] | str:
    """Return a network's outputs for random inputs; or why there are none, as of two that have to fit each other."""
    try:
        return outputs(network, x)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"the network does not run on random inputs of that range: {first_line(error)}"


def difference(found: Tensor, expected: Tensor) -> Tensor:
    """Return found - expected, and 0 between equal infinities, as a network gives for what a mask forbids."""
    return torch.where(found == expected, 0.0, found - expected)


def gap(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest difference, and the largest finite number that was expected; 0 of none."""
    off, largest = difference(found, expected).abs(), expected[expected.isfinite()].abs()
    return off.max().item() if off.numel() else 0.0, largest.max().item() if largest.numel() else 0.0


def _tensors(made: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(made, Tensor):
        yield name, made
    elif isinstance(made, Mapping):
        for key, value in made.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(made, list | tuple):
        for index, value in enumerate(made):
            yield from _tensors(value, f"{name or ONLY}_{index}")
