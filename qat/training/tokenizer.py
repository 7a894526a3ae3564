"""Tokenizers of Hugging Face: loaded by name or path, and kept in a run's folder, from where they ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..errors import DataError, first_line
from .hub import ask_once


def load_tokenizer(name: str) -> Any:
    """Return it.

    Args:
        name: on the Hub, or a path: a folder, or a ``tokenizer.json`` alone.

    Raises:
        DataError: transformers is not installed, or the tokenizer cannot be loaded.
    """
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError:
        raise DataError(f"data.tokenizer={name} needs transformers: pip install 'qat-lsq[hf]'") from None
    path = Path(name).expanduser()
    if path.is_file():  # AutoTokenizer would ask the Hub for a model of that name
        try:
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        except Exception as error:  # the tokenizers library raises no other
            raise DataError(f"data.tokenizer={name} is no tokenizer.json, or damaged: {first_line(error)}") from None
    if path.is_absolute() and not path.is_dir():
        raise DataError(f"data.tokenizer={name}: there is nothing at that path")
    ask_once(path)
    try:
        return AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name)
    except (OSError, ValueError) as error:
        raise DataError(f"data.tokenizer={name} cannot be loaded: {first_line(error)}") from None


def keep_tokenizer(tokenizer: Any, model: nn.Module, folder: Path) -> None:
    """Write a run's tokenizer, and the generation config of its model, for what is made of the run's checkpoint."""
    tokenizer.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
