"""result.json: what a finished run came to, in its folder. No torch in here: ``python -m qat.compare`` reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError

RESULT = "result.json"


def write_result(
    run_dir: Path, overrides: Sequence[str], metrics: dict[str, float], size: tuple[float, int] | None
) -> None:
    """Write a run's overrides, the metrics of its final weights and, of a whole model, its bits per weight and bytes.

    Hydra's own file of the overrides is written anew by every command for the folder, also by one that is refused.
    """
    values: dict[str, Any] = {"overrides": list(overrides), "metrics": metrics}
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
        overrides = [str(word) for word in values.get("overrides", ())]
        sizes = {"bits_per_weight": values.get("bits_per_weight"), "bytes": values.get("bytes")}
        return {"overrides": overrides, "metrics": dict(values["metrics"]), **sizes}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is no result of python -m qat.train: run it again") from None
