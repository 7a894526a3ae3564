"""onnxruntime-genai's own loader of GPTQ and AWQ folders, for comparing what it makes of an export.

The loader repacks each module into the operands of MatMulNBits: qweight uint8 (N, G, g/2) with the even input in the
low nibble, scales (N*G), qzeros uint8 (N*ceil(G/2)). Source: onnxruntime_genai 0.18, models/loaders.
"""

from __future__ import annotations

import contextlib
import io
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..errors import ArtifactError, first_line, some_of
from ..packing import unpack
from ..quantized_model import QuantizedModel
from . import huggingface as hf
from .comparison import TOKENS, compare, compare_logits, not_compared, scaling_embeddings, small
from .onnx_parts import session

CLIENT = "onnxruntime-genai"
# What its loader takes apart, as Phi-3 has it, into rows of these.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Without these its builder would round the head, the embedding, and the inputs of all products.
OPTIONS = ("accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather")

# What its builder leaves out without a word.
RMS_NORMS = ("olmo",)
UNSCALED = ("llama", "smollm3")  # it scales their rotation for Llama 3.1's rope type only
NO_WINDOWS = ("mistral",)  # it has those of layers that the config marks with layer_types
GEMMAS = ("gemma", "gemma2", "gemma3_text")  # it rounds sqrt(hidden_size) to two decimals, and 1 + a norm's weight


def notes(model: QuantizedModel, skipped: list[str]) -> list[str]:
    """Return what to tell the loader's user.

    Args:
        model: of transformers.
        skipped: its layers that are not quantized in a quantized block, for which the loader fails.
    """
    if skipped:
        return [f"warning: {CLIENT} 0.18 reads no model that skips layers ({some_of(skipped)}): use --to onnx there"]
    config, dtype = model.architecture["transformers"], hf.model_dtype(model)
    told = f"--extra_options {' '.join(OPTIONS)}"
    said = [f"{CLIENT}'s builder rounds the head, the embedding and all inputs, unless told {told}"]
    if left_out := _left_out(config):
        said.append(f"warning: {CLIENT} 0.18 {left_out}: use --to onnx there")
    if config.get("model_type") in NO_WINDOWS:
        said += hf.window_notes(config, CLIENT)
    if config.get("model_type") in GEMMAS:
        exact, rounded = _embedding_scales(config, dtype)
        said.append(f"{CLIENT} multiplies the embedding by {rounded:g} where this model has {exact:g}")
        if dtype != torch.float32:
            said[-1] += f", and rounds 1 + the weights of norms to {str(dtype).removeprefix('torch.')}"
    return said


def compare_folder(folder: Path, model: QuantizedModel, method: str) -> list[tuple[str, str]]:
    """Return the rows of a table: every code and weight that the loader makes of a "gptq" or "awq" folder, and logits.

    Raises:
        ArtifactError: anything differs.
    """
    try:
        from onnxruntime_genai.models.loaders.quant_model import QuantModel
    except ImportError:
        return [(CLIENT, "not installed: pip install onnxruntime-genai")]
    config, quantization, _ = hf.read_folder(folder, method)
    heads, head = config.get("num_attention_heads") or 1, config.get("head_dim")
    head = head or (config.get("hidden_size") or 0) // heads
    cache = (config.get("num_key_value_heads") or heads, head)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            loaded = QuantModel.from_pretrained(
                method,
                input_path=str(folder),
                quant_attrs={"config": quantization, "use_g_idx": False},
                q_size=heads * head,
                kv_size=cache[0] * head,
                intermediate_size=config.get("intermediate_size"),
                num_layers=config.get("num_hidden_layers"),
            )
    except Exception as error:  # of a kind of model that it does not know
        return [(CLIENT, f"not compared: its loader does not take this model ({type(error).__name__}: {error})")]

    def one(name: str) -> tuple[Tensor, Tensor]:
        owner, _, last = name.rpartition(".")
        pieces = [_operands(loaded, f"{owner}.{part}") for part in FUSED.get(last, (last,))]
        return tuple(torch.cat(part) for part in zip(*pieces, strict=True))

    rows = compare(model, one, CLIENT)
    whole = [layer.shape[1] for layer in model.layers.values() if layer.weight and layer.weight.group_size is None]
    odd = [inputs for inputs in whole if inputs & (inputs - 1)]
    if odd:
        why = f"its builder makes a block of {odd[0]} inputs, and onnxruntime has powers of two; --to onnx runs there"
        return [*rows, not_compared(CLIENT, why)]
    if left_out := _left_out(config):
        return [*rows, not_compared(CLIENT, f"it {left_out}; --to onnx runs there")]
    if not small(model):
        return [*rows, not_compared(CLIENT)]
    length = hf.within_window(config, TOKENS) if config.get("model_type") in NO_WINDOWS else TOKENS
    as_client = _as_client(config, hf.model_dtype(model)) if config.get("model_type") in GEMMAS else None
    with tempfile.TemporaryDirectory() as made:
        try:
            run = build(folder, Path(made), *cache)
        except ArtifactError as error:  # it wants a tokenizer, and knows fewer architectures than its loader
            return [*rows, not_compared(CLIENT, error)]
        return [*rows, compare_logits(model, run, CLIENT, as_client, length)]


def _operands(loaded: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return the codes less their zero points, and the float32 weight, of a module that the loader has made."""
    path = name.removeprefix("model.").split(".")
    module = reduce(lambda owner, part: owner[int(part)] if part.isdigit() else getattr(owner, part), path, loaded)
    rows, groups, half = module.qweight.shape
    codes = unpack(module.qweight.view(rows, -1), 4, groups * half * 2)
    zero_points = unpack(module.qzeros.view(rows, -1), 4, groups)
    codes = codes.int() - zero_points.int().repeat_interleave(half * 2, 1)
    return codes, codes.float() * module.scales.float().view(rows, groups).repeat_interleave(half * 2, 1)


def _left_out(config: dict[str, Any]) -> str | None:
    """Return what makes another model of the builder's; None where that is not known of any."""
    if config.get("model_type") in RMS_NORMS:
        return "takes no mean off in this model's norms"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # the latter is transformers 4's
    kind = rope.get("rope_type") or rope.get("type")
    if config.get("model_type") in UNSCALED and kind in ("linear", "yarn", "longrope"):
        return f"does not scale this model's rotation, of rope_type {kind!r}"
    return None


def _embedding_scales(config: dict[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """Return what a Gemma of a dtype multiplies its embedding by, and what the builder does."""
    exact = math.sqrt(config["hidden_size"])
    return torch.tensor(exact, dtype=dtype).item(), round(exact, 2)


def _as_client(config: dict[str, Any], dtype: torch.dtype) -> Callable[[nn.Module], str]:
    """Return what lets a float32 network of a Gemma compute what the builder makes of it."""

    def change(network: nn.Module) -> str:
        for module in network.modules():
            if dtype != torch.float32 and type(module).__name__.endswith("RMSNorm"):
                module.weight = nn.Parameter((1 + module.weight.to(dtype)).float() - 1)  # the old one is the model's
        return scaling_embeddings(*_embedding_scales(config, dtype))(network)

    return change


def build(folder: Path, made: Path, heads: int, size: int) -> Callable[[Tensor], Tensor]:
    """Let the builder make an ONNX model of a "gptq" or "awq" folder; return what runs it: tokens (B, T) -> logits.

    Args:
        folder: the export.
        made: where to.
        heads: of keys and values.
        size: of one of them.

    Raises:
        ArtifactError: it cannot, or what it makes does not run.
    """
    command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(made)]
    command += ["-c", str(made), "-p", "int4", "-e", "cpu", "--extra_options", *OPTIONS]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise ArtifactError(f"its builder fails: {(run.stderr.strip() or 'without a word').splitlines()[-1]}")
    client = session(made / "model.onnx")

    def logits(tokens: Tensor) -> Tensor:
        feeds = {"input_ids": tokens.numpy(), "attention_mask": numpy.ones(tokens.shape, numpy.int64)}
        for value in client.get_inputs():
            if value.name.startswith("past_key_values"):  # an empty cache
                feeds[value.name] = numpy.zeros((len(tokens), heads, 0, size), numpy.float32)
        wanted = {value.name: feeds[value.name] for value in client.get_inputs()}
        return torch.from_numpy(client.run(["logits"], wanted)[0])

    try:
        logits(torch.zeros(1, 1, dtype=torch.int64))
    except Exception as error:  # onnxruntime's, which have no class of their own, such as of a sliding window's cache
        raise ArtifactError(f"its model does not run without its own loop: {first_line(error)}") from error
    return logits
