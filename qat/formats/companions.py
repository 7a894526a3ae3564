"""The files that travel beside a model's tensors: its tokenizer, chat template, generation config and adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

from .. import adapters
from ..quantized_model import QuantizedModel

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


def copy_companions(model: QuantizedModel, folder: Path) -> None:
    """Put what travels with a model into ``folder``: companion files, and adapters as peft's own folders."""
    source = model.files
    for pattern in PATTERNS if source is not None else ():
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    for name in adapters.stored(source):
        shutil.copytree(source / name, folder / name)
    if model.adapter is not None:
        model.adapter(folder / adapters.FOLDER)
