"""The training loader of a user's own data module: it goes on where a run was killed, in the order that it had.

A loader of torch draws an epoch's order and its workers' seeds when the epoch starts. A checkpoint holds the states of
the random numbers at that moment, and how many batches were handed out: a resumed run starts the epoch in these states,
reads so many batches again, and hands out those that follow. Random numbers may come from torch, numpy, Python or a
generator of the loader's or sampler's own. Other generators and workers that persist from epoch to epoch draw anew, and
so does the order of a loader without a length, which Lightning reads ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader

from ..errors import DataError
from .in_memory_data import InMemoryData
from .random_state import random_state, set_random_state


def keep_position(data: LightningDataModule) -> None:
    """Let the training loaders of a user's own data module be ``OwnLoaders``; ours know their position."""
    if not isinstance(data, InMemoryData):
        data.train_dataloader = partial(_train_loader, type(data).__name__, data.train_dataloader)


class OwnLoader:
    """A loader with a length, and its position. Whatever else is asked of it, the loader in it answers.

    Lightning tells it the epoch, as it does a sampler; what it keeps itself of a loader's position is set too late.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.sampler = self
        self._knows = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")  # such as torchdata's
        self.epoch = self._batches = 0
        self._started: dict[str, Any] | None = None
        self._resume: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self.epoch = epoch
        for sampler in (getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None)):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        # A generator: it starts at the first next(), when the run has its random numbers and the epoch is set.
        resume, self._resume = self._resume, None
        if self._knows:
            if resume is not None:
                self.loader.load_state_dict(resume["loader"])
            yield from self.loader
            return
        if resume is not None and resume["epoch"] == self.epoch and resume["started"] is not None:
            here = random_state()
            self._set(resume["started"])
            batches = self._start()
            for self._batches in range(1, resume["batches"] + 1):
                next(batches, None)
            set_random_state(here)
        else:
            if resume is not None:
                self._set(resume["now"])
            batches = self._start()
        for batch in batches:
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values."""
        if self._knows:
            return {"loader": self.loader.state_dict(), "order": self.order()}
        now = {"generators": [generator.get_state() for generator in self._generators()]}
        state = {"epoch": self.epoch, "batches": self._batches, "started": self._started, "now": now}
        return state | {"order": self.order()}

    def order(self) -> dict[str, int | None]:
        """Return what is known of the cut into batches; the order itself is that of the restored random numbers."""
        return {"batch size": getattr(self.loader, "batch_size", None), "batches an epoch": len(self.loader)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that position, from the next iteration on; one of other data is left alone."""
        if ("loader" if self._knows else "started") not in state:
            return
        self._resume = state
        if not self._knows:
            self._batches, self._started = state["batches"], state["started"]

    def _start(self) -> Iterator[Any]:
        self._batches = 0
        self._started = random_state() | {"generators": [generator.get_state() for generator in self._generators()]}
        return iter(self.loader)

    def _set(self, state: dict[str, Any]) -> None:
        set_random_state(state)
        for generator, own in zip(self._generators(), state["generators"], strict=False):
            generator.set_state(own.cpu())

    def _generators(self) -> list[torch.Generator]:
        places = (self.loader, getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None))
        found = [getattr(place, "generator", None) for place in places]
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


class OwnLoaders(CombinedLoader):
    """What Lightning reads from: it may put a loader that spreads examples over ranks in the place of the user's."""

    @property
    def flattened(self) -> list[Any]:
        """Return the loaders."""
        return CombinedLoader.flattened.fget(self)

    @flattened.setter
    def flattened(self, loaders: list[Any]) -> None:
        """Take the loaders that Lightning has made ready."""
        CombinedLoader.flattened.fset(self, [one if sized_len(one) is None else OwnLoader(one) for one in loaders])


def checked_loader(loader: Any, where: str) -> Any:
    """Return one loader that gives batches.

    Raises:
        DataError: there is none, or there are several, or it has no batch.
    """
    if isinstance(loader, list | tuple | dict):
        raise DataError(
            f"{where} gives a {type(loader).__name__}: give one loader, whose batches are (inputs, targets)"
        )
    if not hasattr(loader, "__iter__"):
        raise DataError(f"{where} gives {loader!r:.80}: give a loader, whose batches are (inputs, targets)")
    if not isinstance(loader, CombinedLoader) and sized_len(loader) == 0:
        raise DataError(
            f"{where} has no batch: its examples are none, or fewer than one batch where a last incomplete one is left "
            "out (drop_last)"
        )
    return loader


def _train_loader(name: str, train_dataloader: Callable[[], Any]) -> Any:
    loader = checked_loader(train_dataloader(), f"data={name}: train_dataloader")
    return loader if isinstance(loader, CombinedLoader) else OwnLoaders(loader, "max_size_cycle")
