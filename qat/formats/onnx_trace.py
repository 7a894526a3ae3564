"""A frozen network as torch's exporter sees it: each quantized weight and activation is a placeholder.

A placeholder is one node of the domain "qat", which carries the layer's name and no data; ``onnx_graph`` puts the nodes
that run it in its place.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._pytree import tree_unflatten

from ..errors import ArtifactError, first_line
from ..inputs import Inputs, described, tensors, unbound
from ..layers import FrozenConvTranspose, FrozenEmbedding, FrozenLayer, FrozenLinear, frozen_layers, matrix
from ..layers.conv_transpose import convolve
from ..layers.product import CONVOLUTIONS
from ..modes import masks_as_given, without_cache
from ..outline import fake_
from ..quantized_model import QuantizedLayer, QuantizedModel
from . import huggingface as hf
from .onnx_weights import in_blocks
from .outputs import ONLY, outputs

OPSET = 21
MISFIT = (
    "inputs were recorded as {}, and {}; save the model again with an example=... of what its forward takes, or give "
    "the --model that was saved"
)
NETWORK = "network."  # where LogitsOnly holds it
CHATTY = (
    "torch._subclasses.fake_tensor",
    "torch.export._trace",
    "torch.onnx._internal.exporter._registration",  # of torchvision's operators, where it is not installed
)


class Exported(nn.Module):
    """A frozen layer whose quantized parts are placeholder nodes."""

    def __init__(self, layer: FrozenLayer, name: str, entry: QuantizedLayer, multiply: bool) -> None:
        super().__init__()
        self.layer, self.name, self.entry, self.multiply = layer, name, entry, multiply

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """Map x, the first argument or the only one called ``input`` or ``x``, as the layer does."""
        x, *rest = args or [options.pop(name) for name in ("input", "x") if name in options]
        return self._map(x, *rest, **options)

    def __getattr__(self, name: str) -> Any:
        """Return what a network asks its layer for, such as ``out_channels``; of a ``weight`` not the values."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "weight" and self.entry.weight is not None:
                return torch.empty(self.entry.shape, dtype=self.layer.like.dtype, device="meta")
            return getattr(self.layer, name)

    def _map(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        layer = self.layer
        if isinstance(layer, FrozenEmbedding):
            if self.multiply:
                return self._placeholder("embedding", x, (*x.shape, self.entry.shape[1]))
            return F.embedding(x, self._placeholder("weight", x, self.entry.shape))
        padded = getattr(layer, "padding_mode", "zeros") != "zeros"
        if padded:  # with values of x, before they are rounded: OpenVINO 2026.4 errs on a reflection of 8-bit codes
            x = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode)
        if self.entry.activation is not None:
            x = self._placeholder("activation", x, x.shape)
        if self.multiply:
            torch._check(x.shape[-1] == self.entry.shape[1])  # as the product itself would ask of an axis that is free
            y = self._placeholder("linear", x, (*x.shape[:-1], self.entry.shape[0]))
            return y if layer.bias is None else y + layer.bias
        weight = matrix(layer) if self.entry.weight is None else self._placeholder("weight", x, self.entry.shape)
        if isinstance(layer, FrozenLinear):
            y, bias = F.linear(x, weight), layer.bias
        else:
            if isinstance(layer, FrozenConvTranspose):
                y = convolve(layer, x, weight, None, output_size)
            elif padded:
                y = CONVOLUTIONS[len(layer.stride)](x, weight, None, layer.stride, 0, layer.dilation, layer.groups)
            else:
                y = layer._conv_forward(x, weight, None)
            bias = None if layer.bias is None else layer.bias.view(-1, *[1] * len(layer.kernel_size))
        # A node of its own: inside Conv and Gemm, onnxruntime rounds it to the product of the two scales.
        return y if bias is None else y + bias

    def _placeholder(self, kind: str, x: Tensor, shape: Any) -> Tensor:
        attributes = {"layer": self.name}
        return torch.onnx.ops.symbolic(f"qat::{kind}", (x,), attributes, dtype=torch.float32, shape=tuple(shape))


class LogitsOnly(nn.Module):
    """Gives the logits of a language model, without a cache, or the tensors that another network gives.

    Args:
        network: what makes them.
        example: inputs like those it will get, which come one by one here, also those that the network takes by name.

    Raises:
        ArtifactError: the network's forward takes other arguments.
    """

    def __init__(self, network: nn.Module, example: Inputs) -> None:
        super().__init__()
        if (what := unbound(network, example)) is not None:
            raise ArtifactError(MISFIT.format(described(example), what))
        self.network = network
        self.names = list(example) if isinstance(example, Mapping) else None
        self.options = without_cache(network)

    def forward(self, *inputs: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the logits, or what another network returns: several tensors by name."""
        given = inputs if self.names is None else dict(zip(self.names, inputs, strict=True))
        found = outputs(partial(self.network, **self.options), given)
        return found if len(found) > 1 else next(iter(found.values()))


def export(network: nn.Module, model: QuantizedModel, example: Inputs, qdq: bool) -> tuple[Any, dict[str, Any]]:
    """Return an ``onnx_ir.Model`` of a frozen network, with placeholders for quantized layers; and its open values.

    Args:
        network: an outline in float32 (``qat.frozen_model.outline``), which is changed.
        model: what it outlines.
        example: inputs.
        qdq: whether the weights of linear layers are dequantized and then multiplied.

    Returns:
        The model, and {name of a parameter or buffer in ``network``: its value in the graph, without a tensor}.

    Raises:
        ArtifactError: torch cannot export it, or only for the example's own batch or length.
    """
    tokens = isinstance(example, Tensor) and _like_tokens(example)
    axes = {0: "batch", 1: "sequence"} if tokens else {0: "batch"}
    names = _input_names(network, example)
    wrapped = LogitsOnly(network, example).eval()
    inside = _put_placeholders(wrapped, model, qdq)
    if hf.fused_experts(model):
        network.set_experts_implementation("batched_mm")  # the others loop over the experts that the tokens chose
    fake_(wrapped)
    program = _traced(wrapped, model, example, names, axes)
    graph = program.model.graph
    unfilled = {name: value for name, value in graph.initializers.items() if _is_fake(value.const_value)}
    for name, value in unfilled.items():  # as an input, nothing is made of its values
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    program.optimize()
    del graph.inputs[len(names) :]
    _fix_axes(graph, program.exported_program)
    for value, part in zip(graph.inputs, tensors(example), strict=True):
        if any(isinstance(axis, int) and axis != size for axis, size in zip(value.shape, part.shape, strict=True)):
            takes = f"the network takes {value.name} [{', '.join(map(str, value.shape))}]"
            raise ArtifactError(MISFIT.format(described(example), takes))
    form = program.exported_program.call_spec.out_spec
    order = tree_unflatten(range(form.num_leaves), form)
    single = "logits" if "input_ids" in names else ONLY
    _keep_names(graph, names)
    _name_outputs(graph, sorted(order, key=order.get) if isinstance(order, dict) else [single])
    used = {inside.get(name, name): value for name, value in unfilled.items() if value.uses()}
    return program.model, {name.removeprefix(NETWORK): value for name, value in used.items()}


def _put_placeholders(wrapped: LogitsOnly, model: QuantizedModel, qdq: bool) -> dict[str, str]:
    """Put placeholders in the place of frozen layers; return {name inside of one: the name where it stood}."""
    exported = {}
    for name, layer in frozen_layers(wrapped.network):
        entry = model.layers[name]
        exported[layer] = Exported(layer, name, entry, not qdq and in_blocks(entry))
    inside = {}
    for name, layer in list(wrapped.named_modules(remove_duplicate=False)):  # a layer may have several names
        if layer in exported:
            wrapped.set_submodule(name, exported[layer])
            inside.update({f"{name}.layer.{leaf}": f"{name}.{leaf}" for leaf in layer.state_dict()})
    return inside


def _traced(
    wrapped: LogitsOnly, model: QuantizedModel, example: Inputs, names: list[str], axes: dict[int, str]
) -> torch.onnx.ONNXProgram:
    """Return torch's export of a network that holds placeholders; raise ArtifactError where there is none."""
    try:
        with _quiet(), masks_as_given(), _looked_up_anew(torch.ops.aten.lstm.input, torch.ops.aten.gru.input):
            return torch.onnx.export(
                wrapped,
                tensors(example),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=((axes,) if isinstance(example, Tensor) else _free_axes(tensors(example)),),
                optimize=False,
                verbose=False,
                input_names=names,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        if (problem := _problem_with(wrapped, example)) is not None:
            raise ArtifactError(MISFIT.format(described(example), f"the network does not run: {problem}")) from error
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        sizes = " and ".join(axes.values())
        raise ArtifactError(f"torch cannot export {model.source} to ONNX for any {sizes} size: {reason}") from error


def _problem_with(wrapped: LogitsOnly, example: Inputs) -> str | None:
    """Return why a network that holds fake tensors does not run on inputs; None where it does, or that is not seen."""
    modes = [value.fake_mode for value in wrapped.state_dict().values() if isinstance(value, FakeTensor)]
    mode = modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with _quiet(), torch.no_grad(), mode:
            wrapped(*(mode.from_tensor(part) for part in tensors(example)))
    except (UnsupportedFakeTensorException, DataDependentOutputException, DynamicOutputShapeException):
        return None
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


@contextmanager
def _looked_up_anew(*operators: torch._ops.OpOverload) -> Iterator[None]:
    """Let operators forget which implementation they chose, before and after.

    torch's exporter puts loops in the place of an LSTM's and a GRU's own and takes them away again, but one that was
    chosen before stays chosen (torch 2.13): a second network would be exported for one length of a sequence alone.
    """
    try:
        for operator in operators:
            operator._dispatch_cache.clear()
        yield
    finally:
        for operator in operators:
            operator._dispatch_cache.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from printing where a network failed, before it raises that, and what concerns its own code alone."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _like_tokens(x: Tensor) -> bool:
    return x.dtype == torch.int64 and x.dim() == 2


def _input_names(network: nn.Module, example: Inputs) -> list[str]:
    """Return the names of a graph's inputs: of several, those of the forward's arguments."""
    if isinstance(example, Tensor):
        return ["input_ids" if _like_tokens(example) else "input"]
    if isinstance(example, Mapping):
        return list(example)
    parameters = inspect.signature(network.forward).parameters.values()
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return [names[index] if index < len(names) else f"input_{index}" for index in range(len(example))]


def _free_axes(inputs: Sequence[Tensor]) -> tuple[dict[int, Any], ...]:
    """Return the axes that are free of several inputs: the batch, and the length of tokens and masks where it can be.

    torch finds out which of them have to be the same, or of one size.
    """
    hint = torch.export.Dim
    return tuple(
        {0: hint.DYNAMIC if index else "batch"} | ({1: hint.AUTO} if x.dim() == 2 and x.shape[1] > 1 else {})
        for index, x in enumerate(inputs)
    )


def _fix_axes(graph: Any, exported: Any) -> None:
    """Give an axis of an input that torch found to be of one size only that size."""
    sizes = {str(axis): int(found.lower) for axis, found in exported.range_constraints.items() if found.is_singleton()}
    for value in graph.inputs:
        for index, axis in enumerate(value.shape):
            value.shape[index] = sizes.get(str(axis), axis)


def _keep_names(graph: Any, names: list[str]) -> None:
    """Give what nodes give under one of some names another."""
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in names:
                value.name = f"inner.{value.name}"


def _name_outputs(graph: Any, names: list[str]) -> None:
    """Name a graph's outputs; what else has one of the names gets another, but for the inputs and initialisers."""
    kept = {value.name for value in graph.inputs} | set(graph.initializers)
    _keep_names(graph, names)
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = f"output.{name}" if name in kept else name


def _is_fake(tensor: Any) -> bool:
    return isinstance(getattr(tensor, "raw", None), FakeTensor)
