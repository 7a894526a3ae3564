"""ONNX through onnxruntime: every weight, every activation's integers, and the whole model; this in OpenVINO too."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..layers import frozen_layers
from ..numerics import fake_quantize
from ..quantized_model import QuantizedModel

TOLERANCE = 1e-5  # of the largest output: the same float32 products, perhaps summed in another order
# Where inputs are quantized, a sum at the edge of two integers may fall to either side: one code, not 1e-5.
ROUNDING_TOLERANCE = 0.05
NUDGE = 1e-6  # of a product of some hundred terms, summed in float32 in another order
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
    import onnx

    graph = onnx.load(file).graph
    weights = activations = 0
    for name, layer in model.layers.items():
        if layer.weight is not None:
            expected = model.quantized(layer.tied or name).dequantize(torch.float32)
            found = _weight(graph, name, layer.shape)
            if not torch.equal(found, expected):
                off = int((found != expected).sum())
                raise ArtifactError(f"{name} differs in {file}: {off} of {expected.numel()} weights in onnxruntime")
            weights += 1
        if layer.activation is not None:
            scale, spec = model.activation_scale(name).float(), layer.activation
            x = _edges(scale.item(), spec.q_n, spec.q_p)
            found = torch.from_numpy(_run(graph, [f"{name}/activation/"], x.numpy()))
            if not torch.equal(found, fake_quantize(x, scale, spec)):
                raise ArtifactError(f"the input of {name} is rounded otherwise in {file} by onnxruntime")
            activations += 1
    rows = [("onnxruntime, weights", f"{weights} layers equal q*s in every bit")]
    if activations:
        rows.append(("onnxruntime, activations", f"{activations} layers give the same integers at every edge"))
    return rows


def compare_outputs(file: Path, model: QuantizedModel, frozen: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """Run the whole model in onnxruntime, and in OpenVINO where it is installed, against the frozen one in float32.

    Raises:
        ArtifactError: the outputs differ by more than the order of summation explains.
    """
    expected = _output(frozen, x)
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
        with torch.no_grad():  # in a deep model float32 itself may be further from exact than that
            own = root_mean_square(_logits(nudged(frozen, x)) - expected)
        off = root_mean_square(found - expected)
        if not off <= 2 * own:
            raise ArtifactError(f"outputs of {runtime} differ by {gap:g} (largest {largest:g})")
        seen += f"; root mean square {off:.3g}, and {own:.3g} of our own when products are changed by {NUDGE:g}"
    return f"{runtime}, outputs", seen


def nudged(network: nn.Module, x: Tensor, seed: int = 0) -> Tensor:
    """Return a frozen network's outputs for x with every quantized layer's outputs changed by about NUDGE of them."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return y * (1 + NUDGE * torch.randn(y.shape, generator=generator))

    hooks = [layer.register_forward_hook(nudge) for _, layer in frozen_layers(network)]
    try:
        return network(x)
    finally:
        for hook in hooks:
            hook.remove()


def root_mean_square(values: Tensor) -> float:
    """Return it."""
    return values.square().mean().sqrt().item()


def _output(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output = network(x)
    return _logits(output)


def _logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)


def _run_onnxruntime(file: Path, x: Tensor) -> Tensor:
    running = session(file)
    return torch.from_numpy(running.run(None, {running.get_inputs()[0].name: x.numpy()})[0])


def _run_openvino(file: Path, x: Tensor) -> Tensor:
    """Run a file as it is: without the hint ACCURACY, OpenVINO rounds the inputs of 4-bit products to int8."""
    import openvino

    hints = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", hints)
    return torch.from_numpy(compiled([x.numpy()])[0].copy())


def _weight(graph: Any, name: str, shape: list[int]) -> Tensor:
    """Return a layer's weight as onnxruntime computes it."""
    if any(node.name.startswith(f"{name}/weight/") for node in graph.node):
        return torch.from_numpy(_run(graph, [f"{name}/weight/"])).view(shape)
    if any(node.name.startswith(f"{name}/embedding/") for node in graph.node):
        return torch.from_numpy(_run(graph, [f"{name}/embedding/"], torch.arange(shape[0]).numpy()))
    columns = []
    for start in range(0, shape[1], ROWS):
        count = min(ROWS, shape[1] - start)
        identity = torch.zeros(count, shape[1])
        identity[torch.arange(count), torch.arange(start, start + count)] = 1
        columns.append(torch.from_numpy(_run(graph, [f"{name}/linear/"], identity.numpy())))
    return torch.cat(columns).t()


def _run(graph: Any, prefixes: list[str], x: Any = None) -> Any:
    """Run the first nodes of a layer, up to what they give to the rest of the graph, alone."""
    from onnx import TensorProto, helper

    nodes, seen = [], set()
    for node in graph.node:
        kind = node.name.rpartition("/")[2]
        if any(node.name == prefix + kind for prefix in prefixes) and kind not in seen:
            nodes.append(node)
            seen.add(kind)
    held = {value.name: value for value in graph.initializer}
    names = [name for node in nodes for name in node.input]
    made = {name for node in nodes for name in node.output}
    inputs = [name for name in dict.fromkeys(names) if name not in held and name not in made]
    constants = [held[name] for name in dict.fromkeys(names) if name in held]
    part = helper.make_graph(
        nodes,
        "part",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim)
            for name in inputs
        ],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        constants,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    serialised = helper.make_model(part, opset_imports=opsets, ir_version=10).SerializeToString()
    return session(serialised).run(None, dict.fromkeys(inputs, x))[0]


def _edges(scale: float, q_n: int, q_p: int) -> Tensor:
    """Return numbers at, just below and just above every midpoint between two codes, and far outside."""
    codes = torch.arange(-q_n - 2, q_p + 3)
    middles = (codes + 0.5) * scale
    around = [torch.nextafter(middles, torch.full_like(middles, limit)) for limit in (-1e30, 1e30)]
    far = torch.tensor([0.0, -0.0, 1e30, -1e30, 3e9 * scale, -3e9 * scale])
    return torch.cat([middles, *around, codes * scale, far])
