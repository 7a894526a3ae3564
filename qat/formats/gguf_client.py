"""GGUF through its clients: the gguf package's reader, transformers' ``gguf_file=`` and llama.cpp (xllamacpp)."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..layers import frozen_layers
from ..quantized_model import QuantizedModel, shares_embedding, to_model
from ..quantizers import DynamicActivation
from ..spec import Dynamic
from .gguf_names import ARCHITECTURES, ROPE_FREQUENCIES, gguf_names, row_order

TOLERANCE = 1e-5  # of the largest output: the same float32 products, perhaps summed in another order
MARGIN = 0.05  # of the largest logit: nearer than this, llama.cpp's rounded activations may swap the first two


def open_file(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a file's config, as transformers understands it, and {GGUF's name: the reader's tensor}.

    Raises:
        ArtifactError: damaged, or of an architecture without a reader here.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        kind = reader.get_field("general.architecture").contents()
    except (ValueError, KeyError, IndexError, AttributeError, OSError) as error:
        raise ArtifactError(f"{file} is damaged or no GGUF file: {error}") from None
    if kind not in [row[0] for row in ARCHITECTURES.values()]:
        known = ", ".join(sorted({row[0] for row in ARCHITECTURES.values()}))
        raise ArtifactError(f"{file} holds a {kind!r} model, which has no reader here (known: {known})")
    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name != ROPE_FREQUENCIES}
    if ROPE_FREQUENCIES in [tensor.name for tensor in reader.tensors]:
        raise ArtifactError(f"{file} scales its rotation frequencies, and does not say how: read the original model")

    def value(key: str, default: Any = None) -> Any:
        field = reader.get_field(f"{kind}.{key}")
        return default if field is None else field.contents()

    embedding = tensors["token_embd.weight"].shape.tolist()
    heads = value("attention.head_count")
    config = {
        "architectures": [ARCHITECTURES[kind][1]],
        "model_type": kind,
        "hidden_size": embedding[0],
        "vocab_size": embedding[1],
        "num_hidden_layers": value("block_count"),
        "intermediate_size": value("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", value("rope.dimension_count", embedding[0] // heads)),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(value),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": kind == "llama" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": kind == "llama" and "blk.0.ffn_up.bias" in tensors,
    }
    return config, tensors


def _rope(value: Any) -> dict[str, Any]:
    scaling = value("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ArtifactError(f"rope scaling {scaling!r} has no GGUF reader here (known: linear)")
    rope = {"rope_theta": value("rope.freq_base", 10000.0), "rope_type": "default"}
    return rope if scaling == "none" else {**rope, "rope_type": "linear", "factor": value("rope.scaling.factor")}


def transformers_names(config: dict[str, Any], file: Path, tensors: dict[str, Any]) -> dict[str, str]:
    """Return {transformers' tensor name: GGUF's} of every tensor in a file.

    Raises:
        ArtifactError: names what the file lacks or holds beyond the model.
    """
    from ..models import build

    with torch.device("meta"):
        state = build({"transformers": config}).state_dict()
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    names = gguf_names(config, state)
    missing, extra = set(names.values()) - set(tensors), set(tensors) - set(names.values())
    if missing or extra:
        raise ArtifactError(f"{file} does not fit its config: missing {sorted(missing)}, unexpected {sorted(extra)}")
    return names


def raw(stored: Any) -> Tensor:
    """Return a tensor's bytes, uint8 (rows, bytes of a row)."""
    return torch.from_numpy(stored.data.copy())


def dense(stored: Any) -> Tensor:
    """Return a tensor as the gguf package dequantizes it, in the dtype it is stored in (float32 for blocks)."""
    import gguf

    values = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
    shape, kind = stored.shape.tolist()[::-1], stored.tensor_type.name
    return values.view(shape).to({"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32))


def compare_tensors(file: Path, model: QuantizedModel, config: dict[str, Any]) -> list[tuple[str, str]]:
    """Compare every code and weight with what ``gguf.dequantize`` gives.

    Raises:
        ArtifactError: names the first tensor that differs.
    """
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    total = 0
    names = gguf_names(config, [*(f"{name}.weight" for name in model.layers), *model.dense])
    for name, layer in model.layers.items():
        if shares_embedding(model, name):
            continue
        tensor = model.quantized(layer.tied or name)
        found = _in_order(dense(tensors[names[f"{name}.weight"]]), config, f"{name}.weight")
        scale = tensor.scale.float()[..., None]
        zero_point = 0 if tensor.zero_point is None else tensor.zero_point[..., None]
        codes = (found.view(*tensor.scale.shape, -1) / scale + zero_point).round().view(found.shape)
        off = int((codes != tensor.codes).sum())
        if off or not torch.equal(found, tensor.dequantize(torch.float32)):
            raise ArtifactError(f"{name} differs in {file}: {off} of {codes.numel()} codes, read by gguf.dequantize")
        total += codes.numel()
    for name in model.dense:
        found = _in_order(dense(tensors[names[name]]), config, name)
        if not torch.equal(found.float(), model.dense[name].float()):
            raise ArtifactError(f"{name} differs in {file}, read by gguf.dequantize")
    return [
        ("gguf.dequantize", f"0 of {total:,} codes differ; {len(model.layers)} weights equal q*s in every bit"),
        ("gguf.dequantize, not quantized", f"{len(model.dense)} tensors equal in every value"),
    ]


def compare_outputs(file: Path, model: QuantizedModel, config: dict[str, Any]) -> list[tuple[str, str]]:
    """Run transformers and llama.cpp on the file, against the frozen model in float32; llama.cpp's rounding simulated.

    Raises:
        ArtifactError: logits differ in transformers, or the next token in llama.cpp.
    """
    frozen = to_model(model).float()
    for _, layer in frozen_layers(frozen):
        if layer.activation_quantizer is None and isinstance(layer, torch.nn.Linear):
            layer.activation_quantizer = DynamicActivation(Dynamic.q8_0)
    roundings = [module for module in frozen.modules() if isinstance(module, DynamicActivation)]
    length = min(16, config["max_position_embeddings"] - 1)
    tokens = torch.randint(0, config["vocab_size"], (4, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rounded = frozen(tokens).logits[:, -1]
        for module in roundings:
            module.enabled = False  # transformers multiplies in float32
        expected = frozen(tokens).logits
    row = _run_transformers(file, frozen.config, tokens, expected)
    return [row, _run_llama_cpp(file, tokens, rounded, expected[:, -1])]


def _run_transformers(file: Path, config: Any, tokens: Tensor, expected: Tensor) -> tuple[str, str]:
    import transformers

    # The file says everything but Llama 3.1's rotation; of Mistral, transformers reads a file's config only.
    options = {} if config.model_type == "mistral" else {"config": config}
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded = load(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
    with torch.no_grad():
        gap = (loaded.eval()(tokens).logits - expected).abs().max().item()
    largest = expected.abs().max().item()
    if gap > TOLERANCE * largest:
        raise ArtifactError(f"{file} in transformers: logits differ by {gap:g} (largest {largest:g})")
    return "transformers, gguf_file=", f"logits differ by at most {gap:g} (largest {largest:g})"


def _run_llama_cpp(file: Path, tokens: Tensor, expected: Tensor, float32: Tensor) -> tuple[str, str]:
    if find_spec("xllamacpp") is None:
        return "llama.cpp", "not installed: pip install xllamacpp"
    # A process of its own: llama.cpp ends the process where it cannot go on.
    command = [sys.executable, "-P", "-c", _LLAMA_CPP, str(file), json.dumps(tokens.tolist())]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise ArtifactError(f"llama.cpp does not run {file}: {run.stderr.strip()[-500:]}")
    answers = next(line for line in run.stdout.splitlines() if line.startswith("found "))
    largest = expected.abs().max()
    gaps, equal = [0.0, 0.0], 0
    found = json.loads(answers.removeprefix("found "))
    for logits, plain, (token, log_probability) in zip(expected, float32, found, strict=True):
        if logits.max() - logits[token] > MARGIN * largest:
            raise ArtifactError(f"llama.cpp on {file}: next token {token} where the model says {int(logits.argmax())}")
        equal += int(logits.argmax()) == token
        for index, ours in enumerate((logits, plain)):
            gaps[index] = max(gaps[index], abs(ours.log_softmax(0)[token].item() - log_probability))
    seen = f"next token equal in {equal} of {len(expected)} texts, its log probability within {gaps[0]:.3g}"
    return "llama.cpp", f"{seen} of ours with inputs in q8_0 ({gaps[1]:.3g} of float32)"


_LLAMA_CPP = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = sys.argv[1], 256, 0, False
params.verbosity = -1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
found = []
for tokens in json.loads(sys.argv[2]):
    request = {"prompt": tokens, "max_tokens": 1, "logprobs": 1, "temperature": 0.0, "cache_prompt": False}
    answer = server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]
    found.append((answer["id"], answer["logprob"]))
print("found", json.dumps(found))
"""


def _in_order(tensor: Tensor, config: dict[str, Any], name: str) -> Tensor:
    order = row_order(config, name)
    return tensor if order is None else tensor[order.argsort()]
