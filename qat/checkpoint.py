"""Training checkpoints: what they say of their model beside the weights, and how they are read. Nothing is executed."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, QATError, some_of
from .inputs import Inputs, random_input
from .layers import quant_layers
from .policy import QuantPolicy
from .spec import Init
from .surgery import prepare

VERSION = 1
PREFIX = "model."  # the task holds the network under this name
TOKENIZER = "tokenizer"  # a folder beside a language model's checkpoint: what travels with the model


@dataclass
class Checkpoint:
    """What a training checkpoint holds.

    Attributes:
        architecture: for ``qat.models.build``; None for a model of the user's own.
        policy: the policy it was trained with.
        state_dict: the network's own names.
        example: what inputs look like, as in ``qat.inputs``; None if unknown.
        source: the path, for messages.
        own_quantizers: the layers with a quantizer of the user's own, which no policy makes.
    """

    architecture: dict[str, Any] | None
    policy: QuantPolicy
    state_dict: dict[str, Tensor]
    example: dict[str, Any] | None
    source: str
    own_quantizers: tuple[str, ...] = ()

    def build(self, model: nn.Module | None = None) -> nn.Module:
        """Return the prepared and trained network in eval mode; ``model`` is an untrained instance of the user's own.

        Raises:
            CheckpointError: it does not name its architecture, or does not fit the model, or has other quantizers than
                ours.
        """
        if self.own_quantizers:
            raise CheckpointError(
                f"{self.source} was trained with quantizers of your own ({some_of(self.own_quantizers)}): in Python, "
                "put them into a prepared model, give its load_state_dict "
                "qat.checkpoint.read_checkpoint(PATH).state_dict, and run qat.save(qat.freeze(model), DIR); python -m "
                "qat.convert takes DIR"
            )
        if model is None:
            if self.architecture is None:
                raise CheckpointError(
                    f"{self.source} does not name its architecture: say how to build it with "
                    "--model package.module:function"
                )
            from .models import build

            model = build(self.architecture)
        if not self.policy.quantizes_nothing():
            # The step sizes come from the state dict: a search for their start would be work thrown away. Methods that
            # read data search nothing here, and codebooks have a state of their own with them.
            init = self.policy.init if self.policy.init in (Init.gptq, Init.gptaq, Init.squeezellm) else Init.lsq
            prepare(model, replace(self.policy, init=init), verbose=False)
        load_state(model, self.state_dict, self.source)
        return model.eval()

    def example_input(self, batch: int = 2, seed: int = 0) -> Inputs | None:
        """Return random inputs of the recorded shapes, dtypes and ranges; None if nothing was recorded."""
        return None if self.example is None else random_input(self.example, batch, seed)


def describe(
    architecture: dict[str, Any] | None, policy: QuantPolicy, example: dict[str, Any] | None
) -> dict[str, Any]:
    """Return what a checkpoint stores under the key "qat": plain JSON values."""
    return {"version": VERSION, "architecture": architecture, "policy": policy.to_dict(), "example": example}


def own_quantizers(model: nn.Module) -> list[str]:
    """Return the names of a prepared model's layers that have a quantizer of the user's own."""
    parts = [(name, layer.weight_quantizer, layer.activation_quantizer) for name, layer in quant_layers(model)]
    return [
        name
        for name, *quantizers in parts
        if any(not type(part).__module__.startswith("qat.") for part in quantizers if part is not None)
    ]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of ``python -m qat.train``.

    Raises:
        CheckpointError: no such file, damaged, not ours, or from a newer version.
    """
    path = Path(path)
    if path.is_dir():
        found = path / "last.ckpt"
        fix = f"give {found}" if found.is_file() else "a run's is RUN/last.ckpt"
        raise CheckpointError(f"{path} is a folder, and a checkpoint is a file: {fix}")
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if damage := damage_of(path):
        raise CheckpointError(f"{path} cannot be read: it is no checkpoint, or damaged: {damage}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read: it is no checkpoint, or damaged, or holds more than tensors and plain values, "
            "which are never executed"
        ) from error
    if not isinstance(content, dict) or "qat" not in content or "state_dict" not in content:
        raise CheckpointError(f"{path} is no checkpoint of python -m qat.train")
    about = content["qat"]
    if about["version"] > VERSION:
        raise CheckpointError(f"{path} has checkpoint version {about['version']}, this package reads up to {VERSION}")
    if about.get("adapter"):
        raise CheckpointError(
            f"{path} holds an adapter in training, without its base: what it shipped lies beside it, in artifact/ or "
            "adapter/; resume=auto goes on training"
        )
    try:
        policy = QuantPolicy.from_dict(about["policy"])
    except QATError as error:
        raise CheckpointError(f"{path} holds a policy that this version does not know: {error}") from None
    state = {key.removeprefix(PREFIX): value for key, value in content["state_dict"].items() if key.startswith(PREFIX)}
    own = tuple(about.get("own_quantizers", ()))
    return Checkpoint(about["architecture"], policy, state, about["example"], str(path), own)


def damage_of(path: str | Path) -> str | None:
    """Return what is wrong with a file of ``torch.save``: torch.load leaves the checksums of its entries unread."""
    try:
        with zipfile.ZipFile(path) as file:
            entry = file.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError, struct.error) as error:
        return str(error) or type(error).__name__
    return None if entry is None else f"the checksum of its entry {entry} does not match"


def load_state(
    model: nn.Module, state: dict[str, Tensor], source: str, error: type[QATError] = CheckpointError
) -> None:
    """Fill a model; every name and shape must fit.

    Raises:
        error: names what is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    problems = []
    for title, names in (("missing", own.keys() - state.keys()), ("unexpected", state.keys() - own.keys())):
        if names:
            problems.append(f"{title} {some_of(sorted(names), 4)}")
    shapes = [
        f"{name} ({list(state[name].shape)} there, {list(own[name].shape)} in the model)"
        for name in own.keys() & state.keys()
        if isinstance(own[name], Tensor) and own[name].shape != state[name].shape  # and no extra state
    ]
    if shapes:
        problems.append(f"of another shape {some_of(sorted(shapes), 4)}")
    if problems:
        raise error(f"{source} does not fit {type(model).__name__}: " + "; ".join(problems))
    ties = _ties(model)
    stored = OrderedDict(state)
    stored._metadata = getattr(own, "_metadata", None)  # versions, for which some modules ask
    model.load_state_dict(stored, assign=True)  # which keeps the stored dtypes, and parts what was tied
    for name, owner in ties:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(owner))


def _ties(model: nn.Module) -> list[tuple[str, str]]:
    """Return (name, the first name of the same parameter) for every further name of a parameter."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return [(name, first[id(p)]) for name, p in named if first.setdefault(id(p), name) != name]
