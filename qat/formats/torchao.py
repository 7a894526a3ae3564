"""torchao's IntxUnpackedToInt8Tensor: what transformers opens with torchao installed, on a CPU and on any GPU.

A module M with weight (N, K) in groups of g along K stores, and no M.weight,

    M._weight_qdata       int8 (N, K)     codes, one a byte whatever their bits
    M._weight_scale       (N, K/g)        in the model's dtype
    M._weight_zero_point  int8 (N, K/g)   signed, as the codes; 0 where symmetric

w = (qdata - zero point) * scale. Each file's metadata holds one JSON a tensor, under "M.weight" with the bits ("int4")
and the block size [1, g], and the list "tensor_names"; transformers merges the files' metadata, so each holds all.
Source: torchao 0.18's prototype/safetensors and quantize_/workflows/intx, transformers 5.23's quantizer_torchao.

torchao's packed Int4Tensor is neither written nor read: it has no arithmetic outside the GPU kernels of mslk, so no
export could be checked against its own reader. On a GPU, vLLM and SGLang run the same codes from compressed-tensors.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..numerics import QuantizedTensor
from ..quantized_model import QuantizedLayer, QuantizedModel
from ..spec import QuantSpec
from . import huggingface as hf
from .comparison import as_stored_, compare, compare_logits, compare_own, logits, not_compared, one_error, small
from .integer_linears import exact, grid, tensors, weight_only_layers
from .shards import ShardWriter
from .stored_tensors import StoredTensors

METHOD = "torchao"
TENSOR = "IntxUnpackedToInt8Tensor"
FIELDS = ("qdata", "scale", "zero_point")
PARTS = tuple(f"_weight_{field}" for field in FIELDS)


def write(model: QuantizedModel, folder: Path) -> list[str]:
    """Write a model of transformers into an empty folder; return notes on what runtimes make of it.

    Raises:
        ArtifactError: layers that the format cannot hold exactly; each is named with its fix.
        OSError: the disk is full, or cannot be written.
    """
    layers = weight_only_layers(model, METHOD)
    dtype = hf.model_dtype(model)
    about = {name: {"_type": "Tensor"} for name in hf.dense_names(model)}
    about |= {f"{name}.weight": _about(layer, dtype) for name, layer in layers.items()}
    metadata = {name: json.dumps(values) for name, values in about.items()}
    shards = ShardWriter(folder, metadata={**metadata, "tensor_names": json.dumps(list(about))})
    matrices = hf.write_dense(model, shards)
    for name, tensor in tensors(model):
        scale, zero_point = grid(tensor, tensor.scale.shape[1])
        shards.add(f"{name}._weight_qdata", tensor.codes)
        shards.add(f"{name}._weight_scale", exact(scale, dtype, name, METHOD))
        shards.add(f"{name}._weight_zero_point", zero_point)
    shards.close()
    description = {
        "quant_method": METHOD,
        "quant_type": {"default": _config(layers)},
        "modules_to_not_convert": list(matrices),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
    hf.write_folder(model, folder, METHOD, {"quantization_config": description}, hf.RUN_TRANSFORMERS)
    return [
        f"{METHOD}: {hf.WEIGHTS_ONLY}",
        f"{METHOD}: one byte a code, as {TENSOR} keeps it; for files of 4 bits a weight use --to compressed-tensors",
        *hf.fused_expert_notes(model),
    ]


def read(folder: Path) -> QuantizedModel:
    """Open a folder of IntxUnpackedToInt8Tensor weights of any writer; tensors are read when asked for.

    Raises:
        ArtifactError: missing or damaged files, or weights of another kind; the layer is named.
    """
    config, _, stored = hf.read_folder(folder, METHOD)
    layers = {}
    for name in (key.removesuffix("._weight_qdata") for key in stored if key.endswith("._weight_qdata")):
        try:
            layers[name] = _layer(stored, name, json.loads(stored.metadata[f"{name}.weight"]))
        except (KeyError, ValueError, TypeError) as error:
            raise ArtifactError(f"{folder}: layer {name!r} cannot be read: {error}") from None

    def quantized(name: str) -> QuantizedTensor:
        codes, scale, zero_point = (stored[f"{name}.{part}"] for part in PARTS)
        return QuantizedTensor(codes, scale, layers[name].weight, None if layers[name].weight.symmetric else zero_point)

    return hf.to_quantized_model(folder, config, stored, layers, quantized, PARTS)


def verify(folder: Path, model: QuantizedModel) -> list[tuple[str, str]]:
    """Read the export back, with this package and with torchao; return the rows of a table.

    Raises:
        ArtifactError: anything differs.
    """
    rows = compare_own(model, read(folder))
    try:
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
        from transformers import AutoModelForCausalLM
    except ImportError:
        return [*rows, (METHOD, "not installed: pip install torchao transformers")]
    _, _, stored = hf.read_folder(folder, METHOD)

    def one(name: str) -> tuple[Tensor, Tensor]:
        key = f"{name}.weight"
        metadata = {key: stored.metadata[key], "tensor_names": json.dumps([key])}
        parts = {f"{name}.{part}": stored[f"{name}.{part}"] for part in PARTS}
        tensor = unflatten_tensor_state_dict(parts, metadata)[0][key].to(dtype=torch.float32)
        zero_point = tensor.zero_point.int().repeat_interleave(tensor.block_size[1], 1)
        return tensor.qdata.int() - zero_point, tensor.dequantize()

    rows += compare(model, one, METHOD)
    if not small(model):
        return [*rows, not_compared("transformers")]

    def client(tokens: Tensor) -> Tensor:
        with one_error(f"transformers fails to open {folder} or to run it"):
            opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
            _in_float32(opened)
            return logits(as_stored_(opened, hf.model_dtype(model)), tokens)

    return [*rows, compare_logits(model, client, "transformers")]


def _in_float32(model: nn.Module) -> None:
    """Cast a model in place, the weights with the dtype that they were stored with too."""
    from torchao.utils import TorchAOBaseTensor

    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if isinstance(parameter, TorchAOBaseTensor):
                module._parameters[key] = nn.Parameter(parameter.to(dtype=torch.float32), requires_grad=False)
            elif parameter is not None:
                parameter.data = parameter.data.float()


def _about(layer: QuantizedLayer, dtype: torch.dtype) -> dict[str, Any]:
    """Return what the metadata says of a weight."""
    values = {
        "target_dtype": _dtype(f"int{layer.weight.bits}"),
        "block_size": [1, layer.weight.group_size or layer.shape[1]],
        "dtype": _dtype(str(dtype).removeprefix("torch.")),
        "activation_quantization": None,
    }
    return {"_type": TENSOR, "_data": values, "_tensor_data_names": list(FIELDS)}


def _config(layers: dict[str, QuantizedLayer]) -> dict[str, Any]:
    """Return the config that torchao would quantize the commonest kind of layer with; loading reads the metadata."""
    kinds = Counter((layer.weight.bits, layer.weight.group_size, layer.weight.symmetric) for layer in layers.values())
    bits, size, symmetric = kinds.most_common(1)[0][0]
    granularity = ("PerAxis", {"axis": 0}) if size is None else ("PerGroup", {"group_size": size})
    values = {
        "weight_dtype": _dtype(f"int{bits}"),
        "granularity": {"_type": granularity[0], "_version": 1, "_data": granularity[1]},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC" if symmetric else "ASYMMETRIC"},
        "scale_dtype": None,
        "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
    }
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": values}


def _dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def _layer(stored: StoredTensors, name: str, about: dict[str, Any]) -> QuantizedLayer:
    if about["_type"] != TENSOR:
        raise ValueError(f"it is an {about['_type']}: only {TENSOR} can be")
    values = about["_data"]
    if values["activation_quantization"] is not None:
        raise ValueError(f"its input is rounded as {values['activation_quantization']}, which only torchao does")
    shape, _ = stored.header(f"{name}.{PARTS[0]}")
    scale_shape, dtype = stored.header(f"{name}.{PARTS[1]}")
    size = values["block_size"][-1]
    if len(shape) != 2 or values["block_size"] != [1, size] or scale_shape != [shape[0], shape[1] // size]:
        raise ValueError(f"blocks of {values['block_size']} in a weight of {shape} with scales {scale_shape}")
    zero_point = stored[f"{name}.{PARTS[2]}"]
    if zero_point.dtype != torch.int8 or list(zero_point.shape) != scale_shape:
        raise ValueError("its zero points are floats, which integer codes do not have, or do not fit its scales")
    spec = QuantSpec(
        int(values["target_dtype"]["_data"].removeprefix("int")),
        None,
        None if size == shape[1] else size,
        True,
        not zero_point.any(),
        hf.FLOATS[dtype],
    )
    return QuantizedLayer("Linear", list(shape), spec, None)
