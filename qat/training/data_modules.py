"""Data modules of ours and of the user's own, seen alike: what a run asks of either.

One of the user's own is any ``LightningDataModule`` with a ``train_dataloader`` and a ``val_dataloader`` whose batches
are (inputs, targets). ``own_loader`` lets its training loader go on where a killed run was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

from ..errors import DataError
from ..inputs import example_like, misfit
from .in_memory_data import InMemoryData
from .metrics import pair
from .own_loader import checked_loader


def check_module(data: Any) -> None:
    """Raise DataError unless a run can read from it."""
    name = type(data).__name__
    if not isinstance(data, LightningDataModule):
        raise DataError(f"data={name}: give a LightningDataModule, whose batches are (inputs, targets)")
    for method in ("train_dataloader", "val_dataloader"):
        if not is_overridden(method, data, LightningDataModule):
            raise DataError(f"data={name} has no {method}: give it one, whose batches are (inputs, targets)")


def open_module(data: Any) -> LightningDataModule:
    """Return a data module that is ready to be read from, where no trainer sets it up.

    Raises:
        DataError: see ``check_module``.
    """
    check_module(data)
    data.prepare_data()
    data.setup("validate")
    return data


def training_batches(
    data: LightningDataModule, device: torch.device, rank: int = 0, world_size: int = 1
) -> Iterable[Any]:
    """Return training batches on a device, from a loader beside the one that trains; of ours, a rank's share."""
    if isinstance(data, InMemoryData):
        return data.train_loader(device, rank, world_size)
    loader = data.train_dataloader()
    return _on_device(loader.iterables if isinstance(loader, CombinedLoader) else loader, device)


def test_batches(data: LightningDataModule, device: torch.device | str) -> Iterable[Any]:
    """Return the batches that metrics are measured on, on a device: of the user's own data, those of validation.

    Raises:
        DataError: see ``checked_loader``.
    """
    if isinstance(data, InMemoryData):
        return data.test_loader(device)
    return _on_device(checked_loader(data.val_dataloader(), f"data={type(data).__name__}: val_dataloader"), device)


def example_of(data: LightningDataModule) -> dict[str, Any] | None:
    """Return what inputs of the user's own data look like; None where they are not batches of tensors."""
    inputs, _ = next(iter(test_batches(data, "cpu")), (None, None))
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs  # of torch's own collate, which was given tuples
    return example_like(inputs) if misfit(inputs) is None else None


def _on_device(loader: Iterable[Any], device: torch.device | str) -> Iterator[Any]:
    for batch in loader:
        yield move_data_to_device(pair(batch), device)
