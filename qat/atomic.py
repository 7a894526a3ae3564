"""The one atomic writer: a folder appears whole, or replaces the old one in one step, or not at all."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ArtifactError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


def require_other(out: Path, source: Path, what: str) -> None:
    """Raise ArtifactError where a folder to write is the one that is read, under whatever name."""
    if out.exists() and source.exists() and out.samefile(source):
        raise ArtifactError(f"--out {out} is the {what} itself: choose another folder")


@contextmanager
def atomic_folder(out: str | Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` to write into; it takes the place of ``out`` when the block ends well.

    What writers of ``out`` left there that were killed is removed first.

    Args:
        out: the folder to create or replace; missing parents are created.
        replaceable: whether a non-empty folder that stands there may be replaced.

    Raises:
        ArtifactError: ``out`` may not be replaced, or the disk is full or read-only. What stood there is unchanged.
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or replaceable(out))):
        raise ArtifactError(
            f"{out} exists and is not of the format to be written: choose another folder, or empty this one"
        )
    try:
        _remove_leftovers(out)
        with _folder_beside(out) as new:
            yield new
            mode = new.stat().st_mode & 0o666  # of a new file: safetensors makes its own for their owner alone
            for file in [*new.rglob("*"), new]:
                if file.is_file():
                    file.chmod(mode)
                _sync(file)
            _put_in_place(new, out)
            _sync(out.parent)
    except OSError as error:
        old = "the artifact that stood there is unchanged" if out.exists() else "nothing was left there"
        first = error.args[0][0][2] if isinstance(error, shutil.Error) else error  # copytree's list of (from, to, why)
        reason = error.strerror or str(first)
        if error.errno is None and reason.endswith("written"):  # numpy's "900 requested and 512 written"
            reason = f"the disk is full, or a limit is reached ({reason})"
        raise ArtifactError(f"cannot write {out}: {reason}; {old}") from error


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """Yield a new folder, locked against ``_remove_leftovers``; what has its name at the end is removed."""
    lock = None
    while lock is None:
        new = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
        new.mkdir(parents=True)
        try:
            lock = _locked(new)
        except (BlockingIOError, FileNotFoundError):  # taken for a leftover, before it was locked
            continue
        except OSError:  # no locks here: then nothing is taken for a leftover either
            break
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_leftovers(out: Path) -> None:
    """Remove what killed writers of ``out`` left: folders of theirs that nobody has locked."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.tmp")
    for folder in out.parent.iterdir() if out.parent.is_dir() else ():
        if ours.fullmatch(folder.name):
            try:
                lock = _locked(folder)
            except OSError:  # its writer lives, or no locks here
                continue
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int:
    """Lock a folder, and return the descriptor that holds the lock: until it is closed, or the process ends.

    Raises:
        BlockingIOError: another process has locked it.
        FileNotFoundError: it is gone.
        OSError: nothing can be locked here.
    """
    if fcntl is None:
        raise OSError("no locks for folders on Windows")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.stat()  # locked, but gone by now
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sync(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there, and files are flushed on close
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(new: Path, out: Path) -> None:
    """Rename ``new`` to ``out``; a non-empty ``out`` is exchanged with it, in one step where the system can."""
    if not (out.exists() and any(out.iterdir())):
        if os.name == "nt" and out.exists():
            out.rmdir()
        os.rename(new, out)
    elif not _exchange(new, out):
        old = new.with_suffix(".old")
        os.rename(out, old)
        os.rename(new, out)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders with renameat2 (Linux) or renamex_np (macOS); return False where that does not exist."""
    here, exchange, names = -100, 2, (os.fsencode(a), os.fsencode(b))
    try:
        libc = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return libc.renamex_np(*names, exchange) == 0
        return libc.renameat2(here, names[0], here, names[1], exchange) == 0
    except (AttributeError, OSError, TypeError):
        return False
