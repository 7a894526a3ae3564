"""A Hugging Face tokenizer.json as GGUF's ``tokenizer.ggml.*`` keys, and placeholders where a model has no tokenizer.

llama.cpp splits text by a regular expression that it knows by name, so only tokenizers whose splitting it has are
written: byte-level BPE as in GPT-2, SmolLM, Llama 3 and Qwen 2, and SentencePiece BPE with byte fallback as in Llama 2.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import ArtifactError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
# Part of the splitting expression in tokenizer.json -> llama.cpp's name for it.
SPLITS = {r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*": "llama-bpe", r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*": "qwen2"}


def add_vocabulary(writer: Any, folder: Path | None, config: dict[str, Any]) -> str | None:
    """Write the tokenizer of ``folder`` into a ``gguf.GGUFWriter``; return a note where there is none.

    Raises:
        ArtifactError: llama.cpp cannot split text as this tokenizer does.
    """
    size = config["vocab_size"]
    file = None if folder is None else folder / "tokenizer.json"
    if file is None or not file.is_file():
        _add_tokens(writer, "llama", [(f"<{number}>", NORMAL, 0.0) for number in range(size)])
        writer.add_add_bos_token(False)
        return "no tokenizer.json in the source: the GGUF file has placeholder tokens and takes token numbers only"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    model, added = tokenizer["model"], {token["id"]: token for token in tokenizer.get("added_tokens") or []}
    if model.get("type") != "BPE":
        raise ArtifactError(f"{file} is a {model.get('type')} tokenizer: only BPE has a GGUF writer here")
    texts = {number: text for text, number in model["vocab"].items()}
    texts.update({number: token["content"] for number, token in added.items()})
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        kind, splitting = "llama", None
    else:
        kind, splitting = "gpt2", _splitting(tokenizer.get("pre_tokenizer") or {}, file)
    # SentencePiece merges the pair with the best score first, which is the order of the merges.
    ranks = {merge.replace(" ", "", 1): float(-rank) for rank, merge in reversed(list(enumerate(merges)))}
    rows = []
    for number in range(size):
        text = texts.get(number, f"[PAD{number}]")
        kind_of = UNUSED if number not in texts else _token_type(text, added.get(number), model)
        rows.append((text, kind_of, ranks.get(text, -1e6)))
    _add_tokens(writer, kind, rows)
    if splitting is not None:
        writer.add_tokenizer_pre(splitting)
        writer.add_token_merges(merges)
    _add_special(writer, folder, config, {text: number for number, text in texts.items()}, tokenizer)
    return None


def _add_tokens(writer: Any, kind: str, rows: list[tuple[str, int, float]]) -> None:
    writer.add_tokenizer_model(kind)
    writer.add_token_list([text for text, _, _ in rows])
    writer.add_token_types([number for _, number, _ in rows])
    if kind == "llama":
        writer.add_token_scores([score for _, _, score in rows])


def _token_type(text: str, added: dict[str, Any] | None, model: dict[str, Any]) -> int:
    if text == model.get("unk_token"):
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    return BYTE if model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", text) else NORMAL


def _splitting(pre_tokenizer: dict[str, Any], file: Path) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits text before merging."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    types = [step.get("type") for step in steps]
    if types == ["ByteLevel"] and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if types == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if types == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex", "")
        for part, name in SPLITS.items():
            if pattern.startswith("(?i:'s|'t|'re|'ve|'m|'ll|'d)|") and f"|{part}" in pattern:
                return name
    raise ArtifactError(
        f"{file} splits text in a way ({', '.join(map(str, types))}) that llama.cpp has no known name for here: "
        "known are those of GPT-2, SmolLM, Llama 3 and Qwen 2"
    )


def _add_special(
    writer: Any, folder: Path, config: dict[str, Any], numbers: dict[str, int], tokenizer: dict[str, Any]
) -> None:
    """Write which tokens begin and end a text, whether they are added by themselves, and the chat template."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for key in ("bos", "eos", "unk", "pad"):
        text = settings.get(f"{key}_token")
        number = numbers.get(text["content"] if isinstance(text, dict) else text)
        if number is None:
            number = config.get(f"{key}_token_id")
            number = number[0] if isinstance(number, list) else number
        if number is not None and 0 <= number < config["vocab_size"]:
            getattr(writer, f"add_{key}_token_id")(number)
    begins = json.dumps(tokenizer.get("post_processor") or {})
    bos = settings.get("bos_token")
    bos = bos["content"] if isinstance(bos, dict) else bos
    writer.add_add_bos_token(bool(settings.get("add_bos_token", bos is not None and json.dumps(bos) in begins)))
    writer.add_add_space_prefix("▁" in json.dumps(tokenizer.get("normalizer") or {}, ensure_ascii=False))
    template = folder / "chat_template.jinja"
    template = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)
