"""Processes of torch.distributed that train together: is this one of several, what they add up to, what they say."""

from __future__ import annotations

import sys
import time

import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    """Return whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks_(values: Tensor) -> Tensor:
    """Add the other ranks' values to these, in place, if there are other ranks; return them."""
    if several_ranks():
        dist.all_reduce(values)
    return values


def max_over_ranks_(values: Tensor) -> Tensor:
    """Take the largest of all ranks' values, in place, if there are other ranks; return them."""
    if several_ranks():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def print_last_line(line: str, seconds: float = 3.0) -> None:
    """Print to stderr what this process ends with; of ranks that end with the same line, rank 0 alone does.

    No rank waits for another one for longer than ``seconds``, as that one may not have failed at all.
    """
    store, rank, ranks = _meeting()
    if rank == 0:
        print(line, file=sys.stderr, flush=True)
    if ranks == 1:
        return
    said = None
    try:
        if rank == 0:
            store.set("last line", line)
            _wait_for(store, [f"read by {other}" for other in range(1, ranks)], seconds)  # it may end with this process
        elif _wait_for(store, ["last line"], seconds):
            said = store.get("last line").decode()
            store.set(f"read by {rank}", "")
    except dist.DistError:  # the one that holds it is gone
        pass
    if rank and line != said:
        print(line, file=sys.stderr, flush=True)


def _wait_for(store: dist.Store, keys: list[str], seconds: float) -> bool:
    """Return whether these keys are there, in time. Unlike ``Store.wait``, it does not warn where they are not."""
    end = time.monotonic() + seconds
    while not (there := store.check(keys)) and time.monotonic() < end:
        time.sleep(0.02)
    return there


def _meeting() -> tuple[dist.Store | None, int, int]:
    """Return the store in which all ranks can leave a word, this one's number, and how many there are."""
    if several_ranks():
        return dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    if dist.is_available() and dist.is_torchelastic_launched():  # and not yet at work together
        return next(iter(dist.rendezvous("env://")))
    return None, 0, 1
