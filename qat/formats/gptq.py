"""GPTQ: what vLLM, SGLang, gptqmodel, transformers, onnxruntime-genai and llama.cpp's converter read.

A module M with weight (N, K) in groups of g along K, u = code + 8, stores

    M.qweight  int32 (K/8, N)    u packed along K: input 8*i + j at bits 4*j of word i
    M.qzeros   int32 (K/g, N/8)  zero points packed along N in the same way; version 1 stores zero point - 1
    M.scales   float16 (K/g, N)
    M.g_idx    int32 (K,)        k // g

and no M.weight; w = scale * (u - zero point). Version 1 (checkpoint_format "gptq") is written, where the symmetric zero
point 8 is the nibble 7: onnxruntime-genai reads version 2 wrongly and without an error. Only symmetric weights are
written: vLLM refuses others, and AWQ holds them. Bits and group size are one for the whole model, so scales are
repeated where layers differ. Source: gptqmodel 7, vLLM's gptq_marlin, onnxruntime-genai 0.18's loader.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..errors import ArtifactError
from ..numerics import QuantizedTensor
from ..quantized_model import QuantizedLayer, QuantizedModel
from ..spec import QuantSpec
from . import genai
from . import huggingface as hf
from .comparison import compare_own
from .integer_linears import (
    exact,
    grid,
    marlin_notes,
    one_grid,
    pack_words,
    refuse,
    tensors,
    unpack_words,
    weight_only_layers,
)
from .shards import ShardWriter
from .stored_tensors import StoredTensors

METHOD = "gptq"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
GROUP_SIZES = (128, 64, 32, 16)
BITS = 4


def write(model: QuantizedModel, folder: Path) -> list[str]:
    """Write a model of transformers into an empty folder; return notes on what runtimes make of it.

    Raises:
        ArtifactError: layers that the format cannot hold exactly; each is named with its fix.
        OSError: the disk is full, or cannot be written.
    """
    layers = weight_only_layers(model, METHOD)
    hf.refuse_fused_experts(model, METHOD)
    refuse(
        METHOD,
        {
            name: "is asymmetric, which vLLM refuses here; --to awq or compressed-tensors holds it"
            for name, layer in layers.items()
            if not layer.weight.symmetric
        },
    )
    per_channel = all(layer.weight.group_size is None for layer in layers.values())
    size = one_grid(layers, METHOD, () if per_channel else GROUP_SIZES)
    shards = ShardWriter(folder)
    matrices = hf.write_dense(model, shards)
    for name, tensor in tensors(model):
        rows, columns = tensor.codes.shape
        groups = columns // (size or columns)
        scale, _ = grid(tensor, groups)
        shards.add(f"{name}.qweight", pack_words(tensor.codes, BITS).t())
        shards.add(f"{name}.qzeros", pack_words(torch.full((groups, rows), -1, dtype=torch.int8), BITS))
        shards.add(f"{name}.scales", exact(scale, torch.float16, name, METHOD).t())
        shards.add(f"{name}.g_idx", torch.arange(columns, dtype=torch.int32) // (size or columns))
    shards.close()
    description = {
        "quant_method": METHOD,
        "bits": BITS,
        "group_size": size or -1,
        "desc_act": False,
        "sym": True,
        "lm_head": "lm_head" in layers,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"qat-lsq:{__version__}"]},
    }
    skipped = hf.skipped_layers(model, matrices)
    if skipped:
        description["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in skipped}
    hf.write_folder(model, folder, METHOD, {"quantization_config": description}, "vllm serve . --dtype bfloat16")
    notes = [f"{METHOD}: {hf.WEIGHTS_ONLY}", *genai.notes(model, skipped)]
    return notes + marlin_notes(layers, dict.fromkeys(layers, size or -1))


def read(folder: Path) -> QuantizedModel:
    """Open a GPTQ folder of any writer, version 1 or 2, symmetric or not; tensors are read when asked for.

    Raises:
        ArtifactError: missing or damaged files, act-order, or zero points on which clients disagree.
    """
    config, quantization, stored = hf.read_folder(folder, METHOD)
    bits, version = quantization.get("bits"), quantization.get("checkpoint_format", "gptq")
    if bits not in (2, 4, 8) or version not in ("gptq", "gptq_v2") or _changes_layers(quantization.get("dynamic")):
        raise ArtifactError(
            f"{folder} has bits {bits}, checkpoint_format {version!r} and dynamic {quantization.get('dynamic')}: "
            "2, 4 or 8 bits for the whole model, 'gptq' or 'gptq_v2' can be read"
        )
    layers = {}
    for name in (key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")):
        try:
            layers[name] = _layer(stored, name, bits, version)
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"{folder}: layer {name!r} cannot be read: {error}") from None

    def quantized(name: str) -> QuantizedTensor:
        layer = layers[name]
        codes = unpack_words(stored[f"{name}.qweight"].t(), bits, layer.shape[1])
        scale = stored[f"{name}.scales"].t().contiguous()
        zero_point = None if layer.weight.symmetric else _zero_points(stored, name, bits, version)
        return QuantizedTensor(codes, scale, layer.weight, zero_point)

    return hf.to_quantized_model(folder, config, stored, layers, quantized, PARTS)


def verify(folder: Path, model: QuantizedModel) -> list[tuple[str, str]]:
    """Read the export back, with this package and with onnxruntime-genai's loader; return the rows of a table.

    Raises:
        ArtifactError: anything differs.
    """
    return compare_own(model, read(folder)) + genai.compare_folder(folder, model, METHOD)


def _changes_layers(dynamic: dict | None) -> bool:
    return any(values for values in (dynamic or {}).values())


def _layer(stored: StoredTensors, name: str, bits: int, version: str) -> QuantizedLayer:
    (words, rows), _ = stored.header(f"{name}.qweight")
    (groups, _), dtype = stored.header(f"{name}.scales")
    columns = words * 32 // bits
    if columns % groups:
        raise ValueError(f"{groups} groups do not divide its {columns} inputs")
    size = columns // groups
    if f"{name}.g_idx" in stored and not torch.equal(stored[f"{name}.g_idx"].long(), torch.arange(columns) // size):
        raise ValueError("its inputs are in the order of activations (desc_act): quantize with desc_act=False")
    symmetric = not _zero_points(stored, name, bits, version).any()
    spec = QuantSpec(bits, None, None if groups == 1 else size, True, symmetric, hf.FLOATS[dtype])
    return QuantizedLayer("Linear", [rows, columns], spec, None)


def _zero_points(stored: StoredTensors, name: str, bits: int, version: str) -> Tensor:
    """Return int8 zero points (N, K/g) in the range of the codes."""
    rows = stored.header(f"{name}.scales")[0][1]
    zero_point = unpack_words(stored[f"{name}.qzeros"], bits, rows).t().contiguous()
    if version == "gptq":
        if (zero_point == 2 ** (bits - 1) - 1).any():
            raise ValueError("a zero point of 2^bits in version 1, which clients read as that or as 0")
        zero_point += 1
    return zero_point
