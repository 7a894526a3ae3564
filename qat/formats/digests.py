"""SHA-256 of files side by side: one file takes one core, and Python lets other threads run meanwhile."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from ..errors import ArtifactError

MOST_THREADS = 8


def sha256(files: Iterable[Path]) -> list[str]:
    """Return the files' digests in hexadecimal digits."""
    with _threads() as threads:
        return list(threads.map(_of_file, files))


class Digests:
    """Compares files with their digests in threads, while they are read for another purpose.

    Files are opened at once, so that an artifact that is replaced meanwhile does not matter. Use as ``Digests(folder,
    files).start()``, and ``check()`` in the end; or ``close()`` without a start.
    """

    def __init__(self, folder: Path, files: dict[str, dict]) -> None:
        self._folder, self._files = folder, files
        self._streams: list[BinaryIO] = []
        self._threads: ThreadPoolExecutor | None = None
        self._found: list[Future] = []
        try:
            for name in files:
                self._streams.append((folder / name).open("rb"))
        except OSError as error:
            self.close()
            raise _unreadable(folder, error) from None

    def start(self) -> Digests:
        """Start reading."""
        self._threads = _threads()
        self._found = [self._threads.submit(_of_stream, stream) for stream in self._streams]
        return self

    def check(self) -> None:
        """Wait for the digests.

        Raises:
            ArtifactError: one is not what it should be, or a file cannot be read.
        """
        try:
            for (name, expected), found in zip(self._files.items(), self._found, strict=True):
                if found.result() != expected.get("sha256"):
                    raise ArtifactError(
                        f"{self._folder / name} is damaged (its SHA-256 does not match): copy it again or convert again"
                    )
        except OSError as error:
            raise _unreadable(self._folder, error) from None
        finally:
            self.close()

    def close(self) -> None:
        """Let go of files and threads."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for stream in self._streams:
            stream.close()


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "sha256")


def _of_file(file: Path) -> str:
    with file.open("rb") as stream:
        return _of_stream(stream)


def _of_stream(stream: BinaryIO) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _unreadable(folder: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"{folder} cannot be read: {error}; copy it again or convert the checkpoint again")
