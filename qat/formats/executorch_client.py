"""A program in ExecuTorch: its packed codes and scales, one layer alone, and the whole model."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..inputs import Inputs, tensors
from ..layers import frozen_layers
from ..numerics import QuantizedTensor
from ..packing import pack
from ..quantized_model import QuantizedModel
from ..quantizers import DynamicActivation
from ..spec import Dynamic
from .executorch_disk import OnDisk
from .executorch_layers import FLOAT32, INT4, int4_operands, int8_constants, int8_operands, kind
from .executorch_program import lower, lowered_layer, quantized_weights
from .float_error import TOLERANCE, TYPICAL, float_error
from .onnx_client import ROUNDING_TOLERANCE
from .onnx_trace import LogitsOnly
from .outputs import gap, outputs, outputs_of_random

NEAR = 2**26  # bytes before the last part that was found, where the next may lie


def compare(file: Path, model: QuantizedModel, frozen: nn.Module, x: Inputs) -> list[tuple[str, str]]:
    """Compare a program with a model; return (what, what was seen) rows.

    Args:
        file: the program.
        model: what it was made from.
        frozen: the same as a module in float32, which is changed: its inputs get int8_token's rounding where they have
            none.
        x: inputs for the whole model.

    Raises:
        ArtifactError: codes or scales are not in the file, or outputs differ.
    """
    kinds = {name: kind(model.layers[name], layer) for name, layer in frozen_layers(frozen)}
    rows = _compare_file(file, model, kinds)
    for name, layer in frozen_layers(frozen):
        if model.layers[name].type == "Linear" and not model.layers[name].has_activation_scale:
            layer.activation_quantizer = DynamicActivation(Dynamic.int8_token)
    with torch.no_grad():
        rows += _compare_layer(model, frozen, kinds)
        return rows + compare_outputs(file, OneByOne(LogitsOnly(frozen, x)), tensors(x))


class OneByOne(nn.Module):
    """Runs each row of a batch alone, as a program does: some networks compare one with the others, as CLIP does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return the network's outputs, row below row."""
        made = [outputs(self.network, row) for row in _rows(inputs)]
        return {name: torch.cat([row[name] for row in made]) for name in made[0]}


def _compare_file(file: Path, model: QuantizedModel, kinds: dict[str, str]) -> list[tuple[str, str]]:
    """Look for every integer layer's packed codes and scales.

    Raises:
        ArtifactError: some are not there; the layers are named.
    """
    total, count, missing, last = 0, 0, [], 0
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for name, layer, tensor in quantized_weights(model):
            if kinds[name] == FLOAT32:
                continue
            scale = model.activation_scale(name) if layer.has_activation_scale else None
            constants = () if scale is None else int8_constants(layer.activation)
            four = kinds[name] == INT4
            parts = _int4_parts(tensor, constants) if four else _int8_parts(tensor, constants, scale)
            found = [_find(content, part.contiguous().view(torch.uint8).numpy().tobytes(), last) for part in parts]
            if min(found) < 0:
                missing.append(name)
            last = max(last, *found)
            total, count = total + tensor.codes.numel(), count + 1
    if missing:
        raise ArtifactError(f"{file} lacks the codes or scales of {', '.join(missing)}")
    return [("codes and scales in the file", f"{count} layers, {total:,} codes, equal in every bit")]


def _find(content: mmap.mmap, part: bytes, last: int) -> int:
    """Return where a part lies, or -1; parts lie in the layers' order, but for those of the same block."""
    found = content.find(part, max(0, last - NEAR))
    return found if found >= 0 else content.find(part)


def _int4_parts(tensor: QuantizedTensor, constants: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    codes, scale = int4_operands(tensor, constants)
    return pack(codes, 4), scale.bfloat16()


def _int8_parts(tensor: QuantizedTensor, constants: tuple[float, ...], scale: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, scales = int8_operands(tensor, constants, scale)
    return codes if codes.dim() == 2 else codes.permute(0, 2, 3, 1), scales


def _compare_layer(model: QuantizedModel, frozen: nn.Module, kinds: dict[str, str]) -> list[tuple[str, str]]:
    """Run the first integer layer alone in ExecuTorch, on random inputs.

    Raises:
        ArtifactError: it differs from our layer by more than the order of summation explains.
    """
    for name, layer in frozen_layers(frozen):
        if kinds[name] != FLOAT32:
            size = (64, layer.in_features) if model.layers[name].type == "Linear" else (1, layer.in_channels, 16, 16)
            x = torch.randn(size, generator=torch.Generator().manual_seed(0))
            with tempfile.TemporaryDirectory() as folder:
                lowered = lower(lowered_layer(model, name, layer).eval(), (x,), None, name, OnDisk(Path(folder)))
                program = bytes(lowered.buffer)
            off, largest = _gap(run(program, x, batched=True), layer(x), TOLERANCE, f"the outputs of {name!r} alone")
            return [(f"ExecuTorch, {name}", f"differs by at most {off:.3g} (largest {largest:.3g}) on {list(x.shape)}")]
    return []


def compare_outputs(file: Path, network: nn.Module, x: Inputs) -> list[tuple[str, str]]:
    """Run the whole program, against our own network with its rounding.

    In a deep network one code that falls to the other side changes all later ones. Where the outputs differ by more
    than ROUNDING_TOLERANCE, they may differ from float64's as much as our own do (``float_error``), whose codes fall
    to the other side as well.

    Raises:
        ArtifactError: they differ by more.
    """
    rows, expected = [], outputs_of_random(network, x)
    if isinstance(expected, str):
        return [("outputs", f"not compared: {expected}")]
    for which, name in enumerate(expected):
        what = "outputs" if len(expected) == 1 else f"output {name!r}"
        seen = _compare_one(file, run(file, x, which=which), expected[name], what, name, network, x)
        rows.append((f"ExecuTorch, {what}", seen))
    return rows


def _compare_one(
    file: Path, found: Tensor, expected: Tensor, what: str, name: str, network: nn.Module, x: Inputs
) -> str:
    equal = f"argmax equal in {(found.argmax(-1) == expected.argmax(-1)).float().mean().item():.2%}"
    try:
        off, largest = _gap(found, expected, ROUNDING_TOLERANCE, f"the {what} of {file}")
    except ArtifactError as problem:
        error = float_error(found, network, x, name)
        if not error.explained(overall=TYPICAL):
            raise ArtifactError(f"{problem}: {error}") from None
        return f"{error}; {equal}"
    return f"differ by at most {off:.3g} (largest {largest:.3g}); {equal}"


def run(program: Path | bytes, x: Inputs, batched: bool = False, which: int = 0) -> Tensor:
    """Return an output of ExecuTorch's runtime for x, one row at a time unless the program takes the batch."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(program).load_method("forward")
    rows = [tensors(x)] if batched else _rows(tensors(x))
    return torch.cat([method.execute(list(row))[which].clone() for row in rows])


def _rows(inputs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(part.split(1) for part in inputs), strict=True)


def _gap(found: Tensor, expected: Tensor, tolerance: float, what: str) -> tuple[float, float]:
    if found.shape != expected.shape:
        raise ArtifactError(f"{what} have the shape {list(found.shape)}, not {list(expected.shape)}")
    off, largest = gap(found, expected)
    if not off <= tolerance * largest:
        raise ArtifactError(f"{what} differ by {off:g} (largest {largest:g})")
    return off, largest
