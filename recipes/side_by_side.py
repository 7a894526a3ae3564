"""Rows of a comparison: each a process of its own, several at once over the GPUs, each result kept and used again.

python recipes/side_by_side.py '[["qat.train", "key=value"], ["qat.evaluate", "PATH"]]'       what a process runs
"""

import argparse
import contextlib
import json
import math
import os
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qat.broken_pipe import ends_quietly


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``Rows`` to a recipe's."""
    parser.add_argument("--jobs", type=int, default=1, help="rows at once, spread over the GPUs")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop then; the same command goes on later")
    parser.add_argument("--table", action="store_true", help="print the results that are there, and run nothing")


class Plan:
    """A recipe's rows in the order in which a pool takes them.

    Attributes:
        futures: of their results.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool, self.futures = pool, []

    def submit(self, function: Callable[..., dict], *arguments: Any, after: Sequence[Future] = ()) -> Future:
        """Submit a row behind those that it waits for: submitted before, they never wait for it in turn."""

        def wait() -> dict:
            for future in after:
                future.result()
            return function(*arguments)

        self.futures.append(self.pool.submit(wait))
        return self.futures[-1]


class Rows:
    """Runs what has no result yet.

    Args:
        out: the folder of results and logs.
        jobs: how many the caller runs at once; with several, each writes to a log.
        seconds: from now on: then what runs is stopped, and no other starts.
        table: run nothing, and give the results that are there.
    """

    def __init__(self, out: Path, jobs: int = 1, seconds: float = math.inf, table: bool = False) -> None:
        self.out, self.jobs, self.seconds, self.table = out, jobs, seconds, table
        self.end, self.gpus, self.failed = time.monotonic() + seconds, Gpus(), []
        for folder in ("results", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)

    def file(self, name: str) -> Path:
        """Return where a row's metrics are kept."""
        return self.out / "results" / f"{name}.json"

    def result(self, name: str, commands: list[list[str]], weight: int = 1) -> dict[str, float]:
        """Return a row's metrics, which the last command writes; nothing runs where they are there already."""
        if not self.file(name).exists():
            if self.table:
                raise FileNotFoundError(self.file(name))
            self.run(name, commands, weight)
        return json.loads(self.file(name).read_text())

    def run(self, name: str, commands: list[list[str]], weight: int = 1) -> None:
        """Print commands and run them in one process; a failure is an error.

        Args:
            name: of the log.
            commands: a module or a script with its arguments, each.
            weight: what the process takes of a GPU, beside others.
        """
        shown = "".join(f"\n$ python {'' if line[0].endswith('.py') else '-m '}{' '.join(line)}" for line in commands)
        if time.monotonic() > self.end:
            raise subprocess.TimeoutExpired(name, self.seconds)
        print(shown, flush=True)
        command, start = [sys.executable, __file__, json.dumps(commands)], time.monotonic()
        with self.gpus.one(weight) as environment, contextlib.ExitStack() as stack:
            file = self.out / "logs" / f"{name}.log"
            log = stack.enter_context(file.open("a")) if self.jobs > 1 else None
            left = None if math.isinf(self.end) else max(0.1, self.end - time.monotonic())
            output = {"stdout": log, "stderr": log and subprocess.STDOUT}
            try:
                subprocess.run(command, env=os.environ | environment, timeout=left, check=True, **output)
            except subprocess.CalledProcessError:
                tail = file.read_text().splitlines()[-5:] if log else []
                print("\n".join([f"{name}: failed after {time.monotonic() - start:.0f} s", *tail]), flush=True)
                self.failed.append(name)
                raise
        print(f"{name}: done in {time.monotonic() - start:.0f} s", flush=True)

    def close(self, futures: list[Future]) -> None:
        """Say what is left, and exit with an error if a row failed."""
        problems = [future.exception() for future in futures if future.exception() is not None]
        failures = [problem for problem in problems if not isinstance(problem, subprocess.TimeoutExpired)]
        if failures and not self.table:
            logs = f"; their output is in {self.out / 'logs'}" if self.jobs > 1 else ""
            first = f"{', '.join(self.failed)}, and what waits for them{logs}" if self.failed else failures[0]
            sys.exit(f"error: {len(failures)} of {len(futures)} rows failed: {first}")
        if problems and not self.table:
            print(f"{len(problems)} of {len(futures)} rows are left after {self.seconds:g} s: the same command goes on")


class Gpus:
    """Gives each process the GPU that is least loaded, and lets it wait where that is full.

    Args:
        limit: the most weight on a GPU at once; by default 28 for each 80 GB that it has. A training, of weight 4, took
            9 GB at 8 windows of 512 tokens: nine at once are too many for 80 GB.
    """

    def __init__(self, limit: int | None = None) -> None:
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        self.names = visible if visible != [""] else [str(index) for index in range(torch.cuda.device_count())]
        memory = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
        self.limit = limit or int(28 * min(memory, default=0) / 80e9)
        self.load, self.changed = [0] * len(self.names), threading.Condition()

    @contextlib.contextmanager
    def one(self, weight: int) -> Iterator[dict[str, str]]:
        """Yield the environment of a process that runs on it; empty without a GPU."""
        if not self.load:
            yield {}
            return
        with self.changed:
            self.changed.wait_for(lambda: not min(self.load) or min(self.load) + weight <= self.limit)
            chosen = min(range(len(self.load)), key=self.load.__getitem__)
            self.load[chosen] += weight
        try:
            yield {"CUDA_VISIBLE_DEVICES": self.names[chosen]}
        finally:
            with self.changed:
                self.load[chosen] -= weight
                self.changed.notify_all()


def run_here(commands: list[list[str]]) -> None:
    """Run modules and scripts one after another as if each were a process, but import what they share once."""
    for program, *rest in commands:
        sys.argv = [program, *rest]
        try:
            if program.endswith(".py"):
                runpy.run_path(program, run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code or type(end) is not SystemExit:  # Lightning's, of a training that was stopped
                raise


if __name__ == "__main__":
    with ends_quietly():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("commands", type=json.loads, help="a list of modules and scripts with their arguments")
        run_here(parser.parse_args().commands)
