"""Text as a Lightning data module: token ids on the training device, in contiguous windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError, did_you_mean
from .in_memory_data import InMemoryData
from .loader import EpochSampler, Gather, Loader

BYTES = "bytes"


class TokenWindows:
    """Windows of ``seq_len + 1`` tokens, one after another: the inputs, and one step later the targets."""

    def __init__(self, tokens: Tensor, seq_len: int, device: torch.device | str = "cpu") -> None:
        self.tokens, self.seq_len = tokens.to(device), seq_len

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.seq_len

    def epoch(self, order: Tensor, generator: torch.Generator | None) -> Gather:
        """Return what gathers a slice of the order into inputs and targets, both (B, seq_len) int64."""
        del generator  # text is not augmented
        device = self.tokens.device
        starts, offsets = order.to(device)[:, None] * self.seq_len, torch.arange(self.seq_len + 1, device=device)

        def gather(batch: slice) -> tuple[Tensor, Tensor]:
            windows = self.tokens[starts[batch] + offsets].long()
            return windows[:, :-1], windows[:, 1:]

        return gather


class TextData(InMemoryData):
    """Training and validation text.

    Args:
        source: "topics" (Python's own help texts) or "files".
        train: for "files": a path or several.
        val: for "files": a path or several; without it, the last ``val_fraction`` of the training text.
        val_fraction: the share of the text kept for validation.
        tokenizer: "bytes", or the name or path of a Hugging Face tokenizer.
        seq_len: tokens that a window predicts.
        batch_size: windows of a training step, on each device.
        eval_batch_size: windows of a validation step.
        seed: of the order of the windows.

    Raises:
        DataError: an unknown source, a missing path or package, or less text than one batch.
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
    ) -> None:
        super().__init__()
        self.seq_len, self.batch_size, self.eval_batch_size, self.seed = seq_len, batch_size, eval_batch_size, seed
        train_text, val_text = _texts(source, train, val, val_fraction)
        self.train_tokens, self.val_tokens = tokenize(train_text, tokenizer), tokenize(val_text, tokenizer)
        for name, tokens, batch in (("training", self.train_tokens, batch_size), ("validation", self.val_tokens, 1)):
            if len(TokenWindows(tokens, seq_len)) < batch:
                raise DataError(
                    f"the {name} text has {len(tokens)} tokens, too few for {batch} windows of data.seq_len={seq_len}"
                )

    def example(self) -> dict:
        """Return shape (without batch), dtype and range of what the model takes."""
        return {"shape": [self.seq_len], "dtype": "int64", "low": 0, "high": int(self.train_tokens.max())}

    def train_loader(self, device: torch.device | str, rank: int = 0, world_size: int = 1) -> Loader:
        """Return shuffled batches of windows on a device."""
        windows = TokenWindows(self.train_tokens, self.seq_len, device)
        return Loader(windows, self.batch_size, EpochSampler(len(windows), self.seed, rank, world_size))

    def test_loader(self, device: torch.device | str) -> Loader:
        """Return the validation windows on a device, in order."""
        windows = TokenWindows(self.val_tokens, self.seq_len, device)
        return Loader(windows, self.eval_batch_size, EpochSampler(len(windows)))


def tokenize(text: str, tokenizer: str) -> Tensor:
    """Return token ids: uint8 for bytes, else int32 by a Hugging Face tokenizer.

    Raises:
        DataError: the tokenizer cannot be loaded.
    """
    if tokenizer == BYTES:
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except ImportError:
        raise DataError(f"data.tokenizer={tokenizer} needs transformers: pip install 'qat-lsq[hf]'") from None
    except (OSError, ValueError) as error:
        raise DataError(f"data.tokenizer={tokenizer} cannot be loaded: {str(error).splitlines()[0]}") from None
    return torch.tensor(loaded(text, verbose=False)["input_ids"], dtype=torch.int32)


def _texts(source: str, train, val, val_fraction: float) -> tuple[str, str]:
    if source == "topics":
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    elif source == "files":
        if train is None:
            raise DataError("data.source=files needs data.train=PATH, or [PATH, PATH]")
        text = _read("train", train)
        if val is not None:
            return text, _read("val", val)
    else:
        raise DataError(f"unknown text source {source!r}{did_you_mean(source, ('topics', 'files'))}")
    cut = int(len(text) * (1 - val_fraction))
    return text[:cut], text[cut:]


def _read(name: str, paths: str | Sequence[str]) -> str:
    parts = []
    for path in [paths] if isinstance(paths, str) else paths:
        file = Path(path).expanduser()
        if not file.is_file():
            raise DataError(f"data.{name}={path}: there is no text file at that path")
        parts.append(file.read_text(encoding="utf-8"))
    return "\n".join(parts)
