"""What our data modules share: the loaders they hand to Lightning."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule

from .loader import Loader


class InMemoryData(LightningDataModule):
    """Makes each rank's loaders on its device; subclasses say how, in ``train_loader`` and ``test_loader``."""

    def __init__(self) -> None:
        super().__init__()
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
