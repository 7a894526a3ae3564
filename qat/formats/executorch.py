"""ExecuTorch: a program for phones, ``model.pte``, whose quantized layers XNNPACK runs on integers.

Each quantized layer becomes a module of ``executorch_layers``, the network goes through torch.export, and ExecuTorch's
XNNPACK partitioner packs the weights into the file, where a layer of N outputs and K inputs has

    int4  codes uint8 (N, K/2): u = code + 8, the even input in the low nibble; scales bf16 (N, K/g), g = 32, ... or K
    int8  codes int8 (N, K), of a convolution (N, height, width, K); scales float32 (N), times the input's if trained

At run time XNNPACK rounds the input of a linear layer without a trained scale to int8 for each token: what
``int8_token`` trains for. All else runs in float32.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from ..adapters import refuse_beside
from ..errors import ArtifactError, some_of
from ..frozen_model import to_model
from ..inputs import described, mapped, tensors
from ..layers import frozen_layers
from ..quantized_model import QuantizedLayer, QuantizedModel
from ..spec import Dynamic
from . import executorch_client
from .companions import copy_companions
from .executorch_disk import OnDisk
from .executorch_layers import FLOAT32, GROUP_MULTIPLE, INT4, INT8, kind
from .executorch_program import lower, lowered_layer, quantized_weights
from .integer_linears import EMBEDDING_FORMATS, exact, other_grid, refuse
from .model_card import write_card
from .onnx import example_input
from .onnx_trace import LogitsOnly

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
        ArtifactError: names the layers that XNNPACK cannot hold exactly; or torch cannot export the model; or the disk
            has no room for what compiling takes.
        OSError: the disk is full, or cannot be written.
    """
    refuse_beside(model, METHOD)
    refuse(METHOD, {name: problem for name, layer in model.layers.items() if (problem := _problem(layer))})
    _check_scales(model)
    _need()
    example, longest = example_input(model, 1), _longest(model)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        disk = OnDisk(Path(made))
        frozen = to_model(replace(model, dense=disk.floats(model.dense)), network, codes=False).float()
        kinds = {name: kind(model.layers[name], layer) for name, layer in frozen_layers(frozen)}
        print(_check_room(model, kinds, folder), flush=True)
        wrapped = LogitsOnly(frozen, example).eval()
        replaced = {}
        for name, layer in frozen_layers(frozen):
            replaced[layer] = disk.keep_(lowered_layer(model, name, layer))
        for name, layer in list(wrapped.named_modules(remove_duplicate=False)):
            if layer in replaced:
                wrapped.set_submodule(name, replaced[layer])
        program = lower(wrapped, tensors(example), longest, model.source, disk)
        with (folder / FILE).open("wb") as stream:
            program.write_to_file(stream)
    copy_companions(model, folder)
    shapes = described(mapped(example, lambda part: part[0]))
    several = len(tensors(example)) > 1
    what = f"inputs of shapes {shapes}" if several else f"one input of shape {shapes}"
    if longest:
        what = (f"{what} or of " if several else "") + f"1 to {longest} tokens, without a cache"
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
    return executorch_client.compare(folder / FILE, model, to_model(model, network).float(), example_input(model, 8))


def _problem(layer: QuantizedLayer) -> str | None:
    """Return what keeps a layer from being exact in XNNPACK, and the fix; None for nothing."""
    spec = layer.weight
    if layer.type == "Embedding":
        return EMBEDDING_FORMATS.format(METHOD)
    if layer.type not in ("Linear", "Conv2d"):
        return f"is a {layer.type}, which our {METHOD} files have no place for; --to onnx holds it"
    if spec is not None and not spec.holds_integers:
        return other_grid(layer, METHOD)
    if layer.activation is Dynamic.q8_0:
        return f"trained with its input rounded as q8_0, and {METHOD} rounds as int8_token; --to gguf keeps that"
    if layer.has_activation_scale and not layer.activation.symmetric:
        return f"trained with an offset of its input, which {METHOD} would drop; --to onnx keeps it"
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
    for name, layer, tensor in quantized_weights(model):
        if kind(layer) == INT4:
            exact(tensor.scale, torch.bfloat16, name, METHOD)
        elif kind(layer) == INT8:
            factor = model.activation_scale(name).double() if layer.has_activation_scale else 1.0
            exact(tensor.scale.double() * factor, torch.float32, name, METHOD)


def _notes(model: QuantizedModel, kinds: dict[str, str]) -> list[str]:
    counts = ", ".join(f"{list(kinds.values()).count(how)} in {how}" for how in sorted(set(kinds.values())))
    notes = [f"XNNPACK runs {len(kinds)} quantized layers: {counts}"]
    slow = [name for name in kinds if kinds[name] == FLOAT32]
    if slow:
        notes.append(
            f"warning: {some_of(slow)}: XNNPACK has no integer kernel for these (it wants a trained input "
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


def _check_room(model: QuantizedModel, kinds: dict[str, str], folder: Path) -> str:
    """Return a line about the memory and the disk that compiling takes: a tensor at a time, and files for all of them.

    The float tensors lie on the disk already, as they are read.

    Raises:
        ArtifactError: the disk has less than the rest, which would otherwise be seen after many minutes.
    """
    bits = {INT4: 4.5, INT8: 8, FLOAT32: 32}  # of groups of 32
    sizes = {name: math.prod(model.layers[name].shape) for name in kinds if model.layers[name].weight is not None}
    program = sum(size * bits[kinds[name]] / 8 for name, size in sizes.items())
    before = sum(size * (4 if kinds[name] == FLOAT32 else 1) for name, size in sizes.items())
    dense = [4 * tensor.numel() for tensor in model.dense.values()]
    disk = before + 2 * program + 2 * sum(dense)  # as the compiler reads them, as it makes them, and in FILE
    free = shutil.disk_usage(folder).free
    if free < disk:
        raise ArtifactError(
            f"{METHOD}'s compiler needs {disk / 2**30:.1f} GiB of disk at {folder.parent} until it is done, and "
            f"{free / 2**30:.1f} are free"
        )
    largest = max([6 * size / 4 for size in dense] + [4 * size for size in sizes.values()])
    return (
        f"{METHOD}'s compiler takes about {largest / 2**30:.1f} GiB of memory beside its own, for the largest tensor, "
        f"and {disk / 2**30:.1f} GiB of disk, of which {(program + sum(dense)) / 2**30:.1f} stay"
    )


def _longest(model: QuantizedModel) -> int | None:
    """Return the longest input of a transformers language model; None for another."""
    config = (model.architecture or {}).get("transformers") or {}
    return min(LONGEST, config.get("max_position_embeddings") or LONGEST) if "vocab_size" in config else None


def _need() -> None:
    if find_spec("executorch") is None:
        raise ArtifactError("this needs executorch: pip install executorch, in an environment with this torch")
