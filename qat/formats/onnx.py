"""ONNX: one graph for onnxruntime, OpenVINO and their kin, with the trained codes and scales in it.

``onnx_trace`` makes the graph of the network, and ``onnx_graph`` puts codes and scales into it. ``model.onnx`` (with
``model.onnx.data`` beside it where it is large) maps a batch of inputs to the outputs in float32. Its metadata key
"qat" says, as JSON, what the layers are and under which name each other tensor lies: torch's exporter stores equal
tensors once, and some transposed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import refuse_beside
from ..errors import ArtifactError
from ..frozen_model import outline, to_model
from ..inputs import Inputs, random_input
from ..numerics import scale_dtype
from ..quantized_model import QuantizedLayer, QuantizedModel
from ..spec import Dynamic
from . import huggingface as hf
from . import onnx_client
from .companions import copy_companions
from .integer_linears import ROUNDS, other_grid, refuse
from .model_card import write_card
from .onnx_graph import fill, insert_quantized, strip_traces
from .onnx_trace import export
from .onnx_weights import decode

FILE = "model.onnx"
KEY = "qat"
SINGLE_FILE_BYTES = 2**30  # a protobuf message ends at 2 GiB


def write(model: QuantizedModel, folder: Path, network: nn.Module | None = None, qdq: bool = False) -> list[str]:
    """Write ``model.onnx`` into a folder; return notes to print.

    Args:
        model: what to write; it needs an example input, unless it is a transformers language model.
        folder: where to.
        network: an untrained instance of the user's own architecture, as for ``qat.load``.
        qdq: write the weights of linear layers as DequantizeLinear too, and not as MatMulNBits.

    Raises:
        ArtifactError: torch cannot export the model, or its forward does not reach a quantized layer.
        OSError: the disk is full, or cannot be written.
    """
    refuse_beside(model, "ONNX")
    refuse(
        "ONNX",
        {
            name: f"trained with its input rounded as {layer.activation.value}, which no operator of ONNX does; --to "
            f"{ROUNDS[layer.activation]} rounds so, or train with dynamic: null"
            for name, layer in model.layers.items()
            if isinstance(layer.activation, Dynamic)
        }
        | {
            name: other_grid(layer, "ONNX")
            for name, layer in model.layers.items()
            if layer.weight is not None and not layer.weight.holds_integers
        },
    )
    _need("onnx", "onnxscript")
    import onnx_ir

    example = example_input(model)
    ir_model, values = export(outline(model, network).float(), model, example, qdq)
    names, scalars = fill(ir_model, values, model)
    insert_quantized(ir_model, model)
    about = {
        "layers": {name: layer.to_dict() for name, layer in model.layers.items()},
        "architecture": model.architecture,
        "example": model.example,
        "tied": model.tied,
        "dense": {name: [stored, False] for name, stored in names.items()},
        "scalars": scalars,
    }
    ir_model.metadata_props[KEY] = json.dumps(about)
    strip_traces(ir_model)
    large = sum(value.const_value.nbytes for value in ir_model.graph.initializers.values()) > SINGLE_FILE_BYTES
    onnx_ir.save(ir_model, folder / FILE, external_data=f"{FILE}.data" if large else None)
    copy_companions(model, folder)
    if "transformers" in (model.architecture or {}):
        hf.write_config(model, folder, {})  # where optimum and transformers.js look for it
    run = f"python -c \"import onnxruntime; onnxruntime.InferenceSession('{FILE}')\""
    write_card(model, folder, "ONNX", _activations(model), run)
    return _notes(model, ir_model.graph)


def read(path: Path) -> QuantizedModel:
    """Open a file that ``write`` wrote, or the folder that holds it; tensors are decoded when asked for.

    Raises:
        ArtifactError: no such file, a damaged one, or one that another program wrote.
    """
    _need("onnx")
    import onnx_ir

    file = path if path.is_file() else path / FILE
    if not file.is_file():
        raise ArtifactError(f"there is no ONNX file at {path}")
    try:
        ir_model = onnx_ir.load(file)
    except Exception as error:  # protobuf's and onnx_ir's own, which share no base
        raise ArtifactError(f"{file} is damaged or no ONNX file: {error}") from None
    if KEY not in ir_model.metadata_props:
        raise ArtifactError(f"{file} was written by another program: only our own ONNX files are read")
    about = json.loads(ir_model.metadata_props[KEY])
    tensors = _Initialisers(ir_model.graph.initializers)
    layers = {name: QuantizedLayer.from_dict(values) for name, values in about["layers"].items()}
    return QuantizedModel(
        about["architecture"],
        layers,
        lambda name: decode(tensors, layers[name].tied or name, layers[name]),
        lambda name: tensors[f"{name}.activation_scale"].view(1, 1).to(scale_dtype(layers[name].activation)),
        _Dense(tensors, about["dense"], about["scalars"]),
        about["tied"],
        f"the ONNX file {file}",
        about["example"],
        file.parent,
        activation_zero_point=lambda name: tensors[f"{name}.activation_zero_point"].view(1, 1).to(torch.int8),
    )


def verify(folder: Path, model: QuantizedModel, network: nn.Module | None = None) -> list[tuple[str, str]]:
    """Compare ``model.onnx`` with the model in onnxruntime and OpenVINO; return (what, what was seen) rows.

    Raises:
        ArtifactError: a code, a weight, an activation's integers or the outputs differ.
    """
    file = folder / FILE
    stored = read(folder)
    total = 0
    for name, layer in model.layers.items():
        if layer.weight is not None and layer.tied is None:
            codes, found = model.quantized(name).codes, stored.quantized(name).codes
            if not torch.equal(found, codes):
                off = int((found != codes).sum())
                raise ArtifactError(f"{name} differs in {file}: {off} of {codes.numel()} codes")
            total += codes.numel()
    rows = [("codes in the file", f"0 of {total:,} differ")]
    if find_spec("onnxruntime") is None:
        return [*rows, ("onnxruntime", "not installed: pip install onnxruntime")]
    rows += onnx_client.compare_layers(file, model)
    x = example_input(model, 8)
    x = x[:3] if isinstance(x, Tensor) and x.dtype == torch.int64 else x  # a text has many outputs
    return rows + onnx_client.compare_outputs(file, model, to_model(model, network).float(), x)


def example_input(model: QuantizedModel, batch: int = 2) -> Inputs:
    """Return random inputs that fit a model.

    Raises:
        ArtifactError: nothing says what they look like.
    """
    example = model.example
    config = (model.architecture or {}).get("transformers") or {}
    if example is None and "vocab_size" in config:
        example = {"shape": [16], "dtype": "int64", "low": 0, "high": config["vocab_size"] - 1}
    if example is None:
        raise ArtifactError(
            f"{model.source} does not say what its inputs look like: give qat.save a batch of them, as in "
            "qat.save(model, out, example=torch.randn(1, 3, 32, 32)), or convert a checkpoint of python -m qat.train "
            "whose data give tensors"
        )
    return random_input(example, batch)


class _Initialisers(Mapping[str, Tensor]):
    """A graph's initialisers as torch tensors; 4-bit ones as int8."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> Tensor:
        array = self._values[name].const_value.numpy()
        return torch.from_numpy(array.astype("int8" if array.dtype.name == "int4" else array.dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class _Dense(Mapping[str, Tensor]):
    """The tensors of a file that are not quantized."""

    def __init__(self, tensors: Mapping[str, Tensor], aliases: dict[str, list], scalars: dict[str, Any]) -> None:
        self._tensors, self._aliases, self._scalars = tensors, aliases, scalars

    def __getitem__(self, name: str) -> Tensor:
        if name in self._scalars:
            return torch.tensor(self._scalars[name])
        stored, transposed = self._aliases[name]
        return self._tensors[stored].t().contiguous() if transposed else self._tensors[stored]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._aliases, *self._scalars])

    def __len__(self) -> int:
        return len(self._aliases) + len(self._scalars)


def _activations(model: QuantizedModel) -> str:
    """Return what happens to the inputs of layers, in the model card's words."""
    trained = sum(layer.has_activation_scale for layer in model.layers.values())
    if not trained:
        return f"{hf.WEIGHTS_ONLY} (onnxruntime and OpenVINO have options that round them too)"
    return f"the inputs of {trained} layers are rounded with their trained scales"


def _notes(model: QuantizedModel, graph: Any) -> list[str]:
    kinds = [node.op_type for node in graph]
    linear = any(layer.type == "Linear" and layer.weight is not None for layer in model.layers.values())
    counted = [kind for kind in ("MatMulNBits", "GatherBlockQuantized", "DequantizeLinear") if kind in kinds]
    notes = [f"{FILE}: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in counted)]
    if len(graph.inputs) > 1:
        takes = (f"{value.name} [{', '.join(map(str, value.shape))}]" for value in graph.inputs)
        notes.append(f"it takes {', '.join(takes)}")
    if "MatMulNBits" in kinds:
        notes.append(
            "MatMulNBits multiplies in float32 (accuracy_level=0); setting that attribute to 4 is several times as "
            "fast and rounds the layers' inputs to int8"
        )
    elif linear:
        notes.append(
            "onnxruntime rounds the inputs of linear layers to int8 unless the session option "
            "session.qdq_matmulnbits_accuracy_level is 0"
        )
    too = "rounds these inputs to int8 too, and " if linear else ""
    notes.append(f"OpenVINO {too}multiplies in bfloat16 where a CPU does, unless told EXECUTION_MODE_HINT=ACCURACY")
    if hf.fused_experts(model):
        notes.append("warning: the experts' product copies a token's experts for it: long sequences take much memory")
    names = {value.name for value in (*graph.inputs, *graph.outputs)}
    if {"input_ids", "logits"} <= names:
        of_transformers = "transformers" in (model.architecture or {})
        other = "; to generate text use --to gguf or --to gptq" if of_transformers else ""  # which refuse other models
        notes.append(f"the graph runs whole sequences without a cache{other}")
    return notes


def _need(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ArtifactError(f"this needs {' and '.join(missing)}: pip install onnx onnxscript onnxruntime")
