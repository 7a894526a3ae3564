"""Models by name, from plain values: what a checkpoint and an artifact say of their architecture. Nothing is executed.

An architecture is ``{"builder": "resnet20", "args": {...}}`` for a model of ours, or ``{"transformers": {...}}`` with
the config of a transformers model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import nn

from ..arguments import wrong_types
from ..errors import ModelError, QATError, did_you_mean
from .cnn import cnn
from .gpt import gpt
from .resnet import resnet20

BUILDERS: dict[str, Callable[..., nn.Module]] = {"cnn": cnn, "gpt": gpt, "resnet20": resnet20}
MOST_LAYERS = 10_000  # of what a model has one after the other: 2^70 of them would be built for ever
_COUNTS = re.compile(r"(layers?|depths?|blocks|experts)$")


def build(architecture: dict[str, Any]) -> nn.Module:
    """Return an untrained model, which remembers how it was built in ``model.architecture``.

    Raises:
        ModelError: an unknown builder, key, argument or transformers class, or values that no model can be built from.
    """
    if not isinstance(architecture, dict) or not isinstance(architecture.get("args") or {}, dict):
        raise ModelError(f"{architecture!r:.80} is no architecture: give {{'builder': NAME, 'args': {{...}}}}")
    require_layers_that_end(architecture)
    if set(architecture) == {"transformers"}:
        return _build_transformers(architecture["transformers"])
    for key in architecture:
        if key not in ("builder", "args"):
            raise ModelError(f"unknown key {key!r} in the architecture{did_you_mean(key, ('builder', 'args'))}")
    name, args = architecture.get("builder"), dict(architecture.get("args") or {})
    if not isinstance(name, str) or name not in BUILDERS:
        raise ModelError(f"unknown model builder {name!r}{did_you_mean(str(name), BUILDERS)}")
    known = signature(BUILDERS[name]).parameters
    for key in args:
        if key not in known:
            raise ModelError(f"{name} takes no argument {key!r}{did_you_mean(key, known)}")
    for key, instead in wrong_types(BUILDERS[name], args):
        raise ModelError(f"model.args.{key}={args[key]!r}: give {instead}")
    for key, value in args.items():
        positive = isinstance(value, int | float) and value >= 1
        if isinstance(known[key].default, int) and not isinstance(value, bool) and not positive:  # sizes, all of them
            raise ModelError(f"model.args.{key}={value}: give 1 or more")
    with _said_of(f"{name} with {args}"):
        model = BUILDERS[name](**args)
    model.architecture = {"builder": name, "args": args}
    return model


def require_layers_that_end(architecture: Any) -> None:
    """Raise ModelError where an architecture, or the config of a transformers model, counts more than MOST_LAYERS."""
    for key, value in _numbers(architecture):
        if value > MOST_LAYERS and _COUNTS.search(key):
            raise ModelError(f"the architecture says {key}={value}: no model has more than {MOST_LAYERS} of them")


def architecture_of(model: nn.Module) -> dict[str, Any] | None:
    """Return what ``build`` makes an untrained copy of the model from; None for a model it does not know."""
    own = getattr(model, "architecture", None)
    if isinstance(own, dict):
        return own
    config = getattr(model, "config", None)
    if type(model).__module__.startswith("transformers.") and hasattr(config, "to_dict"):
        values = json.loads(json.dumps(config.to_dict(), default=str))
        values.pop("quantization_config", None)  # of the checkpoint that the model came from
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        if dtype is not None:  # of a model that is quantized to the last parameter, its config says it
            values["dtype"] = str(dtype).removeprefix("torch.")
        return {"transformers": {**values, "architectures": [type(model).__name__]}}
    return None


def _build_transformers(values: dict[str, Any]) -> nn.Module:
    try:
        import transformers

        from .. import parameterless  # noqa: F401  what it sets is all it does
    except ImportError:
        raise ModelError("this architecture needs transformers: pip install 'qat-lsq[hf]'") from None
    values = {key: value for key, value in values.items() if key != "auto_map"}  # which names remote code
    names, kind = values.get("architectures"), values.pop("model_type", None)
    if not names or kind is None:
        raise ModelError("a transformers architecture needs the keys model_type and architectures of a config.json")
    model_class = getattr(transformers, names[0], None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ModelError(f"transformers has no model class {names[0]!r}: install the version it was made with")
    with _said_of(names[0]):
        try:
            config = transformers.AutoConfig.for_model(kind, **values)
        except ValueError:
            raise ModelError(
                f"transformers does not know model_type={kind!r}: install the version it was made with"
            ) from None
        return model_class._from_config(config)  # in the config's dtype


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yield every integer of nested values, with the key that it, or the list around it, stands under."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _numbers(value, str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _numbers(value, key)
    elif isinstance(values, int):
        yield key, values


@contextmanager
def _said_of(what: str) -> Iterator[None]:
    """Turn whatever building a model raises into a ModelError: files say what they like, such as 2^40 classes."""
    try:
        yield
    except QATError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"{what} cannot be built: {reason:.300}") from error
