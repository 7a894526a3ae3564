"""Instructions and conversations as a Lightning data module: JSONL, chat template, loss on completions, packed rows.

A line is {"messages": [{"role", "content"}, ...]}, {"prompt", "completion"} or {"instruction", "input", "output"}. Rows
of ``seq_len`` tokens hold several examples one after another. Their positions start again at zero, by which
transformers keeps them from attending to each other; so a model must take ``position_ids``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .in_memory_data import InMemoryData
from .loader import EpochSampler, Gather, Loader
from .metrics import IGNORED


class PackedRows:
    """Rows of tokens, positions and targets, each (rows, seq_len)."""

    def __init__(self, tokens: Tensor, positions: Tensor, targets: Tensor, device: torch.device | str) -> None:
        self.tokens, self.positions, self.targets = (x.to(device) for x in (tokens, positions, targets))

    def __len__(self) -> int:
        return len(self.tokens)

    def epoch(self, order: Tensor, generator: torch.Generator | None) -> Gather:
        """Return what gathers a slice of the order into ({"input_ids", "position_ids"}, targets), int64."""
        del generator  # text is not augmented
        order = order.to(self.tokens.device)

        def gather(batch: slice) -> tuple[dict[str, Tensor], Tensor]:
            rows = order[batch]
            inputs = {"input_ids": self.tokens[rows].long(), "position_ids": self.positions[rows].long()}
            return inputs, self.targets[rows].long()

        return gather


class InstructionData(InMemoryData):
    """Training and validation examples.

    Args:
        train: a JSONL file.
        tokenizer: the name or path of a Hugging Face tokenizer; its chat template is used if it has one.
        seq_len: tokens of a row.
        batch_size: rows of a training step, on each device.
        val: a JSONL file; None for the last ``val_fraction`` of the training examples.
        val_fraction: the share of the examples kept for validation.
        completion_only: the loss is of the assistant's words alone, not of the prompts.
        pack: several examples in a row; else one.
        eval_batch_size: rows of a validation step.
        seed: of the order of the rows.

    Raises:
        DataError: a missing file or tokenizer, a line of another form, or fewer rows than one batch.
    """

    def __init__(
        self,
        train: str,
        tokenizer: str,
        seq_len: int,
        batch_size: int,
        val: str | None = None,
        val_fraction: float = 0.05,
        completion_only: bool = True,
        pack: bool = True,
        eval_batch_size: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.seq_len, self.batch_size, self.eval_batch_size, self.seed = seq_len, batch_size, eval_batch_size, seed
        loaded = _tokenizer(tokenizer)
        examples = [encode(line, loaded, completion_only, where) for where, line in _lines(train)]
        if val is None:
            cut = len(examples) - max(1, round(len(examples) * val_fraction))
            examples, held_out = examples[:cut], examples[cut:]
        else:
            held_out = [encode(line, loaded, completion_only, where) for where, line in _lines(val)]
        self.train_rows = pack_rows(examples, seq_len, pack)
        self.val_rows = pack_rows(held_out, seq_len, pack)
        self.largest = max((max(tokens, default=0) for tokens, _ in examples), default=0)
        for name, rows, least in (("training", self.train_rows, batch_size), ("validation", self.val_rows, 1)):
            if len(rows[0]) < least:
                raise DataError(f"the {name} examples fill {len(rows[0])} rows of data.seq_len={seq_len}, not {least}")

    def example(self) -> dict[str, Any]:
        """Return shape (without batch), dtype and range of what the model takes."""
        return {"shape": [self.seq_len], "dtype": "int64", "low": 0, "high": self.largest}

    def train_loader(self, device: torch.device | str, rank: int = 0, world_size: int = 1) -> Loader:
        """Return shuffled batches of rows on a device."""
        rows = PackedRows(*self.train_rows, device)
        return Loader(rows, self.batch_size, EpochSampler(len(rows), self.seed, rank, world_size))

    def test_loader(self, device: torch.device | str) -> Loader:
        """Return the validation rows on a device, in order."""
        rows = PackedRows(*self.val_rows, device)
        return Loader(rows, self.eval_batch_size, EpochSampler(len(rows)))


def encode(line: dict[str, Any], tokenizer: Any, completion_only: bool, where: str) -> tuple[list[int], list[bool]]:
    """Return an example's tokens, and which of them the loss is of.

    Raises:
        DataError: another form, or a chat template that writes a turn otherwise once another follows it.
    """
    messages = _messages(line, where)
    if tokenizer.chat_template is None:
        turns = [(message["role"] == "assistant", message["content"]) for message in messages]
        pieces = [(said, tokenizer(text, add_special_tokens=False)["input_ids"]) for said, text in turns]
        if tokenizer.eos_token_id is not None:
            pieces.append((True, [tokenizer.eos_token_id]))
    else:
        pieces = list(_template_pieces(messages, tokenizer, where))
    tokens = [token for _, piece in pieces for token in piece]
    learned = [said or not completion_only for said, piece in pieces for _ in piece]
    return tokens, learned


def pack_rows(
    examples: Iterable[tuple[list[int], list[bool]]], seq_len: int, pack: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return int32 tokens, positions and targets, each (rows, seq_len): the longest first, each where it still fits.

    A target is the next token of the same example, or IGNORED. What is longer than a row is cut.
    """
    rows: list[list[tuple[list[int], list[bool]]]] = []
    room: list[int] = []
    for tokens, learned in sorted(examples, key=lambda example: -len(example[0])):
        example = tokens[:seq_len], learned[:seq_len]
        size = len(example[0])
        fits = next((index for index, left in enumerate(room) if pack and left >= size), None)
        if fits is None:
            fits = len(rows)
            rows.append([])
            room.append(seq_len)
        rows[fits].append(example)
        room[fits] -= size
    shape = len(rows), seq_len
    tokens, positions = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    targets = torch.full(shape, IGNORED, dtype=torch.int32)
    for index, row in enumerate(rows):
        start = 0
        for example, learned in row:
            end = start + len(example)
            tokens[index, start:end] = torch.tensor(example, dtype=torch.int32)
            positions[index, start:end] = torch.arange(len(example))
            following = [token if used else IGNORED for token, used in zip(example[1:], learned[1:], strict=True)]
            targets[index, start : start + len(following)] = torch.tensor(following, dtype=torch.int32)
            start = end
        positions[index, start:] = torch.arange(seq_len - start)
    return tokens, positions, targets


def _template_pieces(messages: list[dict[str, str]], tokenizer: Any, where: str) -> Iterable[tuple[bool, list[int]]]:
    """Yield (whether the assistant says it, tokens): its turns end where the template ends them."""
    done: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _template(tokenizer, messages[:index], True)
        turn = _template(tokenizer, messages[: index + 1], False)
        if prompt[: len(done)] != done or turn[: len(prompt)] != prompt:
            raise DataError(f"{where}: the chat template rewrites earlier turns: set data.completion_only=false")
        yield False, prompt[len(done) :]
        yield True, turn[len(prompt) :]
        done = turn


def _template(tokenizer: Any, messages: list[dict[str, str]], prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _messages(line: dict[str, Any], where: str) -> list[dict[str, str]]:
    if "messages" in line:
        messages = line["messages"]
    elif "prompt" in line and "completion" in line:
        messages = [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["completion"]}]
    elif "instruction" in line and "output" in line:
        asked = "\n\n".join(part for part in (line["instruction"], line.get("input")) if part)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": line["output"]}]
    else:
        raise DataError(f"{where}: give messages, prompt and completion, or instruction and output, not {list(line)}")
    if not messages or messages[-1].get("role") != "assistant":
        raise DataError(f"{where}: its last message is not the assistant's, so there is nothing to learn")
    return messages


def _lines(path: str) -> Iterable[tuple[str, dict[str, Any]]]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"there is no JSONL file at {path}")
    with file.open(encoding="utf-8") as stream:
        for number, text in enumerate(stream, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise DataError(f"{path}:{number} is no JSON: {error}") from None
            if not isinstance(line, dict):
                raise DataError(f"{path}:{number} is no JSON object")
            yield f"{path}:{number}", line


def _tokenizer(name: str) -> Any:
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    except ImportError:
        raise DataError(f"data.tokenizer={name} needs transformers: pip install 'qat-lsq[hf]'") from None
    except (OSError, ValueError) as error:
        raise DataError(f"data.tokenizer={name} cannot be loaded: {str(error).splitlines()[0]}") from None
