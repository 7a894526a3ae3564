"""What a run shows of its progress: a bar on a terminal, and a line after each validation."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_only

from .task import Task


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar on a terminal, with epochs counted from 1 as in the report; nothing in a log file.

    Args:
        refresh_rate: steps between two updates.
    """

    def __init__(self, refresh_rate: int) -> None:
        super().__init__(refresh_rate if sys.stdout.isatty() else 0)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Start an epoch's bar."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch + 1}")

    def print(self, *args: Any, sep: str = " ", **options: Any) -> None:
        """Print above the bars; and where there is none, of which Lightning's own prints nothing."""
        Tqdm.write(sep.join(map(str, args)), **options)


class Report(Callback):
    """Prints a line whenever validation ends."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, task: Task) -> None:
        """Print epoch, step, metrics and time."""
        if trainer.sanity_checking:
            return
        metrics = {name: f"{float(value):.4f}" for name, value in trainer.callback_metrics.items()}
        figures = "  ".join(f"{name} {value}" for name, value in metrics.items())
        seconds = time.monotonic() - self._started
        task.print(f"epoch {trainer.current_epoch + 1}  step {trainer.global_step}  {figures}  {seconds:.0f} s")
