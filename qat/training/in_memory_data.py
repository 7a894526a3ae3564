"""What our data modules share: the loaders they hand to Lightning."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule

from ..errors import DataError
from .loader import Loader


class InMemoryData(LightningDataModule):
    """Makes each rank's loaders on its device; subclasses say how, in ``train_loader`` and ``test_loader``.

    Args:
        batch_size: of a training step, on each device.
        eval_batch_size: of a test step.
        seed: of the order.

    Raises:
        DataError: a batch of nothing, or a negative seed.
    """

    def __init__(self, batch_size: int, eval_batch_size: int, seed: int) -> None:
        super().__init__()
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise DataError(f"data.{key}={value}: give {least} or more")
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self._train_loader: Loader | None = None

    def train_loader(self, device: torch.device | str, rank: int = 0, world_size: int = 1) -> Loader:
        """Return shuffled training batches on a device."""
        raise NotImplementedError

    def test_loader(self, device: torch.device | str) -> Loader:
        """Return the batches that metrics are measured on, in order."""
        raise NotImplementedError

    def train_dataloader(self) -> Loader:
        """Return this rank's training batches: the same loader at every call."""
        if self._train_loader is None:
            trainer = self.trainer
            device, rank, ranks = trainer.strategy.root_device, trainer.global_rank, trainer.world_size
            self._train_loader = self.train_loader(device, rank, ranks)
        return self._train_loader

    def val_dataloader(self) -> Loader:
        """Return the test batches: these data sets have no third part."""
        return self.test_loader(self.trainer.strategy.root_device)
