"""Batches of an in-memory data set, in an order that depends on (seed, epoch) alone.

No worker processes and no global random state: the data lie on the training device, and a batch is a few tensor
operations there. The position is part of Lightning's checkpoint, so that a run goes on in mid-epoch where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Gather = Callable[[slice], Any]


class Examples(Protocol):
    """What a Loader reads from."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def epoch(self, order: Tensor, generator: torch.Generator | None) -> Gather:
        """Return a function from a slice of ``order`` to a batch; the generator, if any, draws augmentations."""


class EpochSampler:
    """The order of an epoch; Lightning sets the epoch, as it does for torch's own distributed sampler.

    Args:
        size: number of examples.
        seed: None for the stored order, which every rank then reads in full.
        rank, world_size: with a seed, a rank reads every ``world_size``-th example.
    """

    def __init__(self, size: int, seed: int | None = None, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size if self.seed is None else self.size // self.world_size

    def draw(self) -> tuple[Tensor, torch.Generator | None]:
        """Return the epoch's indices, and a generator for its augmentations (None without a seed)."""
        if self.seed is None:
            return torch.arange(self.size), None
        mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)  # torch reads 32 bits of a seed
        generator = torch.Generator().manual_seed(int(mixed[0]))
        order = torch.randperm(self.size, generator=generator)
        return order[self.rank :: self.world_size][: len(self)], generator


class Loader:
    """Iterates over batches; where the sampler shuffles, the last incomplete batch is dropped."""

    def __init__(self, examples: Examples, batch_size: int, sampler: EpochSampler) -> None:
        self.examples, self.batch_size, self.sampler = examples, batch_size, sampler
        self.batch_sampler = None  # Lightning reads it wherever there is a sampler
        self._yielded = 0
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.batch_size)
        return full + (self.sampler.seed is None and rest > 0)

    def __iter__(self) -> Iterator[Any]:
        # A generator: it starts at the first next(), when Lightning has set the sampler's epoch.
        gather = self.examples.epoch(*self.sampler.draw())
        epoch, start = self._resume or (0, 0)
        self._resume = None
        for batch in range(start if epoch == self.sampler.epoch else 0, len(self)):
            self._yielded = batch + 1
            yield gather(slice(batch * self.batch_size, (batch + 1) * self.batch_size))

    def order(self) -> dict[str, int | None]:
        """Return what the order of an epoch, and its cut into batches, depends on."""
        sampler = self.sampler
        keys = {"data.seed": sampler.seed, "data.batch_size": self.batch_size}
        return keys | {"training examples": sampler.size, "ranks": sampler.world_size}

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the epoch, how many of its batches were handed out, and of what order."""
        return {"epoch": self.sampler.epoch, "batches": self._yielded, "order": self.order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that position once the sampler has reached its epoch."""
        self._resume = state["epoch"], state["batches"]
        self.sampler.epoch, self._yielded = self._resume
