"""Processes of their own for tests, which need not import torch and Lightning for seconds: copies of one that has.

It is not the process of the tests: that one may have a GPU at work, which no copy could use.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from multiprocessing import get_all_start_methods, get_context, set_start_method
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["qat.training.run", "sklearn.datasets"])


def start(printed: Path, function: Callable, *arguments: Any) -> BaseProcess:
    """Start a function of an importable module, in the folder and with the import path of now.

    What it prints comes into a file. Whoever starts a process kills it.
    """
    process = CONTEXT.Process(target=_run, args=(printed, function, *arguments))
    process.start()
    return process


def train(overrides: str) -> None:
    """Run the command line."""
    sys.argv = ["train", *overrides.split()]
    import_module("qat.train").main()


def _run(printed: Path, function: Callable, *arguments: Any) -> None:
    sys.stdout = sys.stderr = printed.open("w")
    # As in a process that was started by hand. The workers of a data loader would be of a server, and outlive a kill.
    set_start_method(get_all_start_methods()[0], force=True)
    function(*arguments)
