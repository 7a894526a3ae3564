"""A model that is changed in place, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def unchanged_on_error(model: nn.Module | None) -> Iterator[None]:
    """Give a model's modules their classes, attributes and tensors back where the block raises.

    Tensors are kept, not copied: the block may replace them, and not write into them.
    """
    if not isinstance(model, nn.Module):  # none, or a mistake, which who takes it names
        yield
        return
    kept = [(module, module.__class__, dict(module.__dict__)) for module in model.modules()]
    held = (value for _, _, values in kept for value in values.values())
    inside = [(value, value.copy()) for value in held if isinstance(value, dict | set)]  # hooks' handles know theirs
    try:
        yield
    except BaseException:
        for module, kind, values in kept:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(values)
        for value, contents in inside:
            value.clear()
            value.update(contents)
        raise
