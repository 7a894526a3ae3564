"""Formats: one module each, with ``write``, ``read`` and ``verify``, from and to QuantizedModel."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ..errors import ArtifactError

FORMATS = {
    "native": "native",
    "compressed-tensors": "compressed_tensors",
    "gguf": "gguf",
    "gptq": "gptq",
    "awq": "awq",
    "mlx": "mlx",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "onnx": "onnx",
    "executorch": "executorch",
}
OF_A_RUN = ("artifact", "last.ckpt")  # what python -m qat.train and our commands put into its folder
SUFFIXES = {".gguf": "gguf", ".onnx": "onnx", ".pte": "executorch"}
METHODS = {"qat": "native"} | {name: name for name in ("compressed-tensors", "gptq", "awq", "bitsandbytes", "torchao")}


def module(name: str) -> ModuleType:
    """Return a format's module."""
    return import_module(f"{__name__}.{FORMATS[name]}")


def format_of(path: Path) -> str | None:
    """Return the name of the format that a file or folder is in; None for none of ours."""
    for suffix, name in SUFFIXES.items():
        if path.suffix == suffix or (path.is_dir() and any(path.glob(f"*{suffix}"))):
            return name
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        method = config.get("quantization_config", {}).get("quant_method")
        return METHODS.get(method) or ("mlx" if "quantization" in config else None)
    except (OSError, ValueError, AttributeError):
        from .native import is_artifact  # a damaged artifact is still one

        return "native" if path.is_dir() and is_artifact(path) else None


def read(path: Path):
    """Open a quantized model of any format that can be read, ours or another tool's.

    Raises:
        ArtifactError: nothing that is known, or damaged.
    """
    name = format_of(path)
    if name is None:
        if not path.exists():
            raise ArtifactError(f"there is nothing at {path}")
        fix = next((f": of a run's folder, give {path / part}" for part in OF_A_RUN if (path / part).exists()), "")
        if (path / "config.json").is_file():
            fix = f"; where it is in full precision, qat.hf.from_pretrained({str(path)!r}, policy='lm_w4') quantizes it"
        raise ArtifactError(f"{path} is no model in a format that can be read, {', '.join(FORMATS)}{fix}")
    return module(name).read(path)
