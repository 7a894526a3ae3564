"""The files that travel beside a model's tensors: its tokenizer, chat template and generation config."""

from __future__ import annotations

import shutil
from pathlib import Path

PATTERNS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
)


def copy_companions(source: Path | None, folder: Path) -> None:
    """Copy the companion files that ``source`` holds into ``folder``; None has none."""
    for pattern in PATTERNS if source is not None else ():
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
