"""ExecuTorch: a program for phones, ``model.pte``, whose quantized layers XNNPACK runs on integers.

Each quantized layer becomes a module of ``executorch_layers``, the network goes through torch.export, and ExecuTorch's
XNNPACK partitioner packs the weights into the file, where a layer of N outputs and K inputs has

    int4  codes uint8 (N, K/2): u = code + 8, the even input in the low nibble; scales bf16 (N, K/g), g = 32, ... or K
    int8  codes int8 (N, K), of a convolution (N, height, width, K); scales float32 (N), times the input's if trained

At run time XNNPACK rounds the input of a linear layer without a trained scale to int8 for each token: what
``int8_token`` trains for. All else runs in float32.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import refuse_beside
from ..errors import ArtifactError
from ..layers import FrozenLayer, frozen_layers
from ..numerics import QuantizedTensor
from ..packing import pack
from ..quantized_model import QuantizedLayer, QuantizedModel, to_model
from ..quantizers import DynamicActivation
from ..spec import Dynamic
from .companions import copy_companions
from .executorch_layers import (
    FLOAT32,
    GROUP_MULTIPLE,
    INT4,
    INT8,
    int4_operands,
    int8_constants,
    int8_operands,
    kind,
    lowered,
)
from .integer_linears import EMBEDDING_FORMATS, exact, other_grid, refuse
from .model_card import write_card
from .onnx import example_input
from .onnx_client import ROUNDING_TOLERANCE, TOLERANCE
from .onnx_graph import LogitsOnly

METHOD = "ExecuTorch"
FILE = "model.pte"
LONGEST = 512  # tokens: ExecuTorch plans its memory for the longest input


def write(model: QuantizedModel, folder: Path, network: nn.Module | None = None) -> list[str]:
    """Write ``model.pte`` into a folder; return notes to print.

    Args:
        model: what to write; it needs an example input, unless it is a transformers language model.
        folder: where to.
        network: an untrained instance of the user's own architecture, as for ``qat.load``.

    Raises:
        ArtifactError: names the layers that XNNPACK cannot hold exactly; or torch cannot export the model.
        OSError: the disk is full, or cannot be written.
    """
    refuse_beside(model, METHOD)
    refuse(METHOD, {name: problem for name, layer in model.layers.items() if (problem := _problem(layer))})
    _check_scales(model)
    _need()
    example = example_input(model, 1)
    frozen = to_model(model, network).float()
    kinds = {name: kind(model.layers[name], layer) for name, layer in frozen_layers(frozen)}
    wrapped = LogitsOnly(frozen).eval()
    replaced = {layer: _lowered(model, name, layer) for name, layer in frozen_layers(frozen)}
    for name, layer in list(wrapped.named_modules(remove_duplicate=False)):
        if layer in replaced:
            wrapped.set_submodule(name, replaced[layer])
    longest = _longest(model)
    program = _lower(wrapped, example, longest, model.source)
    copy_companions(model, folder)
    with (folder / FILE).open("wb") as stream:
        program.write_to_file(stream)
    what = f"1 to {longest} tokens, without a cache" if longest else f"one input of shape {list(example.shape[1:])}"
    notes = _notes(model, kinds)
    run = f"python -c \"from executorch.runtime import Runtime; Runtime.get().load_program('{FILE}')\""
    write_card(model, folder, METHOD, "; ".join(notes), run)
    return [f"{FILE} takes {what}", *notes]


def read(path: Path) -> QuantizedModel:
    """Refuse: a program holds a backend's own data, and no model.

    Raises:
        ArtifactError: always.
    """
    raise ArtifactError(f"{path} is an ExecuTorch program, which is not read back: use the artifact it was made from")


def verify(folder: Path, model: QuantizedModel, network: nn.Module | None = None) -> list[tuple[str, str]]:
    """Compare ``model.pte`` with the model; return (what, what was seen) rows.

    Every integer layer's packed codes and scales are looked for in the file. ExecuTorch's runtime then runs the first
    one alone and the whole model, against our own with int8_token's rounding where no other is trained.

    Raises:
        ArtifactError: codes or scales are not in the file, or outputs differ.
    """
    _need()
    frozen = to_model(model, network).float()
    kinds = {name: kind(model.layers[name], layer) for name, layer in frozen_layers(frozen)}
    rows = _compare_file(folder / FILE, model, kinds)
    for name, layer in frozen_layers(frozen):
        if model.layers[name].type == "Linear" and not model.layers[name].has_activation_scale:
            layer.activation_quantizer = DynamicActivation(Dynamic.int8_token)
    x = example_input(model, 8)
    with torch.no_grad():
        rows += _compare_layer(model, frozen, kinds)
        found = _run(folder / FILE, x)
        expected = LogitsOnly(frozen)(x)
    gap, largest = _gap(found, expected, ROUNDING_TOLERANCE, f"the outputs of {folder / FILE}")
    equal = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    seen = f"differ by at most {gap:.3g} (largest {largest:.3g}); argmax equal in {equal:.2%}"
    return [*rows, ("ExecuTorch, outputs", seen)]


def _problem(layer: QuantizedLayer) -> str | None:
    """Return what keeps a layer from being exact in XNNPACK, and the fix; None for nothing."""
    spec = layer.weight
    if layer.type == "Embedding":
        return EMBEDDING_FORMATS.format(METHOD)
    if spec is not None and not spec.holds_integers:
        return other_grid(layer, METHOD)
    if layer.activation is Dynamic.q8_0:
        return f"trained with its input rounded as q8_0, and {METHOD} rounds as int8_token; --to gguf keeps that"
    if layer.type != "Linear" or layer.has_activation_scale:
        return None  # int8, or else float32
    if not spec.symmetric:
        return "has zero points, which XNNPACK has no place for; --to onnx or awq holds them"
    if spec.group_size and spec.bits > 4:
        return f"has {spec.bits} bits in groups, and XNNPACK 4; train with granularity: channel, or --to onnx holds it"
    if spec.group_size and spec.group_size % GROUP_MULTIPLE:
        return f"has groups of {spec.group_size}, and XNNPACK multiples of {GROUP_MULTIPLE}; --to onnx holds it"
    return None


def _check_scales(model: QuantizedModel) -> None:
    """Raise an ArtifactError for a scale that the program would round; the layer is named."""
    for name, layer, tensor in _weights(model):
        if kind(layer) == INT4:
            exact(tensor.scale, torch.bfloat16, name, METHOD)
        elif kind(layer) == INT8:
            factor = model.activation_scale(name).double() if layer.has_activation_scale else 1.0
            exact(tensor.scale.double() * factor, torch.float32, name, METHOD)


def _lowered(model: QuantizedModel, name: str, layer: FrozenLayer) -> nn.Module:
    entry = model.layers[name]
    tensor = None if entry.weight is None else model.quantized(entry.tied or name)
    return lowered(layer, entry, tensor, model.activation_scale(name) if entry.has_activation_scale else None)


def _weights(model: QuantizedModel) -> Iterator[tuple[str, QuantizedLayer, QuantizedTensor]]:
    """Yield (name, layer, weight) of each layer with a quantized weight, one at a time."""
    for name, layer in model.layers.items():
        if layer.weight is not None:
            tensor = model.quantized(layer.tied or name)
            yield name, layer, QuantizedTensor(tensor.codes.cpu(), tensor.scale.cpu(), tensor.spec, tensor.zero_point)


def _notes(model: QuantizedModel, kinds: dict[str, str]) -> list[str]:
    counts = ", ".join(f"{list(kinds.values()).count(how)} in {how}" for how in sorted(set(kinds.values())))
    notes = [f"XNNPACK runs {len(kinds)} quantized layers: {counts}"]
    slow = [name for name in kinds if kinds[name] == FLOAT32]
    if slow:
        more = f" and {len(slow) - 3} more" if len(slow) > 3 else ""
        notes.append(
            f"warning: {', '.join(slow[:3])}{more}: XNNPACK has no integer kernel for these (it wants a trained input "
            "scale, one weight scale a channel and no groups of channels): their weights are q * s in float32"
        )
    dynamic = [layer for layer in model.layers.values() if layer.type == "Linear" and not layer.has_activation_scale]
    trained = sum(layer.activation is Dynamic.int8_token for layer in dynamic)
    if dynamic:
        notes.append(
            f"{METHOD} rounds the inputs of {len(dynamic)} layers to int8 for each token at run time: "
            f"{trained} of {len(dynamic)} were trained with exactly that"
            + ("" if trained == len(dynamic) else " (policy: dynamic: int8_token)")
        )
    return notes


def _lower(network: nn.Module, example: Tensor, longest: int | None, source: str) -> Any:
    """Return an ExecuTorch program; with ``longest``, for any number of tokens up to it.

    Raises:
        ArtifactError: torch cannot export the network, or XNNPACK leaves a quantized layer out.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    shapes = None if longest is None else ({1: torch.export.Dim("tokens", min=2, max=longest)},)
    try:
        exported = torch.export.export(network, (example,), dynamic_shapes=shapes)
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    except Exception as error:  # torch.export's and ExecuTorch's own, which share no base
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{source} cannot become an ExecuTorch program: {reason}") from error
    nodes = [str(node.target) for node in edge.exported_program().graph.nodes]
    left = [name for name in nodes if any(kind in name for kind in ("quantize_affine", "quantized_decomposed"))]
    if left:
        raise ArtifactError(f"XNNPACK does not take {len(left)} operations of quantized layers of {source}")
    return edge.to_executorch()


def _longest(model: QuantizedModel) -> int | None:
    """Return the longest input of a transformers language model; None for another."""
    config = (model.architecture or {}).get("transformers") or {}
    return min(LONGEST, config.get("max_position_embeddings") or LONGEST) if "vocab_size" in config else None


def _compare_file(file: Path, model: QuantizedModel, kinds: dict[str, str]) -> list[tuple[str, str]]:
    """Look for every integer layer's packed codes and scales.

    Raises:
        ArtifactError: some are not there; the layers are named.
    """
    total, count, missing = 0, 0, []
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for name, layer, tensor in _weights(model):
            if kinds[name] == FLOAT32:
                continue
            scale = model.activation_scale(name) if layer.has_activation_scale else None
            constants = () if scale is None else int8_constants(layer.activation)
            four = kinds[name] == INT4
            parts = _int4_parts(tensor, constants) if four else _int8_parts(tensor, constants, scale)
            if any(content.find(part.contiguous().view(torch.uint8).numpy().tobytes()) < 0 for part in parts):
                missing.append(name)
            total, count = total + tensor.codes.numel(), count + 1
    if missing:
        raise ArtifactError(f"{file} lacks the codes or scales of {', '.join(missing)}")
    return [("codes and scales in the file", f"{count} layers, {total:,} codes, equal in every bit")]


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
            program = bytes(_lower(_lowered(model, name, layer).eval(), x, None, name).buffer)
            gap, largest = _gap(_run(program, x, batched=True), layer(x), TOLERANCE, f"the outputs of {name!r} alone")
            return [(f"ExecuTorch, {name}", f"differs by at most {gap:.3g} (largest {largest:.3g}) on {list(x.shape)}")]
    return []


def _run(program: Path | bytes, x: Tensor, batched: bool = False) -> Tensor:
    """Return what ExecuTorch's runtime makes of x, one row at a time unless the program takes the batch."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(program).load_method("forward")
    return torch.cat([method.execute([part])[0].clone() for part in ([x] if batched else x.split(1))])


def _gap(found: Tensor, expected: Tensor, tolerance: float, what: str) -> tuple[float, float]:
    if found.shape != expected.shape:
        raise ArtifactError(f"{what} have the shape {list(found.shape)}, not {list(expected.shape)}")
    gap, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not gap <= tolerance * largest:
        raise ArtifactError(f"{what} differ by {gap:g} (largest {largest:g})")
    return gap, largest


def _need() -> None:
    if find_spec("executorch") is None:
        raise ArtifactError("this needs executorch: pip install executorch, in an environment with this torch")
