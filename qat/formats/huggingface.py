"""What Hugging Face-style folders share: config.json, tensors that are not quantized, tokenizer, model card, reading.

Every such folder is safetensors with the module names of transformers, and a config.json whose "quantization_config"
says how the quantized modules are stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import ArtifactError
from ..numerics import QuantizedTensor
from ..quantized_model import QuantizedLayer, QuantizedModel, shares_embedding
from .companions import copy_companions
from .integer_linears import refuse
from .model_card import write_card
from .shards import INDEX, ShardWriter
from .stored_tensors import Selected, StoredTensors

CONFIG = "config.json"
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
RUN_TRANSFORMERS = "python -c \"import transformers; transformers.AutoModelForCausalLM.from_pretrained('.')\""
TWO_ROTATIONS = ("gemma3_text", "gemma3n_text", "olmo3")  # kinds of transformers 4 whose layers turn in two ways
WEIGHTS_ONLY = "activations stay in floating point: only the weights are quantized, as they were in training"


def write_dense(model: QuantizedModel, shards: ShardWriter) -> dict[str, int]:
    """Write what is not quantized; return {name of a module that keeps a matrix as its weight: its rows}."""
    matrices = {}
    for name in dense_names(model):
        tensor = model.dense[model.tied.get(name, name)]
        shards.add(name, tensor.clone() if name in model.tied else tensor)
        if tensor.dim() == 2:
            matrices[name] = tensor.shape[0]
    matrices.update({name: matrices[owner] for name, owner in model.tied.items() if owner in matrices})
    return {name.removesuffix(".weight"): rows for name, rows in matrices.items() if name.endswith(".weight")}


def dense_names(model: QuantizedModel) -> list[str]:
    """Return the names that ``write_dense`` writes."""
    return list(model.dense) + ([] if ties_embeddings(model) else list(model.tied))


def fused_experts(model: QuantizedModel) -> list[str]:
    """Return the dense stacks of experts, which transformers 5 fuses and names as no other reader does."""
    return [name for name in model.dense if ".experts." in name and model.dense[name].dim() > 2]


def refuse_fused_experts(model: QuantizedModel, method: str) -> None:
    """Raise an ArtifactError that names the model's fused experts, if it has any."""
    reason = "is a fused stack of experts, which no reader of this format knows; --to compressed-tensors holds it"
    refuse(method, dict.fromkeys(fused_experts(model), reason))


def fused_expert_notes(model: QuantizedModel) -> list[str]:
    """Return a warning about the dense stacks of experts of a folder that only transformers reads, if it has any."""
    experts = fused_experts(model)
    if not experts:
        return []
    return [f"warning: only transformers reads {experts[0]!r} and its like, experts that it stacks"]


def window_notes(config: dict[str, Any], client: str) -> list[str]:
    """Return what to say of a client that knows no sliding windows, where a model of transformers has one."""
    window = _window(config)
    if not window or window >= (config.get("max_position_embeddings") or float("inf")):
        return []
    return [f"{client} attends beyond the model's sliding window of {window} tokens: keep texts shorter"]


def within_window(config: dict[str, Any], length: int) -> int:
    """Return the length of a text that a model's sliding window does not shorten: this one, or the window's."""
    return min(length, _window(config) or length)


def _window(config: dict[str, Any]) -> int | None:
    return config.get("sliding_window") if config.get("use_sliding_window", True) else None


def skipped_layers(model: QuantizedModel, matrices: dict[str, int]) -> list[str]:
    """Return the matrices that a loader might take for quantized layers: all but the vocabulary's."""
    vocabulary = model.architecture["transformers"].get("vocab_size")
    return [name for name, rows in matrices.items() if rows != vocabulary]


def model_dtype(model: QuantizedModel) -> torch.dtype:
    """Return the dtype that the model is stored in: its embedding's."""
    for layer in model.layers.values():
        if layer.dtype is not None:
            return getattr(torch, layer.dtype)
    for tensor in model.dense.values():
        if tensor.dim() > 1 and tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def write_folder(model: QuantizedModel, folder: Path, method: str, entries: dict[str, Any], run: str) -> None:
    """Write config.json, generation_config.json, the tokenizer and the model card.

    Args:
        model: what the folder holds.
        folder: where the tensors lie.
        method: the format's name.
        entries: for config.json, such as {"quantization_config": ...}.
        run: the client's one command.
    """
    config = write_config(model, folder, entries)
    copy_companions(model, folder)
    generation = folder / "generation_config.json"
    if not generation.exists():
        tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key)}
        generation.write_text(json.dumps({"_from_model_config": True, **tokens}, indent=1), encoding="utf-8")
    write_card(model, folder, method, WEIGHTS_ONLY, run)


def write_config(model: QuantizedModel, folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """Write config.json with further entries; return the config without them."""
    config = {key: value for key, value in model.architecture["transformers"].items() if key != "_name_or_path"}
    config["dtype"] = str(model_dtype(model)).removeprefix("torch.")
    config.update(_older_rope_keys(config))
    if config.get("tie_word_embeddings") and not ties_embeddings(model):
        config["tie_word_embeddings"] = False  # the head has codes of its own
    (folder / CONFIG).write_text(json.dumps({**config, **entries}, indent=1), encoding="utf-8")
    return config


def _older_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers 5 has in rope_parameters as others look for it, who take a default unasked."""
    rope, keys = config.get("rope_parameters") or {}, {}
    if "full_attention" in rope:  # one for each kind of attention
        if config.get("model_type") not in TWO_ROTATIONS:  # then transformers would read these as the only one
            return {}
        keys["rope_local_base_freq"] = (rope.get("sliding_attention") or {}).get("rope_theta")
        rope = rope["full_attention"]
    if "rope_theta" not in rope:
        return {}
    neox = config.get("model_type") == "gpt_neox"
    keys["rotary_emb_base" if neox else "rope_theta"] = rope["rope_theta"]
    keys["rotary_pct" if neox else "partial_rotary_factor"] = rope.get("partial_rotary_factor")
    if rope.get("rope_type", "default") != "default":
        apart = ("rope_theta", "partial_rotary_factor")
        keys["rope_scaling"] = {key: value for key, value in rope.items() if key not in apart}
    return {key: value for key, value in keys.items() if value is not None}


def read_folder(folder: Path, method: str) -> tuple[dict[str, Any], dict[str, Any], StoredTensors]:
    """Return config.json without its quantization, the quantization config, and the tensors.

    Raises:
        ArtifactError: a file is missing, damaged or of another format.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        quantization = config.pop("quantization_config", None) or _legacy_config(folder)
        config.pop("quantization", None)
        index = folder / INDEX
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else None
        files = [folder / Path(name).name for name in names] if names else sorted(folder.glob("*.safetensors"))
        stored = StoredTensors(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder} cannot be read as a {method} model: {error}; download or copy it again"
        ) from None
    found = quantization.get("quant_method", method)
    if found != method:
        raise ArtifactError(f"{folder} is a {found!r} model, not {method}: read it with its own format")
    if not files:
        raise ArtifactError(f"{folder} has no *.safetensors: download or copy it again")
    return config, quantization, stored


def to_quantized_model(
    folder: Path,
    config: dict[str, Any],
    stored: StoredTensors,
    layers: dict[str, QuantizedLayer],
    quantized: Callable[[str], QuantizedTensor],
    parts: tuple[str, ...],
) -> QuantizedModel:
    """Return the model of a folder; tensors are read when asked for.

    Args:
        folder: where it lies.
        config: of the architecture.
        stored: all tensors.
        layers: by name.
        quantized: layer name -> its quantized weight.
        parts: the names of a quantized layer's own tensors, such as "qweight".

    Raises:
        ArtifactError: there are no quantized layers.
    """
    if not layers:
        raise ArtifactError(f"{folder} has no quantized linear layers: it is a plain model, which training starts from")
    inside = {f"{name}.{part}" for name in layers for part in parts}
    dense = Selected(stored, [name for name in stored if name not in inside])
    architecture = {"transformers": config}
    tied = {} if "lm_head" in layers or "lm_head.weight" in dense else _missing_ties(architecture, dense)
    no_activations = {}.__getitem__
    return QuantizedModel(
        architecture, layers, quantized, no_activations, dense, tied, f"the model {folder}", files=folder
    )


def typed_layers(config: dict[str, Any], layers: dict[str, QuantizedLayer]) -> dict[str, QuantizedLayer]:
    """Return layers that were read as linear ones, with embeddings told apart, and the head that shares one's codes."""
    from ..models import build

    with torch.device("meta"):
        modules = dict(build({"transformers": config}).named_modules())
    typed = {}
    for name, layer in layers.items():
        if isinstance(modules.get(name), nn.Embedding):
            dtype = config.get("dtype") or config.get("torch_dtype") or layer.weight.scale_dtype.value
            typed[name] = replace(layer, type="Embedding", dtype=dtype)
            heads = [
                other
                for other, module in modules.items()
                if isinstance(module, nn.Linear) and module.weight is modules[name].weight and other not in layers
            ]
            typed.update({head: replace(layer, tied=name) for head in heads})
        else:
            typed[name] = layer
    return typed


def ties_embeddings(model: QuantizedModel) -> bool:
    """Return whether the head is stored as the embedding, quantized or not, which the config then says."""
    tied = bool(model.tied) or any(shares_embedding(model, name) for name in model.layers)
    return bool(model.architecture["transformers"].get("tie_word_embeddings")) and tied


def _legacy_config(folder: Path) -> dict[str, Any]:
    """Read the file that GPTQ's and AWQ's first tools wrote beside config.json."""
    for file in (folder / "quantize_config.json", folder / "quant_config.json"):
        if file.is_file():
            values = json.loads(file.read_text(encoding="utf-8"))
            names = {"w_bit": "bits", "q_group_size": "group_size"}
            return {names.get(key, key): value for key, value in values.items()}
    raise ValueError("config.json has no quantization_config")


def _missing_ties(architecture: dict[str, Any], dense: Selected) -> dict[str, str]:
    """Return {name that the folder leaves out: the stored name of the same parameter}, as transformers ties them."""
    from ..models import build

    with torch.device("meta"):
        parameters = dict(build(architecture).named_parameters(remove_duplicate=False))
    stored = {id(parameter): name for name, parameter in parameters.items() if name in dense}
    return {name: stored[id(p)] for name, p in parameters.items() if name not in dense and id(p) in stored}
