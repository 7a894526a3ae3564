"""What formats of integer linear layers share: which layers fit, scales and zero points a group, words of codes.

Codes are stored unsigned, u = code + 2^(bits-1), and so are zero points.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import ArtifactError, some_of
from ..numerics import QuantizedTensor
from ..packing import pack, unpack
from ..quantized_model import QuantizedLayer, QuantizedModel
from ..spec import Codebook, Dynamic, QuantSpec

ROUNDS = {Dynamic.int8_token: "executorch", Dynamic.q8_0: "gguf"}  # the format whose runtime rounds inputs that way
EMBEDDING_FORMATS = "is an Embedding, which our {} files have no place for; --to gguf, mlx or onnx holds it"


def weight_only_layers(
    model: QuantizedModel, method: str, codebooks: tuple[Codebook | None, ...] = (None,), embeddings: bool = False
) -> dict[str, QuantizedLayer]:
    """Return the layers by name, all of which a weight-only format of linear layers can hold.

    Args:
        model: what is exported.
        method: the format's name.
        codebooks: the ones it holds; None stands for even grids.
        embeddings: whether it holds these too.

    Raises:
        ArtifactError: the architecture is not of transformers, or layers do not fit; each is named.
    """
    if set(model.architecture or ()) != {"transformers"}:
        raise ArtifactError(
            f"{method} folders hold models of transformers, and {model.source} is none: export it with --to onnx, "
            "or keep it with --to native"
        )
    problems = {}
    for name, layer in model.layers.items():
        if layer.type == "Embedding":
            if not embeddings:
                problems[name] = EMBEDDING_FORMATS.format(method)
        elif layer.type != "Linear":
            fix = "onnx" if layer.weight is None or layer.weight.holds_integers else "native"
            problems[name] = f"is a {layer.type}, and {method} holds linear layers only; --to {fix} holds it"
        elif isinstance(layer.activation, Dynamic):
            problems[name] = (
                f"trained with its input rounded as {layer.activation.value}, which {method} would drop; --to "
                f"{ROUNDS[layer.activation]} rounds so, or train with dynamic: null"
            )
        elif layer.activation is not None:
            problems[name] = (
                f"trained with its input quantized to {layer.activation}, which {method} would drop; --to onnx keeps "
                "it, or train with activation: null"
            )
        elif layer.weight.codebook not in codebooks or layer.weight.zero_point_dtype is not None:
            problems[name] = other_grid(layer, method)
    refuse(method, problems)
    return model.layers


def other_grid(layer: QuantizedLayer, method: str) -> str:
    """Return what to say of a layer whose levels a format does not have, and the format that holds them."""
    holds = {None: "compressed-tensors", Codebook.nf4: "bitsandbytes", Codebook.nf4_double: "bitsandbytes"}
    elsewhere = layer.type == "Linear" and layer.weight.zero_point_dtype is None
    fix = holds.get(layer.weight.codebook, "native") if elsewhere else "native"
    return f"has {layer.weight} weights, whose levels {method} does not have; --to {fix} holds it"


def refuse(method: str, problems: dict[str, str]) -> None:
    """Raise an ArtifactError that lists {layer name: what is wrong with it, and the fix}; nothing if it is empty."""
    if problems:
        lines = "".join(f"\n  {name!r} {problem}" for name, problem in problems.items())
        raise ArtifactError(f"{method} cannot hold these layers exactly:{lines}")


def tensors(
    model: QuantizedModel, layers: dict[str, QuantizedLayer] | None = None
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield each layer's quantized weight by name, on the CPU, one at a time; layers that share one get a copy each.

    Args:
        model: what holds them.
        layers: those of its layers that are asked for; all by default.
    """
    for name, layer in (model.layers if layers is None else layers).items():
        tensor = model.quantized(layer.tied or name)
        zero_point = None if tensor.zero_point is None else tensor.zero_point.cpu()
        levels = None if tensor.levels is None else tensor.levels.cpu()
        nested = None if tensor.nested is None else tensor.nested.cpu()
        yield name, QuantizedTensor(tensor.codes.cpu(), tensor.scale.cpu(), tensor.spec, zero_point, levels, nested)


def largest_size(
    layers: dict[str, QuantizedLayer], method: str, sizes: tuple[int, ...], other: str = "compressed-tensors"
) -> int:
    """Return the largest group size, of those a format has, that repeats each layer's scales exactly.

    Args:
        layers: by name.
        method: the format's name.
        sizes: the largest first.
        other: the format that holds any size.

    Raises:
        ArtifactError: there is none; the layers that fit none are named.
    """
    owned = {name: layer.weight.group_size or layer.shape[1] for name, layer in layers.items()}
    for size in sizes:
        if all(own % size == 0 for own in owned.values()):
            return size
    known = f"{', '.join(map(str, sorted(sizes)))}"
    fix = f"train with a multiple of {min(sizes)}, or use --to {other}"
    refuse(
        method,
        {
            name: f"has groups of {own}, and {method} has {known}; {fix}"
            for name, own in owned.items()
            if own % min(sizes)
        },
    )


def one_grid(layers: dict[str, QuantizedLayer], method: str, sizes: tuple[int, ...]) -> int | None:
    """Return the one group size of a 4-bit format whose words hold eight inputs or outputs; None per channel.

    Args:
        layers: by name.
        method: the format's name.
        sizes: the group sizes it has, the largest first; none of them to write each channel as one group.

    Raises:
        ArtifactError: layers that do not fit; each is named.
    """
    problems = {}
    for name, layer in layers.items():
        if layer.weight.bits > 4:
            problems[name] = (
                f"has {layer.weight.bits} bits, and {method} 4 for all; --to compressed-tensors or mlx holds it"
            )
        elif layer.shape[0] % 8 or layer.shape[1] % 8:
            problems[name] = (
                f"is {layer.shape}, and {method} packs eight of each to a word; --to compressed-tensors holds it"
            )
    refuse(method, problems)
    return largest_size(layers, method, sizes) if sizes else None


def container_bits(spec: QuantSpec) -> int:
    """Return 4 or 8: codes of fewer bits are in the range of the next container, where they are the same integers."""
    return 4 if spec.bits <= 4 else 8


def grid(tensor: QuantizedTensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return scale and int8 zero point (0 if symmetric), each (N, groups): repeated where fewer of them are stored."""
    zero_point = torch.zeros_like(tensor.scale, dtype=torch.int8) if tensor.zero_point is None else tensor.zero_point
    return tuple(spread(values, tensor.codes.shape[0], groups) for values in (tensor.scale, zero_point))


def spread(values: Tensor, rows: int, groups: int) -> Tensor:
    """Repeat scales or zero points, (1, 1), (N, 1) or (N, G), to (rows, groups)."""
    return values.expand(rows, -1).repeat_interleave(groups // values.shape[1], 1)


def exact(values: Tensor, dtype: torch.dtype, name: str, method: str) -> Tensor:
    """Return float values in ``dtype``, which must hold each of them exactly.

    Raises:
        ArtifactError: it does not; the layer is named.
    """
    stored = values.to(dtype)
    off = int((stored.to(values.dtype) != values).sum())
    if off:
        short = str(dtype).removeprefix("torch.")
        fix = "train with scale_dtype=bfloat16 and scales of at least 2^-17, or use --to native"
        refuse(method, {name: f"has {off} of {values.numel()} scales or biases that {short} cannot hold; {fix}"})
    return stored


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes (rows, columns) into int32 (rows, ceil(columns * bits / 32)), low bits first."""
    stream = pack(codes, bits)
    padded = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4))
    return padded.contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo ``pack_words``: int32 (rows, words) to int8 codes (rows, columns)."""
    stream = words.reshape(-1).view(torch.uint8)  # flat, since a transposed single column keeps odd strides
    return unpack(stream.view(words.shape[0], -1), bits, columns)


def marlin_notes(layers: dict[str, QuantizedLayer], groups: dict[str, int]) -> list[str]:
    """Return a warning that names the layers whose shape the GPU kernel Marlin refuses; none if it takes all.

    Args:
        layers: by name.
        groups: layer name -> the stored group size, -1 per channel.
    """
    odd = [
        name
        for name, layer in layers.items()
        if layer.shape[0] % 64 or layer.shape[1] % 128 or groups[name] not in (-1, 32, 64, 128)
    ]
    if not odd:
        return []
    return [
        f"warning: {some_of(odd)}: Marlin, the GPU kernel of vLLM and SGLang, wants outputs in multiples "
        "of 64, inputs in multiples of 128 (on each tensor-parallel shard) and groups of 32, 64, 128 or a channel; it "
        "refuses these or runs them slowly: leave them in full precision, or train with such a group size"
    ]
