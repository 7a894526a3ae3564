"""Whether a run can write where it will, found before it trains: a checkpoint may be due in hours."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from ..errors import TrainingError


def require_writable(folder: Path, key: str) -> None:
    """Make a folder where there is none, and a file in it that goes at once.

    Raises:
        TrainingError: that cannot be done; the message names the key that the folder comes from.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise not_writable(folder, key, error) from error


def not_writable(folder: Path, key: str, error: OSError) -> TrainingError:
    """Return the error for a folder that a key names."""
    return TrainingError(
        f"{key}={folder}: nothing can be written there ({error.strerror or error}): choose another folder"
    )
