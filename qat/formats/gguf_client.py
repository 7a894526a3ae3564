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
from ..frozen_model import to_model
from ..quantized_model import QuantizedModel, shares_embedding
from ..quantizers import DynamicActivation
from . import huggingface as hf
from .float_error import TOLERANCE, in_other_orders, root_mean_square
from .gguf_names import ARCHITECTURES, ROPE_FREQUENCIES, gguf_names, row_order
from .gguf_rounding import DTYPES, round_as_llama_cpp_

MOST_LIKELY = 100  # tokens whose probabilities are compared
# A float32 sum at the edge of two int8 codes falls to one side or the other, and in a deep model that changes all that
# follows: llama.cpp may differ from our own as that does from itself in other orders of summation, NOISE times that, in
# half of the texts. Over all of them also by a part of what the rounding does: in a shallow model such edges are rare.
NOISE, FEW_EDGES = 2.0, 0.2
TIE = 3.0  # times that: nearer than this in log probability, the first two tokens may change places
TEXTS = 8


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
    return values.view(shape).to(DTYPES.get(kind, torch.float32))


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
        ArtifactError: logits differ in transformers, or in llama.cpp by more than its rounding explains.
    """
    frozen = to_model(model).float()
    # Without the last one, whose next token llama.cpp would have no place for; and it has no sliding windows.
    length = hf.within_window(config, min(16, config["max_position_embeddings"] - 1))
    tokens = torch.randint(0, config["vocab_size"], (TEXTS, length), generator=torch.Generator().manual_seed(0))
    for module in frozen.modules():
        if isinstance(module, DynamicActivation):
            module.enabled = False  # transformers multiplies in float32
    with torch.no_grad():
        expected = frozen(tokens).logits
    row = _run_transformers(file, frozen.config, tokens, expected)
    if find_spec("xllamacpp") is None:
        return [row, ("llama.cpp", "not installed: pip install xllamacpp")]
    found = _run_llama_cpp(file, tokens)
    round_as_llama_cpp_(frozen, file, config)
    with torch.no_grad():
        rounded = frozen(tokens).logits
    return [row, _compare_llama_cpp(file, found, rounded, in_other_orders(frozen, tokens), expected)]


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


def _run_llama_cpp(file: Path, tokens: Tensor) -> list[list[tuple[int, float]]]:
    """Return for each text the most likely next tokens with their log probabilities, the first first."""
    # A process of its own: llama.cpp ends the process where it cannot go on.
    most = str(MOST_LIKELY)
    command = [sys.executable, "-P", "-c", _LLAMA_CPP, str(file), json.dumps(tokens.tolist()), most]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        reason = run.stderr.strip()[-500:]
        reason = reason.splitlines()[-1] if "Traceback" in run.stderr else reason  # else it is llama.cpp's own end
        raise ArtifactError(f"llama.cpp does not run {file}: {reason}")
    answers = next(line for line in run.stdout.splitlines() if line.startswith("found "))
    return json.loads(answers.removeprefix("found "))


def _compare_llama_cpp(
    file: Path, found: list[list[tuple[int, float]]], rounded: Tensor, others: list[Tensor], float32: Tensor
) -> tuple[str, str]:
    """Compare what llama.cpp gives with our own logits (texts, length, vocabulary).

    Args:
        file: for messages.
        found: of ``_run_llama_cpp``.
        rounded: with inputs rounded as it does.
        others: the same in other orders of summation.
        float32: without rounding.

    Raises:
        ArtifactError: they differ by more than the rounding explains.
    """
    ids, theirs = (torch.tensor([[pair[part] for pair in text] for text in found]) for part in (0, 1))

    def of(logits: Tensor) -> tuple[Tensor, Tensor]:
        values = logits[:, -1].log_softmax(-1)
        return values.gather(1, ids), values.argmax(-1)

    def rows(values: Tensor) -> Tensor:
        return values.square().mean(-1).sqrt()

    (ours, first), (plain, _) = of(rounded), of(float32)
    own = [of(logits) for logits in others]
    apart, moved = rows(theirs - ours), torch.stack([rows(other - ours) for other, _ in own]).amax(0)
    off, noise, whole = (root_mean_square(values) for values in (apart, moved, theirs - plain))
    limit = max(NOISE * noise, FEW_EDGES * root_mean_square(plain - ours))
    if not (off <= limit and (apart / (NOISE * moved).clamp_min(TOLERANCE)).median() <= 1):
        raise ArtifactError(
            f"llama.cpp on {file}: log probabilities differ by {off:.3g} (root mean square) from ours with inputs "
            f"rounded as it rounds them, which differ from themselves by {noise:.3g} in other orders of summation"
        )
    behind = rounded[:, -1].amax(-1) - rounded[:, -1].gather(1, ids[:, :1])[:, 0]
    if (behind > TIE * limit).any():
        text = int(behind.argmax())
        raise ArtifactError(f"llama.cpp on {file}: next token {int(ids[text, 0])} where ours is {int(first[text])}")
    equal, ours_equal = int((ids[:, 0] == first).sum()), [int((other == first).sum()) for _, other in own]
    return "llama.cpp", (
        f"next token equal in {equal} of {len(ids)} texts (in other orders of summation, our own in {min(ours_equal)} "
        f"to {max(ours_equal)}); log probabilities within {apart.median().item():.3g} (half the texts) and {off:.3g} "
        f"(root mean square) of ours with inputs rounded as it does, those within {noise:.3g} of themselves, and "
        f"float32's within {whole:.3g}"
    )


_LLAMA_CPP = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = sys.argv[1], 256, 0, False
params.verbosity = -1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
found, most = [], int(sys.argv[3])
# A token that ends within a character is held back, its probabilities too: one of plain text is generated, before which
# all tokens have the same ones.
held = {"grammar": "root ::= [ -~]+"}
for tokens in json.loads(sys.argv[2]):
    request = {"prompt": tokens, "max_tokens": 1, "logprobs": most, "temperature": 0.0, "cache_prompt": False, **held}
    answer = server.handle_completions(request)["choices"][0]["logprobs"]["content"][0]
    found.append([(token["id"], token["logprob"]) for token in answer["top_logprobs"]])
print("found", json.dumps(found))
"""


def _in_order(tensor: Tensor, config: dict[str, Any], name: str) -> Tensor:
    order = row_order(config, name)
    return tensor if order is None else tensor[order.argsort()]
