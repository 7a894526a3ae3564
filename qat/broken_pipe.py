"""Commands whose output is read no further, as by ``| head -1``, end quietly. No torch in here, and no Hydra."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ends_quietly() -> Iterator[None]:
    """Exit with status 1 where nobody reads the output any more, without the traceback that Python prints then.

    Also a decorator, of a command's main. What is still to be written is written here: at Python's own exit it is late.

    Raises:
        BrokenPipeError: of another pipe than the output, such as that of a worker process that has died.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # closed before Python started, as by >&-
                sys.stdout.flush()
    except BrokenPipeError:
        if not _unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds
        sys.exit(1)


def _unread() -> bool:
    """Return whether the other end of the output is closed; Windows, without poll, tells by another error."""
    if not hasattr(select, "poll"):
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # errors alone
    return bool(output.poll(0))
