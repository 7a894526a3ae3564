"""Finished units on disk, so that a calibration that was killed goes on with the next one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CalibrationError
from ..ranks import several_ranks
from ..spec import Init
from .options import Options
from .report import Report
from .units import Unit

PATHS = ("folder", "device")  # options that change no result


class Finished:
    """Saves and loads units in ``options.folder``; does nothing where that is None.

    A unit's file remembers a digest of the options, the calibration data and the weights that it was made from.
    """

    def __init__(self, options: Options, init: Init, batches: list[Any]) -> None:
        self.folder = None if options.folder is None else Path(options.folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        chosen = {key: value for key, value in asdict(options).items() if key not in PATHS}
        self._common = hashlib.sha256(json.dumps([init.value, chosen], sort_keys=True).encode())
        _add(self._common, _tensors(batches))
        self._digests: dict[str, str] = {}

    def load(self, unit: Unit, report: Report) -> bool:
        """Fill a unit from its file, if it has one, and report what was reported then.

        Raises:
            CalibrationError: it was made from other weights, data or options, or is damaged.
        """
        if self.folder is None:
            return False
        self._digests[unit.name] = digest = self._digest(unit)
        path = self._path(unit)
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open is no dict
        except Exception as error:
            raise CalibrationError(f"{path} is damaged ({error}): delete it") from None
        if metadata["digest"] != digest:
            raise CalibrationError(
                f"{path} was made from other weights, calibration data or options: delete the folder {self.folder} "
                "to start again, or name another one"
            )
        unit.module.load_state_dict(state, strict=False)
        for part, values in json.loads(metadata["report"]).items():
            getattr(report, part).update(values)
        return True

    def save(self, unit: Unit, report: Report) -> None:
        """Write a unit that is done; the file appears whole or not at all."""
        if self.folder is None or (several_ranks() and torch.distributed.get_rank()):
            return
        mine, names = {}, {unit.name, *unit.layers}
        for part in ("losses", "fallbacks", "notes"):
            mine[part] = {name: value for name, value in getattr(report, part).items() if name in names}
        metadata = {"digest": self._digests[unit.name], "report": json.dumps(mine)}
        state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in _state(unit).items()}
        new = self._path(unit).with_suffix(".tmp")
        save_file(state, new, metadata=metadata)
        os.replace(new, self._path(unit))

    def _path(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name}.safetensors"

    def _digest(self, unit: Unit) -> str:
        digest = self._common.copy()
        digest.update(json.dumps([str(layer.weight_quantizer.spec) for layer in unit.layers.values()]).encode())
        _add(digest, _state(unit).values())
        return digest.hexdigest()


def _state(unit: Unit) -> dict[str, Tensor]:
    """Return a block's state; of a whole model only what belongs to the unit's layers."""
    state = unit.module.state_dict()
    if unit.name not in ("before", "after"):
        return state
    return {key: value for key, value in state.items() if any(key.startswith(f"{name}.") for name in unit.layers)}


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _add(digest: Any, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
