"""bitsandbytes NF4: what transformers, peft (QLoRA) and vLLM read, for weights trained with ``codebook: nf4``.

A module M with weight (N, K) in blocks of b along K, which divides K, stores

    M.weight            uint8 (N*K/2, 1)   indices of NF4's levels, row-major, the even one in the high nibble
    M.weight.absmax     float32 (N*K/b,)   the scale of each block
    M.weight.quant_map  float32 (16,)      NF4's levels
    M.weight.quant_state.bitsandbytes__nf4   uint8, the JSON {"quant_type", "blocksize", "dtype", "shape"}

w = quant_map[index] * absmax. Double quantization (``codebook: nf4_double``) stores absmax as uint8 with

    M.weight.nested_quant_map  float32 (256,)   M.weight.nested_absmax  float32, one for 256 of absmax

and absmax = nested_quant_map[u] * nested_absmax + nested_offset in float32, the last in the JSON, with
nested_blocksize 256. Where that cannot be kept, absmax is written as the float32 it means, which changes no weight.
Source: QuantState and backends/default/ops.py of bitsandbytes 0.50.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codebook import NF4
from ..double_quantization import BLOCK, NestedScale
from ..errors import ArtifactError
from ..numerics import QuantizedTensor
from ..packing import pack, unpack
from ..quantized_model import QuantizedLayer, QuantizedModel
from ..spec import Codebook, QuantSpec
from . import huggingface as hf
from .comparison import as_stored_, compare, compare_logits, compare_own, logits, not_compared, one_error, small
from .integer_linears import grid, largest_size, refuse, tensors, weight_only_layers
from .shards import ShardWriter
from .stored_tensors import DTYPES, StoredTensors

METHOD = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__"
PARTS = ("weight", f"{STATE}nf4", *(f"weight.{part}" for part in ("absmax", "quant_map")))
PARTS += ("weight.nested_absmax", "weight.nested_quant_map")
CODEBOOKS = (Codebook.nf4, Codebook.nf4_double)
BLOCK_SIZES = (4096, 2048, 1024, 512, 256, 128, 64, 32)


def write(model: QuantizedModel, folder: Path) -> list[str]:
    """Write a model of transformers into an empty folder; return notes on what runtimes make of it.

    Raises:
        ArtifactError: layers that the format cannot hold exactly; each is named with its fix.
        OSError: the disk is full, or cannot be written.
    """
    layers = weight_only_layers(model, METHOD, CODEBOOKS)
    sizes = {name: largest_size({name: layer}, METHOD, BLOCK_SIZES, "native") for name, layer in layers.items()}
    shards, dtype = ShardWriter(folder), str(hf.model_dtype(model)).removeprefix("torch.")
    matrices = hf.write_dense(model, shards)
    _refuse_skipped(layers, matrices)
    for name, tensor in tensors(model):
        shape, size = list(tensor.codes.shape), sizes[name]
        state = {"quant_type": "nf4", "blocksize": size, "dtype": dtype, "shape": shape}
        shards.add(f"{name}.weight", _swap_nibbles(pack(tensor.codes, 4, 0)).view(-1, 1))
        if _stays_nested(layers[name], size):
            nested = tensor.nested
            state |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": nested.offset.item()}
            shards.add(f"{name}.weight.absmax", nested.codes.flatten())
            shards.add(f"{name}.weight.nested_absmax", nested.factor)
            shards.add(f"{name}.weight.nested_quant_map", nested.levels.clone())
        else:
            shards.add(f"{name}.weight.absmax", grid(tensor, shape[1] // size)[0].flatten())
        shards.add(f"{name}.weight.quant_map", torch.tensor(NF4, dtype=torch.float32))
        shards.add(f"{name}.{STATE}nf4", torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8))
    shards.close()
    description = {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(_stays_nested(layer, sizes[name]) for name, layer in layers.items()),
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(matrices),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
    }
    hf.write_folder(model, folder, METHOD, {"quantization_config": description}, hf.RUN_TRANSFORMERS)
    notes = [f"{METHOD}: {hf.WEIGHTS_ONLY}"]
    plain = [name for name, layer in layers.items() if not _stays_nested(layer, sizes[name])]
    if plain:
        which = f"{plain[0]!r} and {len(plain) - 1} more have" if len(plain) > 1 else f"{plain[0]!r} has"
        notes.append(
            f"{METHOD}: {which} float32 scales, 0.37 bits a weight more in blocks of 64 than double quantization, "
            "which would round them here; codebook: nf4_double trains with it"
        )
    return notes + hf.fused_expert_notes(model)


def read(folder: Path) -> QuantizedModel:
    """Open an NF4 folder of any writer, with or without double quantization; tensors are read when asked for.

    Raises:
        ArtifactError: missing or damaged files, FP4 or int8 weights, or blocks that span rows.
    """
    config, quantization, stored = hf.read_folder(folder, METHOD)
    if quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        raise ArtifactError(f"{folder} holds LLM.int8() weights, which keep outliers apart: only NF4 can be read")
    layers, states = {}, {}
    for key in (key for key in stored if f".{STATE}" in key):
        name, kind = key.split(f".{STATE}")
        try:
            states[name] = json.loads(bytes(stored[key].tolist()))
            layers[name] = _layer(stored, name, kind, states[name])
        except (KeyError, ValueError, TypeError) as error:
            raise ArtifactError(f"{folder}: layer {name!r} cannot be read: {error}") from None

    def quantized(name: str) -> QuantizedTensor:
        layer = layers[name]
        packed = stored[f"{name}.weight"].contiguous().view(torch.uint8).view(layer.shape[0], -1)
        codes = unpack(_swap_nibbles(packed), 4, layer.shape[1], 0)
        if layer.weight.codebook is Codebook.nf4_double:
            nested = _nested(stored, name, states[name])
            return QuantizedTensor(codes, nested.values(), layer.weight, nested=nested)
        absmax = stored[f"{name}.weight.absmax"].float()
        return QuantizedTensor(codes, absmax.view(layer.shape[0], -1), layer.weight)

    return hf.to_quantized_model(folder, config, stored, layers, quantized, PARTS)


def verify(folder: Path, model: QuantizedModel) -> list[tuple[str, str]]:
    """Read the export back, with this package and with bitsandbytes; return the rows of a table.

    Raises:
        ArtifactError: anything differs.
    """
    rows = compare_own(model, read(folder))
    try:
        from bitsandbytes.functional import QuantState, dequantize_4bit
        from bitsandbytes.nn import Linear4bit
        from transformers import AutoModelForCausalLM
    except ImportError:
        return [*rows, (METHOD, "not installed: pip install bitsandbytes accelerate transformers")]
    _, _, stored = hf.read_folder(folder, METHOD)
    levels = torch.tensor(NF4, dtype=torch.float32)

    def one(name: str) -> tuple[Tensor, Tensor]:
        packed = stored[f"{name}.weight"]
        parts = {part: stored[f"{name}.{part}"] for part in PARTS[1:] if f"{name}.{part}" in stored}
        state = QuantState.from_dict(parts, torch.device("cpu"))
        state.dtype = torch.float32
        weight = dequantize_4bit(packed, state)
        state.absmax, state.nested = torch.ones(state.absmax.shape), False
        return torch.searchsorted(levels, dequantize_4bit(packed, state)), weight

    rows += compare(model, one, METHOD)
    if not small(model):
        return [*rows, not_compared("transformers")]

    def client(tokens: Tensor) -> Tensor:
        with one_error(f"transformers fails to open {folder} or to run it"):
            opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
            for module in opened.modules():
                if isinstance(module, Linear4bit):
                    module.compute_dtype = torch.float32
                    module.support_avx512bf16_for_cpu = False  # its kernel there multiplies in bf16
            for parameter in opened.parameters():
                if parameter.is_floating_point():  # transformers leaves it in the stored dtype
                    parameter.data = parameter.data.float()
            return logits(as_stored_(opened, hf.model_dtype(model)), tokens)

    return [*rows, compare_logits(model, client, "transformers")]


def _refuse_skipped(layers: dict[str, QuantizedLayer], dense: dict[str, int]) -> None:
    """Refuse layers whose name ends as a dense one's: transformers skips all that end so."""
    problems = {}
    for name in layers:
        same = next((key for key in dense if name.endswith(key)), None)
        if same is not None:
            problems[name] = (
                f"would be skipped with {same!r}, which ends so and is not quantized; quantize both or none"
            )
    refuse(METHOD, problems)


def _layer(stored: StoredTensors, name: str, kind: str, state: dict[str, Any]) -> QuantizedLayer:
    if kind != "nf4":
        raise ValueError(f"its levels are {kind.upper()}'s: only NF4 can be read")
    shape, size = state["shape"], state["blocksize"]
    if len(shape) != 2 or shape[1] % size:
        raise ValueError(
            f"blocks of {size} span the rows of its {shape}: only sizes that divide its inputs can be read"
        )
    absmax, dtype = stored.header(f"{name}.weight.absmax")
    packed, storage = stored.header(f"{name}.weight")
    stored_bytes = math.prod(packed) * DTYPES[storage].itemsize
    if math.prod(absmax) * size != math.prod(shape) or stored_bytes * 2 != math.prod(shape):
        raise ValueError(f"{stored_bytes} bytes and {math.prod(absmax)} scales do not make {shape} in blocks of {size}")
    if stored[f"{name}.weight.quant_map"].tolist() != list(torch.tensor(NF4, dtype=torch.float32).tolist()):
        raise ValueError("its quant_map holds other levels than NF4's, which runtimes ignore")
    if state.get("nested_blocksize", BLOCK) != BLOCK:
        raise ValueError(
            f"its scales are quantized in blocks of {state['nested_blocksize']}, and runtimes know {BLOCK}"
        )
    double = dtype == "U8"
    if double and math.prod(stored.header(f"{name}.weight.nested_absmax")[0]) != -(-math.prod(absmax) // BLOCK):
        raise ValueError("its nested_absmax does not fit its absmax")
    if double and stored.header(f"{name}.weight.nested_quant_map")[0] != [256]:
        raise ValueError("its nested_quant_map does not have 256 levels")
    codebook = Codebook.nf4_double if double else Codebook.nf4
    return QuantizedLayer("Linear", list(shape), QuantSpec(4, None, size, True, codebook=codebook), None)


def _nested(stored: StoredTensors, name: str, state: dict[str, Any]) -> NestedScale:
    codes, factor, levels = (
        stored[f"{name}.weight.{part}"] for part in ("absmax", "nested_absmax", "nested_quant_map")
    )
    rows = state["shape"][0]
    return NestedScale(codes.view(rows, -1), factor, torch.tensor(state["nested_offset"], dtype=torch.float32), levels)


def _stays_nested(layer: QuantizedLayer, size: int) -> bool:
    """Return whether a layer's scales are quantized and go into blocks of this size as they are."""
    return layer.weight.codebook is Codebook.nf4_double and layer.weight.group_size == size


def _swap_nibbles(packed: Tensor) -> Tensor:
    return (packed << 4) | (packed >> 4)
