"""Instructions and conversations as a Lightning data module: JSONL, chat template, loss on completions, packed rows.

What a line may be is in ``conversations``. Rows of ``seq_len`` tokens hold several examples one after another. Their
positions start again at zero, by which transformers keeps them from attending to each other in most architectures, and
in the others not: ``require_apart`` tries it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from ..errors import DataError
from ..modes import in_eval_mode
from .conversations import messages_of, read_lines
from .in_memory_data import InMemoryData
from .loader import EpochSampler, Gather, Loader
from .metrics import IGNORED, logits_of, run
from .tokenizer import load_tokenizer

Example = tuple[list[int], list[bool]]  # tokens, and which of them the loss is of


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
        train: a JSONL file, or a JSON file that is one list. None where only validation examples are read.
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
        DataError: a missing file or tokenizer, a line of another form, or no example to validate on.
    """

    def __init__(
        self,
        train: str | None,
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
        super().__init__(batch_size, eval_batch_size, seed)
        if seq_len < 1:
            raise DataError(f"data.seq_len={seq_len}: give 1 or more")
        if val is None and not 0 < val_fraction < 1:
            raise DataError(f"data.val_fraction={val_fraction}: give a share between 0 and 1, or a file as data.val")
        self.seq_len, self.pack, self.tokenizer = seq_len, pack, load_tokenizer(tokenizer)
        if self.tokenizer.chat_template is None and self.tokenizer.eos_token_id is None:
            said = f"warning     data.tokenizer={tokenizer} names no eos_token: no answer is taught to end"
            rank_zero_only(print)(said)

        def read(path: str) -> list[Example]:
            found = (encode(line, self.tokenizer, completion_only, where) for where, line in read_lines(path))
            return fitting(list(found), seq_len, path)

        if train is None and val is None:
            raise DataError("data=instructions needs data.train or data.val")
        examples = [] if train is None else read(train)
        if val is None:
            cut = len(examples) - max(1, round(len(examples) * val_fraction))
            examples, held_out = examples[:cut], examples[cut:]
        else:
            held_out = read(val)
        self.train_rows = pack_rows(examples, seq_len, pack)
        self.val_rows = pack_rows(held_out, seq_len, pack)
        self.largest = max((max(tokens, default=0) for tokens, _ in examples or held_out), default=0)
        if not len(self.val_rows[0]):
            raise DataError("there are no validation examples: give more, or a file as data.val")

    def example(self) -> dict[str, Any]:
        """Return shape (without batch), dtype and range of what the model takes."""
        return {"shape": [self.seq_len], "dtype": "int64", "low": 0, "high": self.largest}

    def train_loader(self, device: torch.device | str, rank: int = 0, world_size: int = 1) -> Loader:
        """Return shuffled batches of rows on a device.

        Raises:
            DataError: there are fewer rows than one batch.
        """
        count, least = len(self.train_rows[0]), self.batch_size
        if count < least:
            raise DataError(
                f"the training examples fill {count} of the {least} rows of a batch: give more in data.train, or lower "
                f"data.batch_size or data.seq_len={self.seq_len}"
            )
        rows = PackedRows(*self.train_rows, device)
        return Loader(rows, self.batch_size, EpochSampler(len(rows), self.seed, rank, world_size))

    def test_loader(self, device: torch.device | str) -> Loader:
        """Return the validation rows on a device, in order."""
        rows = PackedRows(*self.val_rows, device)
        return Loader(rows, self.eval_batch_size, EpochSampler(len(rows)))


def encode(line: dict[str, Any], tokenizer: Any, completion_only: bool, where: str) -> Example:
    """Return an example's tokens, and which of them the loss is of.

    Without a chat template turns are written one after another, with a blank line between them; a prompt and its
    completion without one, as they are. The tokenizer's own first token comes first, and its end of text last.

    Raises:
        DataError: another form, or a chat template that refuses it, leaves a message out, or writes a turn otherwise
            once another follows.
    """
    messages = messages_of(line, where)
    if tokenizer.chat_template is None:
        between = "" if "prompt" in line else "\n\n"
        turns = [(message["role"] == "assistant", message["content"]) for message in messages]
        texts = [text + (between if index < len(turns) - 1 else "") for index, (_, text) in enumerate(turns)]
        pieces = [(said, _ids(tokenizer, text)) for (said, _), text in zip(turns, texts, strict=True)]
        if tokenizer.bos_token_id is not None and tokenizer("").get("input_ids", [])[:1] == [tokenizer.bos_token_id]:
            pieces.insert(0, (False, [tokenizer.bos_token_id]))
        if tokenizer.eos_token_id is not None:
            pieces.append((True, [tokenizer.eos_token_id]))
    else:
        _require_written(messages, tokenizer, where)
        if completion_only:
            pieces = list(_template_pieces(messages, tokenizer, where))
        else:
            pieces = [(True, _ids(tokenizer, _template(tokenizer, messages, False, where)))]
    tokens = [token for _, piece in pieces for token in piece]
    learned = [said or not completion_only for said, piece in pieces for _ in piece]
    return tokens, learned


def fitting(examples: list[Example], seq_len: int, path: str) -> list[Example]:
    """Return the examples of which a row of ``seq_len`` tokens predicts anything; print what does not fit.

    Raises:
        DataError: there were some, and none is left.
    """
    kept = [example for example in examples if any(example[1][1:seq_len])]
    longer = sum(len(tokens) > seq_len for tokens, _ in examples)
    lost = len(examples) - len(kept)
    if lost or longer:
        said = f"{path}: {longer} of {len(examples)} examples are longer than data.seq_len={seq_len} and are cut"
        said += f"; {lost} have nothing left to learn and are left out" if lost else ""
        if not kept:
            raise DataError(f"{said}: raise data.seq_len, or set data.completion_only=false")
        rank_zero_only(print)(said)
    return kept


def require_apart(model: nn.Module, device: torch.device | str) -> None:
    """Try whether a model keeps packed examples apart: nothing of one may reach another.

    Raises:
        DataError: it does not, or is no model of transformers.
    """
    if not hasattr(model, "get_input_embeddings"):
        raise DataError(
            f"{type(model).__name__} is no model of transformers, which data=instructions is for: give model=hf or "
            "model=hf_frozen; data.pack=false is for a forward of your own that takes input_ids and position_ids"
        )
    embedded: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    tokens, positions = torch.ones(1, 8, dtype=torch.int64), torch.arange(4).repeat(1, 2)
    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with in_eval_mode(model), torch.enable_grad():
            inputs = {"input_ids": tokens.to(device), "position_ids": positions.to(device)}
            output = logits_of(run(model, inputs))
            (slope,) = torch.autograd.grad(output[:, 4:].float().square().sum(), embedded)
    finally:
        handle.remove()
    if slope[:, :4].any():
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        raise DataError(
            f"{type(base).__name__} lets packed examples attend to one another: data.pack=false puts one in each row"
        )


def pack_rows(examples: Iterable[Example], seq_len: int, pack: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return int32 tokens, positions and targets, each (rows, seq_len): the longest first, each where it still fits.

    A target is the next token of the same example, or IGNORED. What is longer than a row is cut.
    """
    rows: list[list[Example]] = []
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


def _require_written(messages: list[dict[str, str]], tokenizer: Any, where: str) -> None:
    """Raise DataError for a message, neither the user's nor the assistant's, that a template leaves out unsaid."""
    for index, message in enumerate(messages):
        if message["role"] in ("user", "assistant") or not message["content"]:
            continue
        try:
            without = _template(tokenizer, messages[:index] + messages[index + 1 :], False, where)
        except DataError:  # so the template wants it
            continue
        if without == _template(tokenizer, messages, False, where):
            raise DataError(
                f"{where}: the tokenizer's chat template leaves out the message of the role {message['role']!r}: give "
                "it a role that the template knows, such as user or assistant"
            )


def _template_pieces(messages: list[dict[str, str]], tokenizer: Any, where: str) -> Iterable[tuple[bool, list[int]]]:
    """Yield (whether the assistant says it, tokens): its turns end where the template ends them."""
    text, tokens = "", []
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{where}: its first message is the assistant's, which answers nothing: put one of the user or the system "
            "before it, or set data.completion_only=false"
        )
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for said, end in ((False, index), (True, index + 1)):
            longer = _template(tokenizer, messages[:end], not said, where)
            whole = _ids(tokenizer, longer)
            if whole[: len(tokens)] == tokens:
                piece = whole[len(tokens) :]
            elif longer.startswith(text):  # a token would span the two, but generation starts where a prompt's end
                piece = _ids(tokenizer, longer[len(text) :])
            else:
                raise DataError(f"{where}: the chat template rewrites earlier turns: set data.completion_only=false")
            yield said, piece
            text, tokens = longer, tokens + piece


def _template(tokenizer: Any, messages: list[dict[str, str]], prompt: bool, where: str) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise DataError(f"{where}: the tokenizer's chat template refuses it: {error}") from None


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
