"""The model card, README.md, of an exported folder: what it is, how it was made, and the command to run it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from ..quantized_model import QuantizedModel


def write_card(model: QuantizedModel, folder: Path, method: str, activations: str, run: str) -> None:
    """Write README.md.

    Args:
        model: what the folder holds.
        folder: where.
        method: the format's name.
        activations: what its runtime does to them.
        run: the client's one command, in that folder.
    """
    architecture = model.architecture or {}
    config = architecture.get("transformers") or {}
    what = (config.get("architectures") or [config.get("model_type")])[0] or architecture.get("builder")
    base = str(config.get("_name_or_path") or "")
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    counts = Counter(str(layer.weight) for layer in model.layers.values() if layer.weight is not None)
    weights = ", ".join(f"{kind} ({count} layers)" for kind, count in counts.items())
    header = ["---", *([f"base_model: {base}"] if on_hub else []), "tags:", "- quantization-aware-training", "---"]
    lines = [f"- Quantized weights: {weights or 'none'}", f"- Format: {method}; {activations}"]
    body = [
        f"# {base if on_hub else what or 'A quantized model'}, {method}",
        "Trained with its weights quantized: the integers in these files are the ones that the training forward used.",
        "\n".join([f"- Architecture: {what}", *lines] if what else lines),
        f"```\n{run}\n```",
    ]
    (folder / "README.md").write_text("\n".join(header) + "\n\n" + "\n\n".join(body) + "\n", encoding="utf-8")
