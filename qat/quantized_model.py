"""QuantizedModel: a whole quantized model as plain values, which every format writes from and reads into.

Tensors are made when asked for, one at a time, so that a model larger than memory goes from disk to disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import adapters
from .checkpoint import load_state
from .errors import ArtifactError, StateError
from .layers import (
    FROZEN,
    FrozenEmbedding,
    PackedWeight,
    frozen_layers,
    is_frozen,
    is_prepared,
    make_frozen_,
    matrix,
    plain_type,
    set_dtype_,
    split_attentions_,
)
from .numerics import QuantizedTensor
from .outline import parameters_on_meta, to_meta_
from .quantizers import DynamicActivation, FrozenActivation
from .spec import Dynamic, QuantSpec, as_member
from .wrappers import call_every_layer_, unwrapped

# Threads that read weights ahead: fresh memory takes one of them as long as the bytes.
READERS = 4
_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}


@dataclass
class QuantizedLayer:
    """What one quantized layer is, without its tensors.

    Attributes:
        type: "Linear", "Conv2d", "Embedding" and so on.
        shape: of the weight.
        weight: its spec; None where only the input is quantized.
        activation: the input's spec, or how the runtime rounds it; None where the input is left alone.
        tied: the layer whose quantized weight this one shares; None for a weight of its own.
        dtype: of the rows that an embedding gives; None for other layers, whose input decides.
    """

    type: str
    shape: list[int]
    weight: QuantSpec | None
    activation: QuantSpec | Dynamic | None
    tied: str | None = None
    dtype: str | None = None

    @property
    def has_activation_scale(self) -> bool:
        """Whether the input has a scale of its own, which was trained."""
        return isinstance(self.activation, QuantSpec)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        activation = self.activation
        if activation is not None:
            activation = activation.to_dict() if self.has_activation_scale else activation.value
        return {**vars(self), "weight": self.weight and self.weight.to_dict(), "activation": activation}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantizedLayer:
        """Undo ``to_dict``."""
        weight, activation = values["weight"], values["activation"]
        if activation is not None:
            word = isinstance(activation, str)
            activation = as_member(Dynamic, "activation", activation) if word else QuantSpec.from_dict(activation)
        weight = None if weight is None else QuantSpec.from_dict(weight)
        return cls(values["type"], values["shape"], weight, activation, values["tied"], values.get("dtype"))


@dataclass
class QuantizedModel:
    """A quantized model between two places: modules, our artifact, another format.

    Attributes:
        architecture: for ``qat.models.build``; None for a model of the user's own.
        layers: by name.
        quantized: layer name -> its QuantizedTensor (layers that share a weight: ask for the one that owns it).
        activation_scale: layer name -> its input's stored scale (1, 1), where it has one.
        dense: every other tensor's name -> the tensor.
        tied: the name of a dense tensor -> the name of the same tensor in ``dense``.
        source: where it comes from, for messages.
        example: shape (without batch), dtype and range of an input, as in ``qat.checkpoint``; None if unknown.
        files: the folder that holds what travels with the model, such as its tokenizer.json; None if there is none.
        adapter: writes peft's folder of the adapter on the model; None if there is none, or one in ``files``.
        activation_zero_point: layer name -> its input's zero point, int8 (1, 1), where its spec is asymmetric.
        stored: layer name -> its packed weight's tensors as a state dict names them, on the CPU, where they are at hand
            so; threads may ask side by side.
        device: where to put them.
    """

    architecture: dict[str, Any] | None
    layers: dict[str, QuantizedLayer]
    quantized: Callable[[str], QuantizedTensor]
    activation_scale: Callable[[str], Tensor]
    dense: Mapping[str, Tensor]
    tied: dict[str, str] = field(default_factory=dict)
    source: str = "this model"
    example: dict[str, Any] | None = None
    files: Path | None = None
    adapter: Callable[[Path], None] | None = None
    activation_zero_point: Callable[[str], Tensor] = {}.__getitem__
    stored: Callable[[str], dict[str, Tensor]] | None = None
    device: torch.device | str = "cpu"


def shares_embedding(model: QuantizedModel, name: str) -> bool:
    """Return whether a layer, such as a language model's head, shares the codes of an embedding."""
    owner = model.layers[name].tied
    return owner is not None and model.layers[owner].type == "Embedding"


def from_model(model: nn.Module) -> QuantizedModel:
    """Describe a frozen model; tensors are not copied. One that peft wrapped is described without its adapter.

    Raises:
        StateError: the model is not frozen, or its adapter cannot lie beside it.
    """
    from .models import architecture_of

    model = unwrapped(model)
    if is_prepared(model):
        raise StateError("this model still trains: call qat.freeze(model) before qat.save")
    model, plain_name, adapter = adapters.split(model)
    frozen = {plain_name(name): layer for name, layer in frozen_layers(model)}
    if not frozen:
        raise StateError("nothing to save: call qat.prepare(model, policy), train, and qat.freeze(model) first")
    owners: dict[int, str] = {}
    layers = {}
    for name, layer in frozen.items():
        packed, activation = layer.packed_weight, layer.activation_quantizer
        owner = name if packed is None else owners.setdefault(id(packed), name)
        layers[name] = QuantizedLayer(
            plain_type(layer).__name__,
            list(matrix(layer).shape if packed is None else packed.shape),
            None if packed is None else packed.spec,
            None if activation is None else activation.spec,
            None if owner == name else owner,
            str(layer.like.dtype).removeprefix("torch.") if isinstance(layer, FrozenEmbedding) else None,
        )
    inside = _quantized_names(model)
    state = {plain_name(name): value for name, value in model.state_dict().items() if name not in inside}
    state.pop(None, None)
    dense, tied = _untie(state)
    return QuantizedModel(
        architecture_of(model),
        layers,
        lambda name: frozen[name].packed_weight.quantized_tensor(),
        lambda name: frozen[name].activation_quantizer.scale,
        dense,
        tied,
        adapter=adapter,
        activation_zero_point=lambda name: frozen[name].activation_quantizer.zero_point,
    )


def to_model(quantized: QuantizedModel, model: nn.Module | None = None, codes: bool = True) -> nn.Module:
    """Return a frozen model in eval mode.

    Args:
        quantized: the model's values.
        model: an untrained instance of the user's own, swapped in place and filled.
        codes: False leaves quantized weights on the meta device, for who takes them from ``quantized`` one at a time.

    Raises:
        StateError: the given model is prepared or frozen.
        ArtifactError: it does not name its architecture, or does not fit the given model.
    """
    given, model = model, _frozen(quantized, model, codes)
    inside = _quantized_names(model)
    state = {name: value for name, value in model.state_dict().items() if name in inside}
    state.update(quantized.dense)
    state.update({name: quantized.dense[owner] for name, owner in quantized.tied.items()})
    load_state(model, state, quantized.source, ArtifactError)
    del state  # so that codes laid out for a GPU take the place of those it holds
    for _, layer in frozen_layers(model):
        if layer.packed_weight is None:  # its dtype and device were the untrained weight's
            set_dtype_(layer, layer.weight.dtype, layer.weight.device)
        elif codes:
            layer.packed_weight.lay_out()
    return (model if given is None else given).eval()


def outline(quantized: QuantizedModel, model: nn.Module | None = None) -> nn.Module:
    """Return what ``to_model`` does without its values: codes, parameters and persistent buffers on the meta device.

    Args:
        quantized: the model's values; of them only activation scales are asked for.
        model: an untrained instance of the user's own, swapped in place and emptied.

    Raises:
        StateError: the given model is prepared or frozen.
        ArtifactError: it does not name its architecture, or has other layers or names than the given model.
    """
    model = _frozen(quantized, model, codes=False)
    own = model.state_dict()
    names = {*_quantized_names(model), *quantized.dense, *quantized.tied}
    load_state(model, {name: own.get(name, torch.empty(0)) for name in names}, quantized.source, ArtifactError)
    to_meta_(model, set(own))
    return model.eval()


def _frozen(quantized: QuantizedModel, model: nn.Module | None, codes: bool) -> nn.Module:
    """Return a model with frozen layers; what is not quantized has the values of the given model, or none."""
    if model is None:
        if quantized.architecture is None:
            raise ArtifactError(
                f"{quantized.source} does not name its architecture: use load(path, model=YourModel()), "
                "on the command line --model package.module:function"
            )
        from .models import build

        with parameters_on_meta():
            model = build(quantized.architecture)
    elif is_prepared(model) or is_frozen(model):
        raise StateError("load fills a plain model: give it a fresh instance, neither prepared nor frozen")
    model = unwrapped(model)
    call_every_layer_(model)
    split_attentions_(model, {*quantized.layers, *quantized.dense, *quantized.tied})
    packed: dict[str, PackedWeight | None] = {}
    stored = _stored_in_order(quantized) if codes and quantized.stored is not None else None
    for name, entry in quantized.layers.items():
        layer = matching_layer(model, name, entry, quantized.source)
        if entry.tied is not None:
            packed[name] = packed[entry.tied]
        else:
            packed[name] = entry.weight and (_with_codes(quantized, name, stored) if codes else _without_codes(entry))
        activation = None
        if isinstance(entry.activation, Dynamic):
            activation = DynamicActivation(entry.activation)
        elif entry.activation is not None:
            zero_point = None if entry.activation.symmetric else quantized.activation_zero_point(name)
            activation = FrozenActivation(entry.activation, quantized.activation_scale(name), zero_point)
        make_frozen_(layer, packed[name], activation)
        if isinstance(layer, FrozenEmbedding) and entry.dtype is not None:
            set_dtype_(layer, _DTYPES[entry.dtype], layer.like.device)
    return model


def _stored_in_order(quantized: QuantizedModel) -> Iterator[dict[str, Tensor]]:
    """Give what is stored of each weight, in the order of the layers, and read those that follow meanwhile."""
    owners = (name for name, layer in quantized.layers.items() if layer.weight is not None and layer.tied is None)
    with ThreadPoolExecutor(READERS, "read") as threads:
        coming = deque(threads.submit(quantized.stored, name) for name in islice(owners, READERS))
        while coming:
            yield coming.popleft().result()
            coming.extend(threads.submit(quantized.stored, name) for name in islice(owners, 1))


def _with_codes(quantized: QuantizedModel, name: str, stored: Iterator[dict[str, Tensor]] | None) -> PackedWeight:
    """Return a layer's weight as it is stored: ``PackedWeight.lay_out`` is for when all of the model is filled."""
    if stored is None:
        return PackedWeight.from_tensor(quantized.quantized(name), lay_out=False)
    entry, parts = quantized.layers[name], next(stored)
    try:
        parts = {part: tensor.to(quantized.device) for part, tensor in parts.items()}
        return PackedWeight.from_parts(replace(entry.weight), entry.shape, parts)
    except StateError as error:
        raise ArtifactError(f"{quantized.source} is damaged in the layer {name!r}: {error}") from None


def _without_codes(entry: QuantizedLayer) -> PackedWeight:
    with torch.device("meta"):
        return PackedWeight(entry.weight, entry.shape)


def _quantized_names(model: nn.Module) -> set[str]:
    """Return the state dict's names that belong to packed weights and activation quantizers."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedWeight | FrozenActivation)
        for name in module.state_dict()
    }


def _untie(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into tensors stored once and {name: the name that holds its tensor}."""
    owners: dict[tuple, str] = {}
    tensors, tied = {}, {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in owners:
            tied[name] = owners[key]
        else:
            owners[key] = name
            tensors[name] = tensor
    return tensors, tied


def matching_layer(model: nn.Module, name: str, entry: QuantizedLayer, source: str) -> nn.Module:
    """Return the model's layer of that name.

    Raises:
        ArtifactError: there is none, or it is of another type or shape.
    """
    problem = f"{source} does not fit {type(model).__name__}:"
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ArtifactError(f"{problem} that has no layer {name!r}") from None
    kind = plain_type(layer)
    if kind not in FROZEN or kind.__name__ != entry.type:
        raise ArtifactError(f"{problem} {name!r} is a {type(layer).__name__}, not a {entry.type}")
    if list(matrix(layer).shape) != entry.shape:
        here = list(matrix(layer).shape)
        raise ArtifactError(f"{problem} the weight of {name!r} is {here} there and {entry.shape} in the artifact")
    return layer
