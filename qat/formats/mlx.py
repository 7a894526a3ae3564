"""MLX affine: what mlx and mlx-lm read, on Apple silicon and on a Linux CPU.

A module M with weight (N, K) in groups of g = 32, 64 or 128 along K, u = code + 2^(bits-1), stores

    M.weight  uint32 (N, K*bits/32)  u along K, a bit stream a row: 4-bit j at bits 4*(j%8) of word j/8
    M.scales  (N, K/g)               in the model's dtype
    M.biases  (N, K/g)               -zero point * scale, unsigned zero point: -8 * scale where 4 bits are symmetric

w = scale * u + bias. config.json says {"group_size", "bits", "mode": "affine"} under "quantization" and again under
"quantization_config", with an entry of its own for a module that differs. Source: mlx_lm 0.32's utils.load_model.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy
import torch
from torch import Tensor

from ..adapters import refuse_beside
from ..errors import ArtifactError
from ..numerics import QuantizedTensor
from ..quantized_model import QuantizedLayer, QuantizedModel, shares_embedding
from ..spec import QuantSpec
from . import huggingface as hf
from . import mlx_client
from .comparison import compare, compare_own, not_compared, small
from .integer_linears import exact, grid, largest_size, pack_words, refuse, tensors, unpack_words, weight_only_layers
from .shards import ShardWriter
from .stored_tensors import StoredTensors

METHOD = "mlx"
PARTS = ("weight", "scales", "biases")
GROUP_SIZES = (128, 64, 32)
BITS = (2, 3, 4, 5, 6, 8)


def write(model: QuantizedModel, folder: Path) -> list[str]:
    """Write a model of transformers into an empty folder; return notes on what runtimes make of it.

    Raises:
        ArtifactError: layers that the format cannot hold exactly; each is named with its fix.
        OSError: the disk is full, or cannot be written.
    """
    refuse_beside(model, METHOD)
    layers = weight_only_layers(model, METHOD, embeddings=True)
    config = model.architecture["transformers"]
    mlx_client.refuse_other_arithmetic(config)
    if hf.ties_embeddings(model):
        layers = {name: layer for name, layer in layers.items() if not shares_embedding(model, name)}
    hf.refuse_fused_experts(model, METHOD)
    sizes = {name: largest_size({name: layer}, METHOD, GROUP_SIZES) for name, layer in layers.items()}
    shards, dtype = ShardWriter(folder), hf.model_dtype(model)
    hf.write_dense(model, shards)
    for name, tensor in tensors(model, layers):
        bits = _bits(tensor.spec)
        scale, zero_point = grid(tensor, tensor.codes.shape[1] // sizes[name])
        if bits > 4 or tensor.spec.scale_dtype != "bfloat16":
            _require_16_bits(scale, name)
        biases = -(zero_point.double() + 2 ** (bits - 1)) * scale.double()
        shards.add(f"{name}.weight", pack_words(tensor.codes, bits).view(torch.uint32))
        shards.add(f"{name}.scales", exact(scale, dtype, name, METHOD))
        shards.add(f"{name}.biases", exact(biases, dtype, name, METHOD))
    shards.close()
    kinds = {
        name: {"group_size": sizes[name], "bits": _bits(layer.weight), "mode": "affine"}
        for name, layer in layers.items()
    }
    commonest = Counter(tuple(kind.values()) for kind in kinds.values()).most_common(1)[0][0]
    description = dict(zip(("group_size", "bits", "mode"), commonest, strict=True))
    description.update({name: kind for name, kind in kinds.items() if tuple(kind.values()) != commonest})
    entries = {"quantization": description, "quantization_config": description}
    entries |= mlx_client.looked_for(config)
    hf.write_folder(model, folder, METHOD, entries, "mlx_lm.generate --model . --prompt 'Hello'")
    rounding = "" if dtype == torch.float32 else f"; it multiplies in {str(dtype).removeprefix('torch.')}"
    return [f"{METHOD}: {hf.WEIGHTS_ONLY}{rounding}", *mlx_client.notes(config, dtype)]


def read(folder: Path) -> QuantizedModel:
    """Open an MLX folder whose biases are whole multiples of its scales, as exports of this package have them.

    Raises:
        ArtifactError: missing or damaged files, another mode, or a grid without an integer zero point.
    """
    config, quantization, stored = hf.read_folder(folder, METHOD)
    layers = {}
    for name in (key.removesuffix(".scales") for key in stored if key.endswith(".scales")):
        values = {**quantization, **(quantization.get(name) or {})}
        bits, size = values.get("bits"), values.get("group_size")
        try:
            rows, words = stored.header(f"{name}.weight")[0]
            columns = words * 32 // bits
            if values.get("mode", "affine") != "affine" or bits not in BITS or columns % size:
                raise ValueError(f"mode {values.get('mode')!r}, {bits} bits in groups of {size}")
            symmetric = not _zero_points(stored, name, bits).any()
            spec = QuantSpec(bits, None, size, True, symmetric, hf.FLOATS[stored.header(f"{name}.scales")[1]])
        except (KeyError, ValueError, TypeError) as error:
            raise ArtifactError(
                f"{folder}: layer {name!r} cannot be read ({error}): affine weights with positive scales, and biases "
                "that are whole multiples of them, can"
            ) from None
        layers[name] = QuantizedLayer("Linear", [rows, columns], spec, None)

    layers = hf.typed_layers(config, layers)

    def quantized(name: str) -> QuantizedTensor:
        spec = layers[name].weight
        codes = unpack_words(stored[f"{name}.weight"].view(torch.int32), spec.bits, layers[name].shape[1])
        zero_point = None if spec.symmetric else _zero_points(stored, name, spec.bits)
        return QuantizedTensor(codes, stored[f"{name}.scales"], spec, zero_point)

    return hf.to_quantized_model(folder, config, stored, layers, quantized, PARTS)


def verify(folder: Path, model: QuantizedModel) -> list[tuple[str, str]]:
    """Read the export back, with this package and with mlx; return the rows of a table.

    Raises:
        ArtifactError: anything differs.
    """
    rows = compare_own(model, read(folder))
    try:
        import mlx.core as mx
        import mlx_lm  # noqa: F401  which runs what mlx reads
    except ImportError:
        return [*rows, (METHOD, "not installed: pip install 'mlx[cpu]' mlx-lm (without [cpu] on a Mac)")]
    read_back = read(folder)
    _, _, stored = hf.read_folder(folder, METHOD)

    def one(name: str) -> tuple[Tensor, Tensor]:
        name = name if f"{name}.scales" in stored else model.layers[name].tied
        spec = read_back.layers[name].weight
        parts = [mx.array(stored[f"{name}.{part}"].float().numpy()) for part in ("scales", "biases")]
        words = mx.array(stored[f"{name}.weight"].numpy())
        ones, zero_points = mx.ones_like(parts[0]), mx.round(parts[1] / parts[0])
        made = [mx.dequantize(words, *pair, spec.group_size, spec.bits) for pair in ((ones, zero_points), parts)]
        return tuple(torch.from_numpy(numpy.array(x)) for x in made)

    rows += compare(model, one, METHOD)
    if not small(model) or hf.model_dtype(model) != torch.float32:
        return [*rows, not_compared("mlx-lm", "this is no small language model in float32")]
    return [*rows, mlx_client.compare_outputs(folder, model)]


def _bits(spec: QuantSpec) -> int:
    return 8 if spec.bits == 7 else spec.bits


def _require_16_bits(scale: Tensor, name: str) -> None:
    """Refuse scales that float32 rounds when it multiplies them by u, since MLX adds the bias after that."""
    if not ((scale.bfloat16() == scale) | (scale.half() == scale)).all():
        refuse(METHOD, {name: "has scales of more than 16 bits; train with scale_dtype=bfloat16, or use --to native"})


def _zero_points(stored: StoredTensors, name: str, bits: int) -> Tensor:
    """Return int8 zero points (N, K/g) in the range of the codes."""
    scales, biases = (stored[f"{name}.{part}"].double() for part in ("scales", "biases"))
    zero_point = (-biases / scales).round()
    if not ((scales > 0).all() and (zero_point * scales == -biases).all()):
        raise ValueError("its biases are no whole multiples of its scales")
    if not ((zero_point >= 0) & (zero_point < 2**bits)).all():
        raise ValueError("a zero point outside the codes")
    return (zero_point - 2 ** (bits - 1)).to(torch.int8)
