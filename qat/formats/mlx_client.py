"""mlx-lm: the keys that it looks for in a config, what it computes otherwise than the config says, and its logits.

Its architectures are written by hand, and some leave out what a config may ask of them without a word: a model that was
trained so would compute something else. What makes another model of it is refused, and what comes near is said, and
computed in the same way before outputs are compared. Source: mlx_lm 0.32's ``models``, of which a test looks at the
fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..quantized_model import QuantizedModel
from . import huggingface as hf
from .comparison import TOKENS, compare_logits, one_error, scaling_embeddings

CLIENT = "mlx-lm"
OTHERS = "use --to compressed-tensors or onnx"
# The kinds of models whose sliding windows it has; of others, such as Mistral and Gemma 2, it attends to all.
WINDOWS = ("cohere2", "exaone4", "gemma3_text", "gpt_oss", "ministral3", "olmo3", "smollm3")
EVERY_NTH = ("cohere2", "gemma3_text")  # its layers without a window are each nth one
WHOLE_HEADS = ("glm",)  # turns all of a head
# Types of rotations that it has, of kinds that turn as they did before rotations were scaled.
ROTATIONS = dict.fromkeys(("cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "glm", "glm4", "gpt_neox"), ("default",))
ROTATIONS |= dict.fromkeys(("helium", "phi", "recurrent_gemma", "stablelm", "starcoder2"), ("default",))
ROTATIONS |= {"minicpm3": ("default", "longrope")}
TANH = "gelu_pytorch_tanh"
SAME = {"swish": "silu", "gelu_new": TANH, "gelu_fast": TANH, "gelu_python": "gelu"}
# What it has for hidden_act, without asking for it.
ACTIVATIONS = dict.fromkeys(("gemma", "gpt_bigcode", "starcoder2"), "gelu")
ACTIVATIONS |= dict.fromkeys(("gemma2", "gemma3_text", "gpt2", "gpt_neox", "gptj", "phi"), TANH)
ACTIVATIONS |= dict.fromkeys(("cohere", "cohere2", "ernie4_5", "exaone4", "glm", "glm4", "granite", "helium"), "silu")
ACTIVATIONS |= dict.fromkeys(("hunyuan_v1_dense", "llama", "minicpm3", "ministral3", "mistral", "olmo2"), "silu")
ACTIVATIONS |= dict.fromkeys(("olmo3", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm"), "silu")
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")


def looked_for(config: dict[str, Any]) -> dict[str, Any]:
    """Return what mlx-lm looks for in config.json beside the keys of transformers 5.

    Raises:
        ArtifactError: the layers with a sliding window are others than it can be told.
    """
    kind, layers = config.get("model_type"), config.get("layer_types") or []
    if kind in EVERY_NTH and "full_attention" in layers:
        nth = layers.index("full_attention") + 1
        if any((layer == "full_attention") != ((index + 1) % nth == 0) for index, layer in enumerate(layers)):
            raise ArtifactError(f"{CLIENT}'s {kind} has no sliding window in each nth layer only: {OTHERS}")
        return {"sliding_window_pattern": nth}
    unscaled = _scaling(config) == "default"
    if kind == "exaone4":
        pattern = "".join("L" if layer == "sliding_attention" else "G" for layer in layers)
        found = {"rope_scaling": None} if unscaled else {}
        found["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return {"sliding_window_pattern": pattern if "L" in pattern else None, **found}
    if kind == "minicpm3" and unscaled:
        longest = config["max_position_embeddings"]
        return {"rope_scaling": {"rope_type": "default", "original_max_position_embeddings": longest}}
    if kind == "apertus":
        return {"mlp_bias": False, "post_norm": False, "qk_norm": True}
    if kind == "gpt_bigcode":
        return {"n_inner": config.get("n_inner") or 4 * config["n_embd"]}
    if kind == "lfm2":
        return {"block_dim": config["hidden_size"]}
    return {}


def refuse_other_arithmetic(config: dict[str, Any]) -> None:
    """Raise an ArtifactError where mlx-lm would run another model than the one that a config describes."""
    kind = config.get("model_type")
    rope, scaling = _rope(config), _scaling(config)
    turned = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    wanted, found = _activations(config)
    if kind in WHOLE_HEADS and turned != 1:
        problem = f"turns whole heads, and this one's partial_rotary_factor is {turned}"
    elif scaling not in ROTATIONS.get(kind, (scaling,)):
        problem = f"does not scale its rotation so, and this one's rope_type is {scaling!r}"
    elif scaling == "yarn" and not _computes_yarn(rope):
        problem = "knows no attention_factor and truncate of rope_type 'yarn', and this one has one"
    elif scaling == "longrope" and rope.get("short_factor") != rope.get("long_factor"):
        problem = "turns short texts too by the factors of long ones, which this one's rope_type 'longrope' keeps apart"
    elif kind == "minicpm3" and config.get("tie_word_embeddings") and config["hidden_size"] != config["dim_model_base"]:
        problem = "does not scale the logits of a head that is the embedding"
    elif wanted != found and {wanted, found} != {"gelu", TANH}:
        problem = f"computes {found} whatever the config says, and this one has {wanted!r}"
    else:
        return
    raise ArtifactError(f"{CLIENT}'s {kind} {problem}: {OTHERS}")


def notes(config: dict[str, Any], dtype: torch.dtype) -> list[str]:
    """Return what to say of what mlx-lm computes nearly as a config says.

    Args:
        config: of the model.
        dtype: its own.
    """
    wanted, found = _activations(config)
    said = [] if config.get("model_type") in WINDOWS else hf.window_notes(config, CLIENT)
    if wanted != found:
        said.append(f"{CLIENT} computes {found} where this model has {wanted}: outputs differ a little")
    exact, rounded = _embedding_scales(config)
    if exact != rounded and dtype != torch.bfloat16:
        said.append(
            f"{CLIENT} multiplies the embedding by {rounded:g} where this model has {exact:g}: outputs differ a "
            "little, and would not if it were stored in bf16, which rounds so too"
        )
    return said


def compare_outputs(folder: Path, model: QuantizedModel) -> tuple[str, str]:
    """Run a small float32 language model in mlx-lm on a text as long as a window that it does not have; return a row.

    Raises:
        ArtifactError: it does not open the folder or run it, or gives other logits.
    """
    import mlx.core as mx
    from mlx_lm.utils import load_model

    config = model.architecture["transformers"]

    def client(tokens: Tensor) -> Tensor:
        with one_error(f"{CLIENT} fails to open {folder} or to run it (--to compressed-tensors and onnx need it not)"):
            opened, _ = load_model(folder)
            return torch.from_numpy(numpy.array(opened(mx.array(tokens.numpy()))))

    length = TOKENS if config.get("model_type") in WINDOWS else hf.within_window(config, TOKENS)
    return compare_logits(model, client, CLIENT, _as_client(config), length)


def _as_client(config: dict[str, Any]) -> Callable[[nn.Module], str]:
    """Return what lets a float32 network compute what ``notes`` says."""
    wanted, found = _activations(config)
    exact, rounded = _embedding_scales(config)

    def change(network: nn.Module) -> str:
        from transformers.activations import ACT2FN

        said = ""
        if wanted != found:
            said = f", with {found} for {wanted}"
            for owner in list(network.modules()):
                for name, module in owner.named_children():
                    if type(module) is type(ACT2FN[wanted]):
                        setattr(owner, name, ACT2FN[found])
        if exact != rounded:
            said += scaling_embeddings(exact, rounded)(network)
        return said

    return change


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotation's parameters; of layers that attend to all, where there are two kinds."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # the latter is transformers 4's
    return rope.get("full_attention") or rope


def _scaling(config: dict[str, Any]) -> str:
    rope = _rope(config)
    return rope.get("rope_type") or rope.get("type") or "default"


def _computes_yarn(rope: dict[str, Any]) -> bool:
    """Return whether mlx-lm has a "yarn" rotation's range of frequencies, in whole ones, and its attention_factor."""
    factor = rope.get("attention_factor")
    usual = factor is None or math.isclose(factor, 0.1 * math.log(rope["factor"]) + 1, rel_tol=1e-6)
    return usual and rope.get("truncate") is not False


def _activations(config: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return the activation that a config asks for, and the one that mlx-lm has: the same where it is not known."""
    wanted = next((config[key] for key in ACTIVATION_KEYS if config.get(key)), None)
    wanted = SAME.get(wanted, wanted)
    return wanted, ACTIVATIONS.get(config.get("model_type"), wanted) if wanted else None


def _embedding_scales(config: dict[str, Any]) -> tuple[float, float]:
    """Return what an embedding is multiplied by in float32, and in mlx-lm, whose Gemma 3 rounds it to bf16."""
    exact = math.sqrt(config.get("hidden_size") or 1)
    return exact, torch.tensor(exact).bfloat16().item() if config.get("model_type") == "gemma3_text" else exact
