"""Formats: one module each, with ``write``, ``read`` and ``verify``, from and to QuantizedModel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ..errors import ArtifactError, QATError

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
# What reading ends in where keys, kinds or shapes are others than a format's.
MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
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
        known = METHODS.get(method) if isinstance(method, str) else None
        return known or ("mlx" if "quantization" in config else None)
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
    with _blamed_on(f"{path} is no {name} model as its writers make them"):
        model = module(name).read(path)
    for kind in ("quantized", "activation_scale", "activation_zero_point"):
        setattr(model, kind, _blaming(getattr(model, kind), path))
    return model


def _blaming(read_tensor: Callable, path: Path) -> Callable:
    """Return the function, of a layer's name, with errors that name the layer."""

    def named(layer: str):
        with _blamed_on(f"{path}: layer {layer!r} cannot be read"):
            return read_tensor(layer)

    return named


@contextmanager
def _blamed_on(what: str) -> Iterator[None]:
    """Raise ArtifactError in the place of what files that were damaged, or changed by hand, end in."""
    try:
        yield
    except MALFORMED as error:
        from torch import OutOfMemoryError  # here: a command line that has nothing to read starts without torch

        if isinstance(error, QATError | OutOfMemoryError):
            raise
        raise ArtifactError(f"{what} ({error!r}): it was changed or damaged; copy it again or convert again") from error
