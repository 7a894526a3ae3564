"""Fake-quant layers and their frozen twins, and the one way to turn a layer into either.

A layer changes its class in place: hooks, ties, names and every reference to it survive.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..quantizers import ActivationLSQ, DynamicActivation, FrozenActivation, WeightCodebook, WeightLSQ
from .conv import FrozenConv2d, QuantConv2d
from .embedding import FrozenEmbedding, QuantEmbedding, set_dtype_
from .linear import FrozenLinear, QuantLinear
from .packed import PackedWeight

FAKE_QUANT = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d, nn.Embedding: QuantEmbedding}
FROZEN = {nn.Linear: FrozenLinear, nn.Conv2d: FrozenConv2d, nn.Embedding: FrozenEmbedding}
QuantLayer = QuantLinear | QuantConv2d | QuantEmbedding
FrozenLayer = FrozenLinear | FrozenConv2d | FrozenEmbedding


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Yield the fake-quant layers of a prepared model, each once, by name."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantLayer))


def frozen_layers(model: nn.Module) -> Iterator[tuple[str, FrozenLayer]]:
    """Yield the frozen layers of a model, each once, by name."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, FrozenLayer))


def is_prepared(model: nn.Module) -> bool:
    """Return whether a model has fake-quant layers."""
    return any(True for _ in quant_layers(model))


def is_frozen(model: nn.Module) -> bool:
    """Return whether a model has frozen layers."""
    return any(True for _ in frozen_layers(model))


def plain_type(layer: nn.Module) -> type[nn.Module]:
    """Return nn.Linear, nn.Conv2d or nn.Embedding for a fake-quant or frozen layer, else the layer's own type."""
    for table in (FAKE_QUANT, FROZEN):
        for plain, quantized in table.items():
            if type(layer) is quantized:
                return plain
    return type(layer)


def make_fake_quant_(
    layer: nn.Module,
    weight: WeightLSQ | WeightCodebook | None,
    activation: ActivationLSQ | DynamicActivation | None,
) -> None:
    """Turn a plain layer into its fake-quant twin, in place."""
    layer.__class__ = FAKE_QUANT[type(layer)]
    layer.weight_quantizer = weight
    layer.activation_quantizer = activation


def make_frozen_(
    layer: nn.Module, weight: PackedWeight | None, activation: FrozenActivation | DynamicActivation | None
) -> None:
    """Turn a plain or fake-quant layer into its frozen twin, in place; packed codes replace the weight."""
    layer.__class__ = FROZEN[plain_type(layer)]
    if "weight_quantizer" in layer._modules:
        del layer.weight_quantizer
    if isinstance(layer, FrozenEmbedding):
        set_dtype_(layer, layer.weight.dtype, layer.weight.device)
        weight.keep_rows()
    if weight is not None:
        del layer.weight
    layer.packed_weight = weight
    layer.activation_quantizer = activation
