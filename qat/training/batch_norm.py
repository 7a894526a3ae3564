"""Batch norm statistics measured again when training is over."""

from __future__ import annotations

from itertools import islice

import torch
from lightning.pytorch import Callback, Trainer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from ..errors import TrainingError
from .data_modules import training_batches
from .task import Task


class BatchNormEstimate(Callback):
    """Replaces running statistics by the mean over training batches, with the final weights, before the last save.

    Low-bit weights jump between two codes until the end, and a running mean remembers codes that are no longer there
    (arXiv:2203.11086, section 4.1); mixed images have other statistics than those the network will see. The batches
    are those of the first epoch, the same on every rank.

    Args:
        batches: how many, 1 or more.

    Raises:
        TrainingError: fewer than one batch.
    """

    def __init__(self, batches: int = 100) -> None:
        if batches < 1:
            raise TrainingError(f"callbacks.batch_norm.batches={batches}: give 1 or more")
        self.batches = batches

    def on_train_end(self, trainer: Trainer, task: Task) -> None:
        """Measure, where there is anything to measure."""
        if not any(isinstance(module, _BatchNorm) for module in task.model.modules()):
            return
        loader = training_batches(trainer.datamodule, task.device)
        inputs = ((batch[0],) for batch in islice(loader, self.batches))  # of a tuple torch takes the first
        with trainer.strategy.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
            update_bn(inputs, task)
