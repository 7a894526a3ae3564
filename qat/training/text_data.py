"""Text as a Lightning data module: token ids on the training device, in contiguous windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, did_you_mean, first_line
from .in_memory_data import InMemoryData
from .loader import EpochSampler, Gather, Loader
from .tokenizer import load_tokenizer

BYTES = "bytes"


class TokenWindows:
    """Windows of ``seq_len + 1`` tokens, one after another: the inputs, and one step later the targets.

    Args:
        tokens: (N,).
        seq_len: tokens that a window predicts.
        device: where they lie.
        stride: tokens between two windows' starts; None for ``seq_len``: every token but the first is then predicted.
        limit: use only so many.
    """

    def __init__(
        self,
        tokens: Tensor,
        seq_len: int,
        device: torch.device | str = "cpu",
        stride: int | None = None,
        limit: int | None = None,
    ) -> None:
        self.tokens, self.seq_len, self.stride, self.limit = tokens.to(device), seq_len, stride or seq_len, limit

    def __len__(self) -> int:
        windows = max(0, (len(self.tokens) - 1 - self.seq_len) // self.stride + 1)
        return windows if self.limit is None else min(windows, self.limit)

    def epoch(self, order: Tensor, generator: torch.Generator | None) -> Gather:
        """Return what gathers a slice of the order into inputs and targets, both (B, seq_len) int64."""
        del generator  # text is not augmented
        device = self.tokens.device
        starts, offsets = order.to(device)[:, None] * self.stride, torch.arange(self.seq_len + 1, device=device)

        def gather(batch: slice) -> tuple[Tensor, Tensor]:
            windows = self.tokens[starts[batch] + offsets].long()
            return windows[:, :-1], windows[:, 1:]

        return gather


class TextData(InMemoryData):
    """Training and validation text.

    Args:
        source: "topics" (Python's own help texts), "files", or "datasets" (of Hugging Face, by name or path).
        train: for "files": a path or several; for "datasets": NAME:SPLIT or NAME:CONFIG:SPLIT, with a column "text".
            None where only validation text is read.
        val: the same; without it, the last ``val_fraction`` of the training text.
        val_fraction: the share of the text kept for validation.
        tokenizer: "bytes", or the name or path of a Hugging Face tokenizer.
        seq_len: tokens that a window predicts.
        batch_size: windows of a training step, on each device.
        eval_batch_size: windows of a validation step.
        seed: of the order of the windows.
        val_window: tokens of a validation window, which share none and predict all but their first one, as perplexity
            is often measured; None for windows as in training.
        val_windows: validate on only so many.

    Raises:
        DataError: an unknown source, a missing path, package or tokenizer, or less text than one batch.
    """

    def __init__(
        self,
        source: str,
        seq_len: int,
        batch_size: int,
        eval_batch_size: int = 32,
        tokenizer: str = BYTES,
        train: str | Sequence[str] | None = None,
        val: str | Sequence[str] | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        val_window: int | None = None,
        val_windows: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        self.seq_len, self.val_window, self.val_windows = seq_len, val_window, val_windows
        for key, value in (("seq_len", seq_len), ("val_windows", val_windows)):
            if value is not None and value < 1:
                raise DataError(f"data.{key}={value}: give 1 or more")
        if val is None and not 0 < val_fraction < 1:
            raise DataError(f"data.val_fraction={val_fraction}: give a share between 0 and 1, or a text as data.val")
        if val_window is not None and val_window < 2:
            raise DataError(f"data.val_window={val_window}: a window needs 2 tokens to predict one of them")
        train_text, val_text = _texts(source, train, val, val_fraction)
        self.tokenizer = None if tokenizer == BYTES else load_tokenizer(tokenizer)
        self.train_tokens = None if train_text is None else tokenize(train_text, self.tokenizer)
        self.val_tokens = tokenize(val_text, self.tokenizer)
        if self.train_tokens is not None and len(TokenWindows(self.train_tokens, seq_len)) < batch_size:
            raise DataError(
                f"the training text has {len(self.train_tokens)} tokens, too few for {batch_size} windows of "
                f"data.seq_len={seq_len}"
            )
        if not len(self._val("cpu")):
            raise DataError(
                f"the validation text has {len(self.val_tokens)} tokens, too few for a window of "
                + (f"data.seq_len={seq_len}" if val_window is None else f"data.val_window={val_window}")
            )

    def example(self) -> dict:
        """Return shape (without batch), dtype and range of what the model takes."""
        tokens = self.val_tokens if self.train_tokens is None else self.train_tokens
        return {"shape": [self.seq_len], "dtype": "int64", "low": 0, "high": int(tokens.max())}

    def train_loader(self, device: torch.device | str, rank: int = 0, world_size: int = 1) -> Loader:
        """Return shuffled batches of windows on a device.

        Raises:
            DataError: there is no training text.
        """
        if self.train_tokens is None:
            raise DataError("there is no training text: give data.train")
        windows = TokenWindows(self.train_tokens, self.seq_len, device)
        return Loader(windows, self.batch_size, EpochSampler(len(windows), self.seed, rank, world_size))

    def test_loader(self, device: torch.device | str) -> Loader:
        """Return the validation windows on a device, in order."""
        windows = self._val(device)
        return Loader(windows, self.eval_batch_size, EpochSampler(len(windows)))

    def _val(self, device: torch.device | str) -> TokenWindows:
        length = self.seq_len if self.val_window is None else self.val_window - 1
        return TokenWindows(self.val_tokens, length, device, self.val_window, self.val_windows)


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Return token ids: the text's bytes as uint8 where there is no tokenizer, else int32 of a Hugging Face one."""
    if tokenizer is None:
        return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int32)


def _texts(source: str, train, val, val_fraction: float) -> tuple[str | None, str]:
    if source == "topics":
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    elif source in ("files", "datasets"):
        read = _read_files if source == "files" else _read_datasets
        if train is None and val is None:
            raise DataError(f"data.source={source} needs data.train or data.val")
        text = None if train is None else read("train", train)
        if val is not None:
            return text, read("val", val)
    else:
        raise DataError(f"unknown text source {source!r}{did_you_mean(source, ('topics', 'files', 'datasets'))}")
    cut = int(len(text) * (1 - val_fraction))
    return text[:cut], text[cut:]


def _read_files(name: str, paths: str | Sequence[str]) -> str:
    parts = []
    for path in [paths] if isinstance(paths, str) else paths:
        file = Path(path).expanduser()
        if not file.is_file():
            raise DataError(f"data.{name}={path}: there is no text file at that path")
        try:
            parts.append(file.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
        except UnicodeDecodeError as error:
            raise DataError(f"data.{name}={path} is no text in UTF-8: {error}") from None
    return "\n".join(parts)


def _read_datasets(name: str, places: str | Sequence[str]) -> str:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError("data.source=datasets needs the package datasets: pip install datasets") from None
    parts = []
    for place in [places] if isinstance(places, str) else places:
        what, _, split = place.rpartition(":")
        dataset, _, config = what.partition(":")
        if not dataset:
            raise DataError(f"data.{name}={place}: give NAME:SPLIT or NAME:CONFIG:SPLIT, such as wikitext:train")
        try:
            rows = load_dataset(dataset, config or None, split=split)
        except (OSError, ValueError) as error:
            raise DataError(f"data.{name}={place} cannot be loaded: {first_line(error)}") from None
        if "text" not in rows.column_names:
            raise DataError(f"data.{name}={place} has no column 'text', only {', '.join(rows.column_names)}")
        parts += rows["text"]
    return "\n".join(parts)
