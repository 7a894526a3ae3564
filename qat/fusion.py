"""fuse_projections: frozen layers that read one input run as one matrix product: q, k and v; gate and up.

A small int4 matrix takes a GPU as long as a larger one, so at few tokens the three products of an attention block cost
nearly three times what one costs. The layers stay as they are, with their names, codes and state dict; their packed
weights become parts of one, without a copy, and the first of them to be called computes for all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .errors import StateError
from .layers import FrozenLinear, is_frozen
from .layers.int8_product import int8_linear
from .layers.product import widened
from .quantizers import DynamicActivation
from .spec import Codebook, Dynamic

# As transformers and others call the layers that a module gives the same input.
NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
ROWS = 16  # outputs of a row block in ``qat.kernels.int4_layout``


def fuse_projections(model: nn.Module, verbose: bool = True) -> nn.Module:
    """Let frozen linear layers of one module that share their input run as one product on a GPU; in place.

    Groups are found by the names of their layers. A group whose layers turn out to be called with different inputs runs
    one by one again. The weights are those of the single layers to the bit; sums may be added up in another order.
    Inputs that are rounded by their own values are rounded once for the group.

    Args:
        model: frozen or loaded.
        verbose: print how many groups there are, and why others are none.

    Raises:
        StateError: the model is not frozen.
    """
    if not is_frozen(model):
        raise StateError("fuse_projections takes a frozen model: call qat.freeze(model) or qat.load first")
    fused, single = 0, []
    for name, layers in _groups(model):
        reason = _obstacle(layers)
        if reason:
            single.append(f"{name}: {reason}")
        else:
            group = FusedProjections(name, layers)
            for layer in layers:
                layer.fused = group
            fused += 1
    if verbose:
        print(f"{fused} groups of projections run as one product each" + "".join(f"\n  not {line}" for line in single))
    return model


class FusedProjections:
    """The layers of a group, their weights as one, and results that the other layers have not yet asked for.

    Attributes:
        name: of the first layer.
        together: False once the layers were seen to have different inputs.
    """

    def __init__(self, name: str, layers: list[FrozenLinear]) -> None:
        self.name, self.layers, self.together = name, layers, True
        self.operands: list[dict] = []
        self.weights: dict[torch.dtype, object] = {}
        self.sums: Tensor | None = None
        self.x: Tensor | None = None
        self.parts: dict[int, Tensor] = {}
        self.unrounded: Tensor | None = None
        self.rounding: Tensor | None = None

    def rounded(self, layer: FrozenLinear, x: Tensor) -> Tensor:
        """Return x as its runtime rounds it: for the first layer anew, for the others what it made of this x."""
        if not self.together or not layer.packed_weight.gpu_operands:
            return layer.activation_quantizer(widened(x))
        if layer is self.layers[0] or self.unrounded is not x:
            self.unrounded, self.rounding = x, layer.activation_quantizer(widened(x))
        return self.rounding

    def __call__(self, layer: FrozenLinear, x: Tensor) -> Tensor:
        """Return the layer's product, (..., N): a view of the group's result."""
        product = layer.packed_weight.int4_linear
        return self._part(layer, x, x.dtype, lambda weights, _, bias: product(x, weights[x.dtype], bias))

    def in_integers(self, layer: FrozenLinear, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the layer's product of integers in ``dtype``, for x that is not rounded yet: a view likewise."""

        def multiply(weights: dict, sums: Tensor, bias: Tensor | None) -> Tensor:
            return int8_linear(x, layer.activation_quantizer, weights[torch.float32], sums, bias, dtype)

        return self._part(layer, x, dtype, multiply)

    def _part(self, layer: FrozenLinear, x: Tensor, dtype: torch.dtype, multiply: Callable) -> Tensor:
        """Return what ``multiply`` makes of the layer's weights, row sums and bias, or its part of the group's."""
        index = next(i for i, other in enumerate(self.layers) if other is layer)
        if self.together and index == 0:
            self._join()
            biases = [other.bias.to(dtype) for other in self.layers if other.bias is not None]
            y = multiply(self.weights, self.sums, torch.cat(biases) if biases else None)
            self.x, self.parts = x, dict(enumerate(y.split([other.out_features for other in self.layers], -1)))
        if index in self.parts:
            if self.x is x:
                part = self.parts.pop(index)
                if not self.parts:
                    self.x = self.unrounded = self.rounding = None
                return part
            self.together, self.parts, self.x, self.unrounded, self.rounding = False, {}, None, None, None
            warnings.warn(f"{self.name} and its neighbours have different inputs: they run one by one", stacklevel=4)
        weight, bias = layer.packed_weight, None if layer.bias is None else layer.bias.to(dtype)
        return multiply(weight.gpu_operands, weight.row_sums, bias)

    def _join(self) -> None:
        """Make the layers' weights parts of one, unless they still are."""
        now = [layer.packed_weight.gpu_operands for layer in self.layers]
        if len(self.operands) == len(now) and all(a is b for a, b in zip(self.operands, now, strict=True)):
            return
        self.operands, self.weights, joined = now, {}, {}
        sums = [layer.packed_weight.row_sums for layer in self.layers]
        self.sums = None if sums[0] is None else torch.cat(sums)
        for dtype in now[0]:
            weights = [operands[dtype] for operands in now]
            starts = [0]
            for weight in weights:
                starts.append(starts[-1] + weight.words.shape[0])
            tensors = {}
            for part in ("words", "scale", "zero_point"):
                each = [getattr(weight, part) for weight in weights]
                key = tuple(map(id, each))  # dtypes share words, and most of them the scale
                if key not in joined:
                    joined[key] = each, None if each[0] is None else torch.cat(each)
                tensors[part] = joined[key][1]
            rows = sum(weight.out_features for weight in weights)
            self.weights[dtype] = weights[0]._replace(out_features=rows, **tensors)
            for operands, weight, start, end in zip(now, weights, starts[:-1], starts[1:], strict=True):
                views = {part: tensor if tensor is None else tensor[start:end] for part, tensor in tensors.items()}
                operands[dtype] = weight._replace(**views)
        if now[0][dtype].words.is_cuda:
            torch.cuda.synchronize()  # kernels read a weight ahead of time


def _groups(model: nn.Module) -> Iterator[tuple[str, list[FrozenLinear]]]:
    for prefix, module in model.named_modules():
        for names in NAMES:
            layers = [module._modules.get(name) for name in names]
            if all(isinstance(layer, FrozenLinear) for layer in layers):
                yield f"{prefix}.{names[0]}" if prefix else names[0], layers


def _obstacle(layers: list[FrozenLinear]) -> str | None:
    """Return why layers cannot be one product; None if they can."""
    if any(layer.packed_weight is None for layer in layers):
        return "a layer holds no codes"
    first = layers[0]
    if any(layer.packed_weight.spec != first.packed_weight.spec for layer in layers):
        return "its layers differ in their specs"
    if len({id(layer.packed_weight) for layer in layers}) < len(layers):
        return "its layers share a weight"
    if first.packed_weight.spec.bits != 4 or first.packed_weight.spec.codebook not in (None, Codebook.nf4):
        return "not 4 bits on an even grid or NF4"
    if len({_rounding(layer) for layer in layers}) > 1:
        return "each layer rounds its input by itself"
    if any((layer.bias is None) != (first.bias is None) for layer in layers):
        return "some layers have a bias and some have none"
    if any(layer.in_features != first.in_features for layer in layers):
        return "its layers have different numbers of inputs"
    if any(layer.out_features % ROWS for layer in layers[:-1]):
        return f"its layers have outputs that {ROWS} does not divide"
    return None


def _rounding(layer: FrozenLinear) -> Dynamic | int | None:
    """Return what layers have in common that round one input to the same values; None for no rounding."""
    activation = layer.activation_quantizer
    if activation is None or (isinstance(activation, DynamicActivation) and activation.enabled):
        return None if activation is None else activation.spec
    return id(layer)
