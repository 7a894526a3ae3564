"""A frozen model as a QuantizedModel, and a QuantizedModel as a frozen model: with its values, or as an outline."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
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
from .outline import parameters_on_meta, to_meta_
from .quantized_model import QuantizedLayer, QuantizedModel
from .quantizers import DynamicActivation, FrozenActivation
from .spec import Dynamic
from .wrappers import call_every_layer_, unwrapped

# Threads that read weights ahead: fresh memory takes one of them as long as the bytes.
READERS = 4
_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}


def from_model(model: nn.Module) -> QuantizedModel:
    """Describe a frozen model; tensors are not copied. One that peft wrapped is described without its adapter.

    Raises:
        StateError: the model is not frozen, or its adapter cannot lie beside it.
        ArtifactError: its state dict holds what is no dense tensor.
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
    _require_dense(state)
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


def _require_dense(state: dict[str, Any]) -> None:
    """Raise ArtifactError for what is no dense tensor."""
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ArtifactError(
                f"{name!r} in the model's state dict is a {type(value).__name__}, and artifacts hold tensors: let "
                "get_extra_state give a tensor, or leave it out"
            )
        if value.layout != torch.strided:
            layout = str(value.layout).removeprefix("torch.")
            raise ArtifactError(
                f"{name!r} is {layout}, and artifacts hold dense tensors: make it one with to_dense(), or keep it out "
                "of the state dict with register_buffer(..., persistent=False)"
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
        make_frozen_(layer, packed[name], frozen_activation(quantized, name))
        if isinstance(layer, FrozenEmbedding) and entry.dtype is not None:
            set_dtype_(layer, _DTYPES[entry.dtype], layer.like.device)
    return model


def frozen_activation(quantized: QuantizedModel, name: str) -> FrozenActivation | DynamicActivation | None:
    """Return what rounds a layer's input; None where that is left alone."""
    spec = quantized.layers[name].activation
    if spec is None:
        return None
    if isinstance(spec, Dynamic):
        return DynamicActivation(spec)
    zero_point = None if spec.symmetric else quantized.activation_zero_point(name)
    return FrozenActivation(spec, quantized.activation_scale(name), zero_point)


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
    entry = quantized.layers[name]
    parts = {part: tensor.to(quantized.device) for part, tensor in next(stored).items()}
    return PackedWeight.from_parts(replace(entry.weight), entry.shape, parts)


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
