"""What GGUF calls a transformers language model and its tensors, and the numbers llama.cpp needs to run it.

Names come from the client's own table (``gguf.get_tensor_name_map``). llama.cpp rotates neighbouring pairs in models of
the "llama" architecture, transformers the two halves of a head: rows of q and k are reordered to match, per head
``(2, d/2) -> (d/2, 2)`` (llama.cpp, convert_hf_to_gguf.py, ``LlamaModel.permute``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError

# model_type -> (GGUF's architecture, transformers' class, whether rows of q and k are reordered)
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM", True),
    "mistral": ("llama", "MistralForCausalLM", True),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", False),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", False),
}
ROPE_FREQUENCIES = "rope_freqs.weight"
OTHERS = "use --to compressed-tensors or onnx"


def language_config(architecture: dict[str, Any] | None) -> dict[str, Any]:
    """Return the transformers config of a model that GGUF can hold.

    Raises:
        ArtifactError: another kind of model, or one whose arithmetic llama.cpp does not have.
    """
    config = (architecture or {}).get("transformers")
    known = ", ".join(name for _, name, _ in ARCHITECTURES.values())
    if config is None:
        raise ArtifactError(f"GGUF holds transformers language models ({known}): use --to onnx for this one")
    names = config.get("architectures") or [None]
    row = ARCHITECTURES.get(config.get("model_type"))
    if row is None or names[0] != row[1]:
        raise ArtifactError(
            f"{names[0]} ({config.get('model_type')}) has no GGUF writer here (known: {known}): {OTHERS}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ArtifactError(f"llama.cpp runs {names[0]} with silu only, not {config['hidden_act']!r}: {OTHERS}")
    if row[0] == "qwen2" and head_size(config) * config["num_attention_heads"] != config["hidden_size"]:
        raise ArtifactError(f"llama.cpp runs {names[0]} with heads of hidden_size / num_attention_heads only: {OTHERS}")
    rope = rope_parameters(config)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        known = "default, linear, llama3"
        raise ArtifactError(f"rope type {rope['rope_type']!r} has no GGUF writer here (known: {known}): {OTHERS}")
    return config


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return rope_theta, rope_type and what else the type needs, from a config of transformers 4 or 5."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {**rope, "rope_theta": theta, "rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def head_size(config: dict[str, Any]) -> int:
    """Return the size of an attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def gguf_names(config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return {transformers' tensor name: GGUF's}.

    Raises:
        ArtifactError: names the tensors that GGUF has no name for.
    """
    import gguf

    kind = ARCHITECTURES[config["model_type"]][0]
    member = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == kind)
    table = gguf.get_tensor_name_map(member, config["num_hidden_layers"])
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    unknown = sorted(name for name, other in found.items() if other is None)
    if unknown:
        raise ArtifactError(f"GGUF has no name for {', '.join(unknown)} in a model of type {kind!r}: {OTHERS}")
    return found


def row_order(config: dict[str, Any], name: str) -> Tensor | None:
    """Return the rows of a tensor, by transformers' name, in GGUF's order; None where the order is the same."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": key_value_heads(config)}.get(name.split(".")[-2])
    if heads is None or not ARCHITECTURES[config["model_type"]][2]:
        return None
    size = head_size(config)
    return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).flatten()


def key_value_heads(config: dict[str, Any]) -> int:
    """Return the number of key and value heads."""
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def add_hyperparameters(writer: Any, config: dict[str, Any]) -> None:
    """Write the numbers that llama.cpp builds its graph from into a ``gguf.GGUFWriter``."""
    import gguf

    size, rope = head_size(config), rope_parameters(config)
    writer.add_name(config["architectures"][0])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(key_value_heads(config))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)


def rope_frequencies(config: dict[str, Any]) -> Tensor | None:
    """Return what llama.cpp divides each rotation frequency by, for Llama 3.1's rope type; None for the others."""
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return None
    size, original = head_size(config), rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
