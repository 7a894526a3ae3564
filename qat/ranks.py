"""Processes of torch.distributed that train together: is this one of several, and what they all add up to."""

from __future__ import annotations

import torch
from torch import Tensor


def several_ranks() -> bool:
    """Return whether this process is one of several that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_ranks_(values: Tensor) -> Tensor:
    """Add the other ranks' values to these, in place, if there are other ranks; return them."""
    if several_ranks():
        torch.distributed.all_reduce(values)
    return values


def max_over_ranks_(values: Tensor) -> Tensor:
    """Take the largest of all ranks' values, in place, if there are other ranks; return them."""
    if several_ranks():
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return values
