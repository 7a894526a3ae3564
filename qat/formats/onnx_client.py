"""ONNX through onnxruntime: every weight, every activation's integers, and the whole model; this in OpenVINO too."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..frozen_model import frozen_activation
from ..inputs import Inputs, tensors
from ..quantized_model import QuantizedModel
from .float_error import TOLERANCE, float_error
from .onnx_parts import WIDE, Parts, compare_wide, session, weight
from .outputs import gap, outputs_of_random

# Where inputs are quantized, a sum at the edge of two integers may fall to either side: one code, not 1e-5.
ROUNDING_TOLERANCE = 0.05


def compare_layers(file: Path, model: QuantizedModel) -> list[tuple[str, str]]:
    """Run each layer's own nodes: an identity through MatMulNBits, or DequantizeLinear; numbers at the edges of codes.

    A product of more than WIDE inputs is looked at in slices, and whole where an input or two of every block is a one.

    Raises:
        ArtifactError: names the first layer whose weight or integers differ in any bit.
    """
    parts = Parts(file)
    weights = wide = activations = 0
    for name, layer in model.layers.items():
        if layer.weight is not None:
            expected = model.quantized(layer.tied or name).dequantize(torch.float32)
            found = weight(parts, name, layer.shape)
            if not torch.equal(found, expected):
                off = int((found != expected).sum())
                raise ArtifactError(f"{name} differs in {file}: {off} of {expected.numel()} weights in onnxruntime")
            if f"{name}/linear" in parts and layer.shape[1] > WIDE:
                compare_wide(parts, name, expected)
                wide += 1
            weights += 1
        if layer.activation is not None:
            spec = layer.activation
            rounding = frozen_activation(model, name)
            z = 0 if spec.symmetric else int(rounding.zero_point)
            x = _edges(rounding.scale.item(), spec.q_n + z, spec.q_p - z)
            found = parts.open(f"{name}/activation", x.dtype, 1)(x)
            if not torch.equal(found, rounding(x)):
                raise ArtifactError(f"the input of {name} is rounded otherwise in {file} by onnxruntime")
            activations += 1
    rows = [("onnxruntime, weights", f"{weights} layers equal q*s in every bit")]
    if wide:
        how = f"{wide} of them in slices, and whole at an input of every block and on random inputs"
        rows[0] = (rows[0][0], f"{rows[0][1]}; {how}")
    if activations:
        rows.append(("onnxruntime, activations", f"{activations} layers give the same integers at every edge"))
    return rows


def compare_outputs(file: Path, model: QuantizedModel, frozen: nn.Module, x: Inputs) -> list[tuple[str, str]]:
    """Run the whole model in onnxruntime, and in OpenVINO where it is installed, against the frozen one in float32.

    Raises:
        ArtifactError: the outputs differ by more than what float32 leaves open (``float_error``).
    """
    with torch.no_grad():
        expected = outputs_of_random(frozen, x)
    if isinstance(expected, str):
        return [("outputs", f"not compared: {expected}")]
    rows = _compare("onnxruntime", _run_onnxruntime(file, x), expected, frozen, x, model)
    if find_spec("openvino") is None:
        return [*rows, ("OpenVINO", "not installed: pip install openvino")]
    try:
        found = _run_openvino(file, x)
    except RuntimeError as error:  # several lines, of which the reason is the last before a summary
        reason = str(error).split("Summary:")[0].strip().splitlines()[-1]
        return [*rows, ("OpenVINO", f"not compared: it does not take this file ({reason:.200})")]
    return [*rows, *_compare("OpenVINO", found, expected, frozen, x, model)]


def _compare(
    runtime: str, found: list[Tensor], expected: dict[str, Tensor], frozen: nn.Module, x: Inputs, model: QuantizedModel
) -> list[tuple[str, str]]:
    if len(found) != len(expected):
        raise ArtifactError(f"{runtime} gives {len(found)} outputs, not {len(expected)}")
    rows = []
    for (name, ours), theirs in zip(expected.items(), found, strict=True):
        what = "outputs" if len(expected) == 1 else f"output {name!r}"
        rows.append(_compare_one(runtime, what, name, theirs.float(), ours.float(), frozen, x, model))
    return rows


def _compare_one(
    runtime: str,
    what: str,
    name: str,
    found: Tensor,
    expected: Tensor,
    frozen: nn.Module,
    x: Inputs,
    model: QuantizedModel,
) -> tuple[str, str]:
    if found.shape != expected.shape:
        raise ArtifactError(f"{runtime} gives {what} of shape {list(found.shape)}, not {list(expected.shape)}")
    if not expected.numel():
        return f"{runtime}, {what}", "empty"
    off, largest = gap(found, expected)
    rounded = any(layer.activation is not None for layer in model.layers.values())
    equal = f"argmax equal in {(found.argmax(-1) == expected.argmax(-1)).float().mean().item():.2%}"
    seen = f"differ by at most {off:.3g} (largest {largest:.3g}); {equal}"
    if not off <= (ROUNDING_TOLERANCE if rounded else TOLERANCE) * largest:
        error = float_error(found, frozen, x, name)
        if not error.explained():
            raise ArtifactError(f"{what} of {runtime} differ by {off:g} (largest {largest:g}): {error}")
        seen += f"; {error}"
    return f"{runtime}, {what}", seen


def _run_onnxruntime(file: Path, x: Inputs) -> list[Tensor]:
    running = session(file)
    named = {one.name: part.numpy() for one, part in zip(running.get_inputs(), tensors(x), strict=True)}
    return [torch.from_numpy(made) for made in running.run(None, named)]


def _run_openvino(file: Path, x: Inputs) -> list[Tensor]:
    """Run a file as it is: without the hint ACCURACY, OpenVINO rounds the inputs of 4-bit products to int8."""
    import openvino

    hints = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", hints)
    made = compiled([part.numpy() for part in tensors(x)])
    return [torch.from_numpy(made[index].copy()) for index in range(len(compiled.outputs))]


def _edges(scale: float, q_n: int, q_p: int) -> Tensor:
    """Return numbers at, just below and just above every midpoint between two codes, and far outside."""
    codes = torch.arange(-q_n - 2, q_p + 3)
    middles = (codes + 0.5) * scale
    around = [torch.nextafter(middles, torch.full_like(middles, limit)) for limit in (-1e30, 1e30)]
    far = torch.tensor([0.0, -0.0, 1e30, -1e30, 3e9 * scale, -3e9 * scale])
    return torch.cat([middles, *around, codes * scale, far])
