"""One run in a folder at a time: two would write one checkpoint and one log over each other."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import IO

from ..errors import TrainingError
from .folders import not_writable, require_writable

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

LOCK = ".lock"


def hold(run_dir: Path) -> IO[str] | None:
    """Lock a run's folder until what is returned is closed, or the process ends in any way.

    None where nothing can be locked, such as on Windows. The lock is of the process: workers that a killed run leaves
    behind for a moment do not have it.

    Raises:
        TrainingError: another process runs there, or nothing can be written there.
    """
    if fcntl is None:
        return None
    require_writable(run_dir, "run_dir")
    try:
        file = (run_dir / LOCK).open("w")
    except OSError as error:  # such as another user's
        raise not_writable(run_dir, "run_dir", error) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # no locks on this file system
            return None
        raise TrainingError(
            f"another run is at work in {run_dir}: wait for its end, or choose another folder with name=OTHER"
        ) from None
    return file
