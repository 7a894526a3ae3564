"""freeze: turn trained fake-quant layers into real low-bit ones, with the integers that training used."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import nn

from . import adapters
from .decisions import decide
from .errors import LayerError, PolicyError, StateError, some_of
from .layers import PackedWeight, frozen_layers, is_frozen, make_frozen_, matrix, quant_layers
from .layers.qa_lora import ZeroPointLora
from .numerics import QuantizedTensor
from .policy import QuantPolicy
from .quantizers import (
    DynamicActivation,
    FrozenActivation,
    LearnedActivation,
    LearnedStepSize,
    OfWeight,
    WeightCodebook,
)
from .spec import QuantSpec
from .surgery import prepare
from .unsaved_buffers import warn_of_rounded
from .wrappers import MAKE_PARAMETERS, computed_weights


def freeze(model: nn.Module) -> nn.Module:
    """Replace each fake-quantized weight by packed codes, in place, and put the model in eval mode.

    An error leaves the model as it was. Activation quantizers stay, with scales that no longer learn. Layers that share
    a weight share its packed codes. A quantizer that is switched off is frozen as any other, with a warning.

    Raises:
        StateError: the model is not prepared, a step size was never initialised, or an adapter is merged.
        LayerError: a weight or scale holds NaN or infinity, a weight is computed at each forward, as by pruning, or a
            weight quantizer of the user's own trains with other weights than it would ship.
    """
    layers = list(quant_layers(model))
    if not layers and is_frozen(model):
        raise StateError("this model is frozen already: save it as it is")
    if not layers:
        raise StateError("nothing to freeze: call qat.prepare(model, policy) and train first")
    adapters.require_unmerged(model)
    quantized = {name for name, _ in layers}
    if names := ", ".join(name for name in computed_weights(model) if name in quantized):
        raise LayerError(f"weights computed at each forward cannot be frozen ({names}): {MAKE_PARAMETERS}")
    off = []
    for name, layer in layers:
        for quantizer in (layer.weight_quantizer, layer.activation_quantizer):
            if isinstance(quantizer, LearnedStepSize | WeightCodebook):
                quantizer.require_initialised()
            if not getattr(quantizer, "enabled", True) and name not in off:
                off.append(name)
    if off:
        some = some_of(list(map(repr, off)))
        warnings.warn(
            f"fake quantization is off (enabled=False) in {len(off)} of {len(layers)} layers ({some}): what ships is "
            "quantized there all the same; to see it before, set enabled=True and evaluate again",
            stacklevel=2,
        )
    warn_of_rounded(model)
    packed: dict[int, PackedWeight] = {}
    frozen = []  # of all layers before the first one changes, so that an error leaves the model as it was
    for name, layer in layers:
        weight = None
        if layer.weight_quantizer is not None:
            key = id(layer.weight_quantizer)
            if key not in packed:
                packed[key] = PackedWeight.from_tensor(_quantize(name, layer))
            weight = packed[key]
        activation = layer.activation_quantizer
        if isinstance(activation, DynamicActivation):
            activation = DynamicActivation(activation.spec)
        elif isinstance(activation, LearnedActivation):  # zero points' adapters leave an input's scale frozen as it was
            activation = FrozenActivation(replace(activation.spec), activation.scale(), activation.zero_point())
            if not activation.scale.isfinite().all():
                raise LayerError(f"{name!r}: the scale of its input holds NaN or infinity")
        frozen.append((layer, weight, activation))
    for layer, weight, activation in frozen:
        make_frozen_(layer, weight, activation)
    return model.eval()


def frozen_at_once(model: nn.Module, policy: QuantPolicy) -> nn.Module:
    """Quantize a model in full precision, each weight rounded once, and freeze it, in place: a base for adapters.

    Raises:
        PolicyError: it would wait for data that nothing has seen yet; nothing is changed then.
        QATError: see ``prepare``.
    """
    if policy.init.reads_data:
        raise PolicyError(
            f"policy.init={policy.init.value} reads data, and the base of an adapter is frozen before any is seen: set "
            "policy.init=mse, or open the artifact of a run with trainer.max_steps=0"
        )
    waiting = [decision.name for decision in decide(model, policy) if isinstance(decision.activation, QuantSpec)]
    if waiting:
        raise PolicyError(
            "the base of an adapter is frozen before any data is seen, and input step sizes wait for some "
            f"({', '.join(map(repr, waiting[:4]))}{' and more' if len(waiting) > 4 else ''}): set policy.activation "
            "and that of rules to null, or let adapter=joint train them"
        )
    return freeze(prepare(model, policy))


def quantized_tensors(model: nn.Module) -> dict[str, QuantizedTensor]:
    """Return {layer name: QuantizedTensor} of a prepared, frozen or loaded model: the integers its forward uses.

    Raises:
        StateError: the model is neither, or a scale was never initialised.
        LayerError: a weight or its scale holds NaN or infinity.
    """
    tensors = {
        name: _quantize(name, layer) for name, layer in quant_layers(model) if layer.weight_quantizer is not None
    }
    for name, layer in frozen_layers(model):
        if layer.packed_weight is not None:
            tensors[name] = layer.packed_weight.quantized_tensor()
    if not tensors:
        raise StateError("this model has no quantized weights: call qat.prepare(model, policy) or qat.load first")
    return tensors


def _quantize(name: str, layer: nn.Module) -> QuantizedTensor:
    quantizer, weight = layer.weight_quantizer, matrix(layer)
    try:
        tensor = quantizer.quantize(weight)
    except LayerError as error:
        raise LayerError(f"{name!r}: {error}") from None
    if not isinstance(quantizer, OfWeight | ZeroPointLora):  # the user's own, whose two methods nobody has compared
        with torch.no_grad():
            off = (quantizer(weight) != tensor.dequantize(weight.dtype)).sum().item()
        if off:
            raise LayerError(
                f"{name!r}: {type(quantizer).__name__} would ship other weights than it trains with: {off} of "
                f"{weight.numel()} differ between forward(w) and quantize(w).dequantize(w.dtype). Return the latter "
                "from forward, plus w - w.detach() for its gradient; in bfloat16, w + (q - w).detach() is not always q"
            )
    return tensor
