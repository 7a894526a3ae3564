"""ONNX through onnxruntime: every weight, every activation's integers, and the whole model; this in OpenVINO too."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..quantized_model import QuantizedModel
from ..quantizers import FrozenActivation
from .float_error import float_error, outputs

TOLERANCE = 1e-5  # of the largest output: the same float32 products, perhaps summed in another order
# Where inputs are quantized, a sum at the edge of two integers may fall to either side: one code, not 1e-5.
ROUNDING_TOLERANCE = 0.05
ROWS = 256  # of the identity matrix at a time


def session(model: Any) -> Any:
    """Return an onnxruntime session, on the CPU, of a file or of a serialised model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    model = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def compare_layers(file: Path, model: QuantizedModel) -> list[tuple[str, str]]:
    """Run each layer's own nodes: an identity through MatMulNBits, or DequantizeLinear; numbers at the edges of codes.

    Raises:
        ArtifactError: names the first layer whose weight or integers differ in any bit.
    """
    parts = _Parts(file)
    weights = activations = 0
    for name, layer in model.layers.items():
        if layer.weight is not None:
            expected = model.quantized(layer.tied or name).dequantize(torch.float32)
            found = _weight(parts, name, layer.shape)
            if not torch.equal(found, expected):
                off = int((found != expected).sum())
                raise ArtifactError(f"{name} differs in {file}: {off} of {expected.numel()} weights in onnxruntime")
            weights += 1
        if layer.activation is not None:
            spec = layer.activation
            zero_point = None if spec.symmetric else model.activation_zero_point(name)
            rounding = FrozenActivation(spec, model.activation_scale(name), zero_point)
            z = 0 if spec.symmetric else int(zero_point)
            x = _edges(rounding.scale.item(), spec.q_n + z, spec.q_p - z)
            found = parts.open(f"{name}/activation", x.dtype, 1)(x)
            if not torch.equal(found, rounding(x)):
                raise ArtifactError(f"the input of {name} is rounded otherwise in {file} by onnxruntime")
            activations += 1
    rows = [("onnxruntime, weights", f"{weights} layers equal q*s in every bit")]
    if activations:
        rows.append(("onnxruntime, activations", f"{activations} layers give the same integers at every edge"))
    return rows


def compare_outputs(file: Path, model: QuantizedModel, frozen: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Run the whole model in onnxruntime, and in OpenVINO where it is installed, against the frozen one in float32.

    Raises:
        ArtifactError: the outputs differ by more than what float32 leaves open (``float_error``).
    """
    with torch.no_grad():
        expected = outputs(frozen, x)
    rows = [_compare("onnxruntime", _run_onnxruntime(file, x), expected, frozen, x, model)]
    if find_spec("openvino") is None:
        return [*rows, ("OpenVINO", "not installed: pip install openvino")]
    return [*rows, _compare("OpenVINO", _run_openvino(file, x), expected, frozen, x, model)]


def _compare(
    runtime: str, found: Tensor, expected: Tensor, frozen: nn.Module, x: Tensor, model: QuantizedModel
) -> tuple[str, str]:
    if found.shape != expected.shape:
        raise ArtifactError(f"{runtime} gives outputs of shape {list(found.shape)}, not {list(expected.shape)}")
    gap, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    rounded = any(layer.activation is not None for layer in model.layers.values())
    equal = f"argmax equal in {(found.argmax(-1) == expected.argmax(-1)).float().mean().item():.2%}"
    seen = f"differ by at most {gap:.3g} (largest {largest:.3g}); {equal}"
    if not gap <= (ROUNDING_TOLERANCE if rounded else TOLERANCE) * largest:
        error = float_error(found, frozen, x)
        if not error.explained():
            raise ArtifactError(f"outputs of {runtime} differ by {gap:g} (largest {largest:g}): {error}")
        seen += f"; {error}"
    return f"{runtime}, outputs", seen


def _run_onnxruntime(file: Path, x: Tensor) -> Tensor:
    running = session(file)
    return torch.from_numpy(running.run(None, {running.get_inputs()[0].name: x.numpy()})[0])


def _run_openvino(file: Path, x: Tensor) -> Tensor:
    """Run a file as it is: without the hint ACCURACY, OpenVINO rounds the inputs of 4-bit products to int8."""
    import openvino

    hints = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", hints)
    return torch.from_numpy(compiled([x.numpy()])[0].copy())


def _weight(parts: _Parts, name: str, shape: list[int]) -> Tensor:
    """Return a layer's weight as onnxruntime computes it."""
    if f"{name}/weight" in parts:
        return parts.open(f"{name}/weight")().view(shape)
    if f"{name}/embedding" in parts:
        return parts.open(f"{name}/embedding", torch.int64, 1)(torch.arange(shape[0]))
    run, columns = parts.open(f"{name}/linear", torch.float32, 2), []
    for start in range(0, shape[1], ROWS):
        count = min(ROWS, shape[1] - start)
        identity = torch.zeros(count, shape[1])
        identity[torch.arange(count), torch.arange(start, start + count)] = 1
        columns.append(run(identity))
    return torch.cat(columns).t()


class _Parts:
    """The nodes of a file's quantized layers, each part of which can run alone; tensors are read when it does."""

    def __init__(self, file: Path) -> None:
        import onnx

        graph = onnx.load(file, load_external_data=False).graph
        self._folder = str(file.parent)
        self._held = {value.name: value for value in graph.initializer}
        self._nodes: dict[str, dict[str, Any]] = {}  # of a module that is used twice, the first of each kind
        for node in graph.node:
            part, _, kind = node.name.rpartition("/")
            self._nodes.setdefault(part, {}).setdefault(kind, node)

    def __contains__(self, part: str) -> bool:
        return part in self._nodes

    def open(self, part: str, dtype: torch.dtype = torch.float32, axes: int = 0) -> Callable[..., Tensor]:
        """Return what runs the nodes called PART/KIND, up to what they give to the rest of the graph.

        Args:
            part: LAYER/ROLE.
            dtype: of its input, if it has one.
            axes: how many that has.
        """
        from onnx import TensorProto, helper

        nodes = list(self._nodes[part].values())
        names = dict.fromkeys(name for node in nodes for name in node.input)
        made = {name for node in nodes for name in node.output}
        inputs = [name for name in names if name not in self._held and name not in made]
        kind = TensorProto.INT64 if dtype == torch.int64 else TensorProto.FLOAT
        graph = helper.make_graph(
            nodes,
            "part",
            [helper.make_tensor_value_info(name, kind, [None] * axes) for name in inputs],
            [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
            [self._tensor(name) for name in names if name in self._held],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        running = session(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
        return lambda *x: torch.from_numpy(
            running.run(None, {name: value.numpy() for name, value in zip(inputs, x, strict=True)})[0]
        )

    def _tensor(self, name: str) -> Any:
        from onnx import TensorProto
        from onnx.external_data_helper import load_external_data_for_tensor

        stored = self._held[name]
        if stored.data_location != TensorProto.EXTERNAL:
            return stored
        tensor = TensorProto()
        tensor.CopyFrom(stored)
        load_external_data_for_tensor(tensor, self._folder)
        return tensor


def _edges(scale: float, q_n: int, q_p: int) -> Tensor:
    """Return numbers at, just below and just above every midpoint between two codes, and far outside."""
    codes = torch.arange(-q_n - 2, q_p + 3)
    middles = (codes + 0.5) * scale
    around = [torch.nextafter(middles, torch.full_like(middles, limit)) for limit in (-1e30, 1e30)]
    far = torch.tensor([0.0, -0.0, 1e30, -1e30, 3e9 * scale, -3e9 * scale])
    return torch.cat([middles, *around, codes * scale, far])
