"""Quantization-aware training: what you trained is what you ship.

Public names are loaded when first used, so that ``import qat`` and the command lines start without torch.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_root = Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))  # source checkout: qat.kernels is ../kernels and qat.conf is ../conf

_HOME = {
    "QATError": "errors",
    "QuantSpec": "spec",
    "QuantPolicy": "policy",
    "QuantizedTensor": "numerics",
    "prepare": "surgery",
    "start_from": "starting",
    "summary": "table",
    "calibrate": "calibration",
    "check": "reach",
    "kept_weights": "accumulation",
    "shard_step_sizes": "sharding",
    "freeze": "freezing",
    "quantized_tensors": "freezing",
    "fuse_projections": "fusion",
    "save": "artifact",
    "load": "artifact",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qat' has no attribute {name!r}")
    value = getattr(import_module(f"qat.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
