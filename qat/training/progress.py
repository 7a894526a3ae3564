"""What a run prints: a bar on a terminal, a line after each validation, and at the end where its result is."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from shlex import quote
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import nn

from ..models import architecture_of
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


def own_model(node: DictConfig, model: nn.Module) -> str:
    """Return what convert has to be told of a model whose checkpoint cannot name its architecture."""
    if architecture_of(model) is not None:
        return ""
    module, _, name = node._target_.rpartition(".")
    alone = all(str(key).startswith("_") for key in node)  # --model takes no arguments
    if alone and module:
        return f" --model {module}:{name}"
    return f" --model package.module:function  # of your own, which gives this {type(model).__name__} untrained"


@rank_zero_only
def print_result(run_dir: Path, checkpoint: Path, metrics: dict[str, float], quantized: bool, own_model: str) -> None:
    """Print where a run's checkpoint is, its metrics, and the command that comes next."""
    saved = checkpoint.exists()
    print(f"run folder  {run_dir}")
    print(f"checkpoint  {checkpoint if saved else 'none was saved'}")
    print("metrics     " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    if not saved:
        return
    if quantized:
        source, out = quote(str(checkpoint)), quote(str(run_dir / "artifact"))
        print(f"next        python -m qat.convert {source} --to native --out {out}{own_model}")
    else:
        print(f"next        python -m qat.train experiment=NAME {quote(f'init_from={checkpoint}')}")
