"""result.json: what a finished run came to, in its folder. No torch in here: ``python -m qat.compare`` reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import DataError

RESULT = "result.json"


def write_result(run_dir: Path, metrics: dict[str, float], size: tuple[float, int] | None) -> None:
    """Write the metrics of the final weights and, where a whole model was trained, its bits per weight and bytes."""
    values: dict[str, Any] = {"metrics": metrics}
    if size is not None:
        values |= {"bits_per_weight": size[0], "bytes": size[1]}
    new = run_dir / f".{RESULT}.tmp"
    new.write_text(json.dumps(values) + "\n")
    os.replace(new, run_dir / RESULT)


def remove_result(run_dir: Path) -> None:
    """Drop the result of a run that goes on."""
    (run_dir / RESULT).unlink(missing_ok=True)


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """Return what ``write_result`` wrote; None where the run has not come to its end.

    Raises:
        DataError: the file is not ours.
    """
    path = run_dir / RESULT
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        return {"bits_per_weight": None, "bytes": None, **values, "metrics": dict(values["metrics"])}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is no result of python -m qat.train: run it again") from None
