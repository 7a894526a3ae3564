"""Fake-quant layers and their frozen twins, and the one way to turn a layer into either.

A layer changes its class in place: hooks, ties, names and every reference to it survive.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..quantizers import DynamicActivation, FrozenActivation, OfInput, OfWeight
from ..wrappers import unwrapped
from .attention import SplitAttention, split_attentions_
from .conv import (
    FrozenConv,
    FrozenConv1d,
    FrozenConv2d,
    FrozenConv3d,
    QuantConv,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
)
from .conv1d import Conv1D, FrozenConv1D, QuantConv1D
from .conv_transpose import (
    FrozenConvTranspose,
    FrozenConvTranspose1d,
    FrozenConvTranspose2d,
    FrozenConvTranspose3d,
    QuantConvTranspose,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    other_side_first,
)
from .embedding import FrozenEmbedding, QuantEmbedding
from .joint_lora import JointLoraLinear, make_joint_
from .linear import FrozenLinear, QuantLinear
from .packed import PackedWeight, set_dtype_
from .qa_lora import QALoraLinear, make_qa_lora_

__all__ = [
    "TRANSPOSED",
    "JointLoraLinear",
    "PackedWeight",
    "QALoraLinear",
    "SplitAttention",
    "make_joint_",
    "make_qa_lora_",
    "set_dtype_",
    "split_attentions_",
]  # of the modules beside this one

TWINS = {  # each plain layer's fake-quant and frozen one
    nn.Linear: (QuantLinear, FrozenLinear),
    nn.Conv2d: (QuantConv2d, FrozenConv2d),
    Conv1D: (QuantConv1D, FrozenConv1D),
    nn.Embedding: (QuantEmbedding, FrozenEmbedding),
    nn.Conv1d: (QuantConv1d, FrozenConv1d),
    nn.Conv3d: (QuantConv3d, FrozenConv3d),
    nn.ConvTranspose1d: (QuantConvTranspose1d, FrozenConvTranspose1d),
    nn.ConvTranspose2d: (QuantConvTranspose2d, FrozenConvTranspose2d),
    nn.ConvTranspose3d: (QuantConvTranspose3d, FrozenConvTranspose3d),
}
FAKE_QUANT = {plain: twins[0] for plain, twins in TWINS.items()}
FROZEN = {plain: twins[1] for plain, twins in TWINS.items()}
QuantLayer = QuantLinear | QuantConv | QuantConvTranspose | QuantEmbedding
FrozenLayer = FrozenLinear | FrozenConv | FrozenConvTranspose | FrozenEmbedding
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Yield the fake-quant layers of a prepared model, each once, by name."""
    return ((name, layer) for name, layer in unwrapped(model).named_modules() if isinstance(layer, QuantLayer))


def frozen_layers(model: nn.Module) -> Iterator[tuple[str, FrozenLayer]]:
    """Yield the frozen layers of a model, each once, by name."""
    return ((name, layer) for name, layer in unwrapped(model).named_modules() if isinstance(layer, FrozenLayer))


def is_prepared(model: nn.Module) -> bool:
    """Return whether a model has fake-quant layers."""
    return any(True for _ in quant_layers(model))


def is_frozen(model: nn.Module) -> bool:
    """Return whether a model has frozen layers."""
    return any(True for _ in frozen_layers(model))


def plain_type(layer: nn.Module) -> type[nn.Module]:
    """Return nn.Linear, nn.Conv2d and so on for a fake-quant or frozen one, else the layer's own type."""
    if Conv1D.is_type_of(layer):
        return Conv1D
    if isinstance(layer, JointLoraLinear | QALoraLinear):
        return nn.Linear
    for table in (FAKE_QUANT, FROZEN):
        for plain, quantized in table.items():
            if type(layer) is quantized:
                return plain
    return type(layer)


def matrix(layer: nn.Module) -> Tensor:
    """Return the weight that a layer's codes are made from, with its outputs first."""
    if isinstance(layer, JointLoraLinear):
        return layer.merged()
    return turned(layer, layer.weight)


def turned(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight as it is stored in a plain layer with its outputs first, or the other way round."""
    if plain_type(layer) is Conv1D:
        return weight.t()
    return other_side_first(weight, layer.groups) if isinstance(layer, TRANSPOSED) else weight


def make_fake_quant_(
    layer: nn.Module,
    weight: OfWeight | None,
    activation: OfInput | None,
) -> None:
    """Turn a plain layer into its fake-quant twin, in place."""
    _become(layer, FAKE_QUANT[plain_type(layer)])
    layer.weight_quantizer = weight
    layer.activation_quantizer = activation


def make_frozen_(
    layer: nn.Module, weight: PackedWeight | None, activation: FrozenActivation | DynamicActivation | None
) -> None:
    """Turn a plain or fake-quant layer into its frozen twin, in place; packed codes replace the weight."""
    _become(layer, FROZEN[plain_type(layer)])
    if "weight_quantizer" in layer._modules:
        del layer.weight_quantizer
    # A layer on the meta device is filled where its codes are.
    set_dtype_(layer, layer.weight.dtype, layer.weight.device if weight is None else weight.packed.device)
    if isinstance(layer, FrozenEmbedding):
        weight.keep_rows()
    if weight is not None:
        for name in ("weight", "lora_A", "lora_B"):
            layer._parameters.pop(name, None)
        if isinstance(layer, FrozenLinear) and activation is not None:
            weight.meet_codes()
    layer.packed_weight = weight
    layer.activation_quantizer = activation


def _become(layer: nn.Module, twin: type[nn.Module]) -> None:
    if Conv1D.is_type_of(layer):
        layer.in_features, layer.out_features = layer.weight.shape
    layer.__class__ = twin
