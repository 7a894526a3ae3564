"""compressed-tensors "pack-quantized": what vLLM, SGLang and transformers read, and llama.cpp's converter.

A module M with weight (N, K) in G groups, u = code + 2^(bits-1), stores

    M.weight_packed      int32 (N, ceil(K*bits/32))   u along K, a bit stream a row: 4-bit j at bits 4*(j%8) of word j/8
    M.weight_scale       (N, G); (N, 1) per channel   in the model's dtype
    M.weight_zero_point  int32 (ceil(N*bits/32), G)   only asymmetric: unsigned, packed in the same way along N
    M.weight_shape       int64 (2,)                   N, K

and no M.weight. Source: compressors/pack_quantized of the package compressed-tensors 0.20. A config group says bits,
symmetry and strategy for the modules it targets; a module's own name goes before the class name "Linear".
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..numerics import QuantizedTensor
from ..quantized_model import QuantizedLayer, QuantizedModel
from ..spec import Granularity, QuantSpec
from . import huggingface as hf
from .comparison import (
    as_stored_,
    compare,
    compare_logits,
    compare_own,
    logits,
    not_compared,
    one_error,
    rounding_weights,
    small,
)
from .integer_linears import (
    container_bits,
    exact,
    grid,
    marlin_notes,
    pack_words,
    tensors,
    unpack_words,
    weight_only_layers,
)
from .shards import ShardWriter

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def write(model: QuantizedModel, folder: Path) -> list[str]:
    """Write a model of transformers into an empty folder; return notes on what runtimes make of it.

    Raises:
        ArtifactError: layers that the format cannot hold exactly; each is named with its fix.
        OSError: the disk is full, or cannot be written.
    """
    layers = weight_only_layers(model, METHOD)
    shards, dtype = ShardWriter(folder), hf.model_dtype(model)
    matrices = hf.write_dense(model, shards)
    for name, tensor in tensors(model):
        bits = container_bits(tensor.spec)
        scale, zero_point = grid(tensor, tensor.scale.shape[1])
        shards.add(f"{name}.weight_packed", pack_words(tensor.codes, bits))
        shards.add(f"{name}.weight_scale", exact(scale, dtype, name, METHOD))
        shards.add(f"{name}.weight_shape", torch.tensor(tensor.codes.shape))
        if not tensor.spec.symmetric:
            shards.add(f"{name}.weight_zero_point", pack_words(zero_point.t(), bits).t())
    shards.close()
    schemes = {name: _scheme(layer.weight) for name, layer in layers.items()}
    entries = {"quantization_config": _config(schemes, list(matrices))}
    hf.write_folder(model, folder, METHOD, entries, "vllm serve .")
    return _notes(layers, schemes) + hf.fused_expert_notes(model)


def read(folder: Path) -> QuantizedModel:
    """Open a pack-quantized folder of any writer; tensors are read when asked for.

    Raises:
        ArtifactError: missing or damaged files, or a feature that integer codes on one grid a group cannot carry.
    """
    config, quantization, stored = hf.read_folder(folder, METHOD)
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if quantization.get(key):
            raise ArtifactError(f"{folder} has a {key}, which only its own runtime applies: choose a model without")
    layers = {}
    for name in (key.removesuffix(".weight_packed") for key in stored if key.endswith(".weight_packed")):
        try:
            shape = stored[f"{name}.weight_shape"].tolist()
            scale_shape, dtype = stored.header(f"{name}.weight_scale")
            spec = _spec(_arguments(quantization, name), shape, scale_shape, hf.FLOATS[dtype])
            words = -(-shape[1] * spec.bits // 32)
            if stored.header(f"{name}.weight_packed")[0] != [shape[0], words] or f"{name}.weight_g_idx" in stored:
                raise ValueError("packed in another way, or in the order of activations")
        except (KeyError, ValueError) as error:
            raise ArtifactError(
                f"{folder}: layer {name!r} cannot be read ({error}): integer weights of 2 to 8 bits in the format "
                f"{FORMAT!r}, per tensor, channel or group and without quantized activations, can"
            ) from None
        layers[name] = QuantizedLayer("Linear", shape, spec, None)

    def quantized(name: str) -> QuantizedTensor:
        layer = layers[name]
        rows, columns = layer.shape
        codes = unpack_words(stored[f"{name}.weight_packed"], layer.weight.bits, columns)
        scale = stored[f"{name}.weight_scale"]
        scale = scale.view(1, 1) if scale.numel() == 1 and layer.weight.granularity is Granularity.tensor else scale
        zero_point = None
        if not layer.weight.symmetric:
            zero_point = stored[f"{name}.weight_zero_point"]
            if zero_point.dtype == torch.int32:
                zero_point = unpack_words(zero_point.t(), layer.weight.bits, rows).t()
            zero_point = zero_point.to(torch.int8).reshape(scale.shape).contiguous()
        return QuantizedTensor(codes, scale, layer.weight, zero_point)

    return hf.to_quantized_model(folder, config, stored, layers, quantized, PARTS)


def verify(folder: Path, model: QuantizedModel) -> list[tuple[str, str]]:
    """Read the export back, with this package and the client's own reader; return the rows of a table.

    Raises:
        ArtifactError: anything differs.
    """
    rows = compare_own(model, read(folder))
    try:
        from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, unpack_from_int32
        from compressed_tensors.quantization import QuantizationScheme
        from transformers import AutoModelForCausalLM, CompressedTensorsConfig
    except ImportError:
        return [*rows, (METHOD, "not installed: pip install compressed-tensors accelerate transformers")]
    _, quantization, stored = hf.read_folder(folder, METHOD)

    def one(name: str) -> tuple[Tensor, Tensor]:
        parts = {part: stored[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in stored}
        parts["weight_scale"] = parts["weight_scale"].float()  # as the loader does for a float32 model
        scheme = QuantizationScheme(targets=[name], format=FORMAT, weights=_arguments(quantization, name))
        made = PackedQuantizationCompressor.decompress(parts, scheme)
        codes = unpack_from_int32(parts["weight_packed"], scheme.weights.num_bits, parts["weight_shape"]).int()
        if "weight_zero_point" in made:
            zero_point = made["weight_zero_point"].int()
            codes = codes - zero_point.repeat_interleave(codes.shape[1] // zero_point.shape[1], 1)
        return codes, made["weight"]

    rows += compare(model, one, METHOD)
    if not small(model):
        return [*rows, not_compared("transformers")]
    options, as_client, dtype = {}, None, hf.model_dtype(model)
    if any(not layer.weight.symmetric for layer in model.layers.values()):
        if len(quantization["config_groups"]) > 1:
            return [*rows, not_compared("transformers", "it takes zero points in one config group only")]
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        # It dequantizes in the scales' dtype, whatever it is asked for.
        as_client = None if dtype == torch.float32 else rounding_weights(model, dtype)

    def client(tokens: Tensor) -> Tensor:
        with one_error(f"transformers fails to open {folder} or to run it (--to torchao may do there)"):
            opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
            return logits(as_stored_(opened, dtype), tokens)

    return [*rows, compare_logits(model, client, "transformers", as_client)]


def _scheme(spec: QuantSpec) -> tuple[int, int | None, bool]:
    """Return (stored bits, group size or None per channel, symmetric): layers with the same go into one group."""
    return container_bits(spec), spec.group_size, spec.symmetric


def _config(schemes: dict[str, tuple], ignore: list[str]) -> dict[str, Any]:
    """The commonest scheme targets the class Linear; further ones name their layers."""
    groups = {}
    for index, (scheme, _) in enumerate(Counter(schemes.values()).most_common()):
        bits, size, symmetric = scheme
        groups[f"group_{index}"] = {
            "targets": [name for name in schemes if schemes[name] == scheme] if index else ["Linear"],
            "format": FORMAT,
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if size is None else "group",
                "group_size": size,
                "dynamic": False,
                "actorder": None,
                "observer": "minmax",
                "observer_kwargs": {},
                "block_structure": None,
            },
        }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": ignore,
        "kv_cache_scheme": None,
        "config_groups": groups,
    }


def _notes(layers: dict[str, QuantizedLayer], schemes: dict[str, tuple]) -> list[str]:
    notes = [f"{METHOD}: {hf.WEIGHTS_ONLY}"]
    notes += marlin_notes(layers, {name: size or -1 for name, (_, size, _) in schemes.items()})
    if len(set(schemes.values())) > 1:
        notes.append(
            "warning: layers of several schemes make several config groups: llama.cpp's converter reads one only, and "
            "vLLM wants the same for layers that it fuses (q, k and v; gate and up)"
        )
    if not all(symmetric for _, _, symmetric in schemes.values()):
        notes.append(
            "warning: transformers 5.23 with compressed-tensors 0.20 loads zero points only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True), which rounds q*s to the model's dtype"
        )
    return notes


def _arguments(quantization: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the weight arguments of the group that targets a module: by name, by pattern, or by class."""
    groups = list(quantization["config_groups"].values())
    matching = [[g for g in groups if any(rule(t, name) for t in g["targets"])] for rule in (_names, _patterns, _class)]
    for group in (group for found in matching for group in found):
        if group.get("input_activations") or group.get("output_activations"):
            raise ValueError("its activations are quantized")
        if (group.get("format") or quantization.get("format")) != FORMAT:
            raise ValueError(f"its format is {group.get('format') or quantization.get('format')!r}")
        return json.loads(json.dumps(group["weights"]))
    raise ValueError("no config group targets it")


def _names(target: str, name: str) -> bool:
    return target == name


def _patterns(target: str, name: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], name) is not None


def _class(target: str, name: str) -> bool:
    return target == "Linear"


def _spec(arguments: dict[str, Any], shape: list[int], scale_shape: list[int], scale_dtype: str) -> QuantSpec:
    if arguments.get("type", "int") != "int" or arguments.get("actorder") not in (None, False, "weight", "static"):
        raise ValueError(f"type {arguments.get('type')!r} and activation order {arguments.get('actorder')!r}")
    size = arguments.get("group_size")
    strategy = arguments.get("strategy") or ("tensor" if size is None else "group" if size > 0 else "channel")
    if strategy not in ("tensor", "channel", "group"):
        raise ValueError(f"strategy {strategy!r}")
    size = size if strategy == "group" else None
    expected = {"tensor": 1, "channel": shape[0], "group": shape[0] * shape[1] // (size or 1)}[strategy]
    if (size and shape[1] % size) or expected != torch.Size(scale_shape).numel():
        raise ValueError(f"scales of shape {scale_shape} for a weight of shape {shape}")
    spec = QuantSpec(arguments["num_bits"], Granularity(strategy), size, True, arguments.get("symmetric", True))
    return spec.override({"scale_dtype": scale_dtype})
