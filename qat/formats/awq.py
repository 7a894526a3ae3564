"""AWQ "gemm": what vLLM, SGLang, gptqmodel, onnxruntime-genai and mlx-lm read; it holds asymmetric weights.

A module M with weight (N, K) in groups of g along K, u = code + 8, stores

    M.qweight  int32 (K, N/8)    u packed along N: nibble i of word j, low bits first, is output 8*j + ORDER[i]
    M.qzeros   int32 (K/g, N/8)  unsigned zero points packed in the same way; 8 where symmetric
    M.scales   float16 (K/g, N)

with ORDER = 0 2 4 6 1 3 5 7, and no M.weight; w = scale * (u - zero point). Bits and group size are one for the whole
model, so scales are repeated where layers differ. Source: AutoAWQ's WQLinear_GEMM; onnxruntime-genai 0.18's loader.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..numerics import QuantizedTensor
from ..quantized_model import QuantizedLayer, QuantizedModel
from ..spec import QuantSpec
from . import genai
from . import huggingface as hf
from .comparison import compare_own
from .integer_linears import exact, grid, marlin_notes, one_grid, pack_words, tensors, unpack_words, weight_only_layers
from .shards import ShardWriter
from .stored_tensors import StoredTensors

METHOD = "awq"
PARTS = ("qweight", "qzeros", "scales")
GROUP_SIZES = (128, 64, 32)
BITS = 4
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
INVERSE = [0, 4, 1, 5, 2, 6, 3, 7]


def write(model: QuantizedModel, folder: Path) -> list[str]:
    """Write a model of transformers into an empty folder; return notes on what runtimes make of it.

    Raises:
        ArtifactError: layers that the format cannot hold exactly; each is named with its fix.
        OSError: the disk is full, or cannot be written.
    """
    layers = weight_only_layers(model, METHOD)
    hf.refuse_fused_experts(model, METHOD)
    size = one_grid(layers, METHOD, GROUP_SIZES)
    shards = ShardWriter(folder)
    matrices = hf.write_dense(model, shards)
    for name, tensor in tensors(model):
        scale, zero_point = grid(tensor, tensor.codes.shape[1] // size)
        shards.add(f"{name}.qweight", pack_outputs(tensor.codes.t()))
        shards.add(f"{name}.qzeros", pack_outputs(zero_point.t()))
        shards.add(f"{name}.scales", exact(scale, torch.float16, name, METHOD).t())
    shards.close()
    skipped = hf.skipped_layers(model, matrices)
    description = {
        "quant_method": METHOD,
        "bits": BITS,
        "group_size": size,
        "zero_point": True,
        "version": "gemm",
        "lm_head": "lm_head" in layers,
        "modules_to_not_convert": skipped or None,
    }
    hf.write_folder(model, folder, METHOD, {"quantization_config": description}, "vllm serve .")
    notes = [f"{METHOD}: {hf.WEIGHTS_ONLY}", *genai.notes(model, skipped)]
    return notes + marlin_notes(layers, dict.fromkeys(layers, size))


def read(folder: Path) -> QuantizedModel:
    """Open an AWQ gemm folder of any writer; tensors are read when asked for.

    Raises:
        ArtifactError: missing or damaged files, or another version of the layout.
    """
    config, quantization, stored = hf.read_folder(folder, METHOD)
    bits, version = quantization.get("bits"), str(quantization.get("version", "gemm")).lower()
    if bits != BITS or version != "gemm":
        raise ArtifactError(f"{folder} has bits {bits} and version {version!r}: 4 bits and 'gemm' can be read")
    layers = {}
    for name in (key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")):
        try:
            columns = stored.header(f"{name}.qweight")[0][0]
            (groups, rows), dtype = stored.header(f"{name}.scales")
            symmetric = not _zero_points(stored, name).any()
        except KeyError as error:
            raise ArtifactError(f"{folder}: layer {name!r} cannot be read: {error} is missing") from None
        if columns % groups:
            raise ArtifactError(f"{folder}: layer {name!r}: {groups} groups do not divide its {columns} inputs")
        spec = QuantSpec(BITS, None, columns // groups, True, symmetric, hf.FLOATS[dtype])
        layers[name] = QuantizedLayer("Linear", [rows, columns], spec, None)

    def quantized(name: str) -> QuantizedTensor:
        codes = unpack_outputs(stored[f"{name}.qweight"]).t().contiguous()
        zero_point = None if layers[name].weight.symmetric else _zero_points(stored, name)
        return QuantizedTensor(codes, stored[f"{name}.scales"].t().contiguous(), layers[name].weight, zero_point)

    return hf.to_quantized_model(folder, config, stored, layers, quantized, PARTS)


def verify(folder: Path, model: QuantizedModel) -> list[tuple[str, str]]:
    """Read the export back, with this package and with onnxruntime-genai's loader; return the rows of a table.

    Raises:
        ArtifactError: anything differs.
    """
    return compare_own(model, read(folder)) + genai.compare_folder(folder, model, METHOD)


def pack_outputs(values: Tensor) -> Tensor:
    """Pack int8 values (rows, N) of 4 bits into int32 (rows, N/8), each eight in AWQ's order."""
    return pack_words(values.unflatten(1, (-1, 8))[..., ORDER].flatten(1), BITS)


def unpack_outputs(words: Tensor) -> Tensor:
    """Undo ``pack_outputs``."""
    values = unpack_words(words, BITS, words.shape[1] * 8)
    return values.unflatten(1, (-1, 8))[..., INVERSE].flatten(1)


def _zero_points(stored: StoredTensors, name: str) -> Tensor:
    """Return int8 zero points (N, K/g) in the range of the codes."""
    return unpack_outputs(stored[f"{name}.qzeros"]).t().contiguous()
