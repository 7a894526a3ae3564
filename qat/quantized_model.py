"""QuantizedModel: a whole quantized model as plain values, which every format writes from and reads into.

Tensors are made when asked for, one at a time, so that a model larger than memory goes from disk to disk. Modules
become such values, and these become modules, in ``qat.frozen_model``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .numerics import QuantizedTensor
from .spec import Dynamic, QuantSpec, as_member


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
        """Undo ``to_dict``.

        Raises:
            ValueError: the shape is none.
        """
        if not all(type(size) is int and size >= 0 for size in values["shape"]):
            raise ValueError(f"a shape of {values['shape']!r}")
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
        example: what inputs look like, as in ``qat.inputs``; None if unknown.
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
