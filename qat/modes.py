"""How a model runs: in eval mode for a while, each module then as it was; without a key-value cache; traced."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules import transformer

from .inputs import Inputs, call


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a ``with`` block, also where that ends in an error."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def call_without_cache(model: nn.Module, inputs: Inputs) -> Any:
    """Return what a model makes of a batch's inputs, as it trains: without a key-value cache."""
    return call(partial(model, **without_cache(model)), inputs)


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Return the options that a forward takes to make no key-value cache: none but of transformers models with one."""
    if not getattr(getattr(model, "config", None), "use_cache", False):
        return {}
    parameters = inspect.signature(model.forward).parameters.values()
    takes = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters)  # peft's takes any
    return {"use_cache": False} if takes else {}


@contextmanager
def masks_as_given() -> Iterator[None]:
    """Let ``nn.Transformer`` and its parts take a mask without looking at its values, which a trace does not have.

    Where nobody says whether a mask is causal, torch compares it with one that is. It is only a hint: the layers get
    the mask with it, and compute the same.
    """
    detect = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect
