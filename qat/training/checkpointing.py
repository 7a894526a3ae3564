"""Checkpoints: ``last.ckpt`` to resume from and, where asked for, ``best.ckpt``."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from ..errors import TrainingError
from .callbacks import all_finite, diverged, ends_step, fake_quant_waits
from .fingerprint import fingerprint, has_changed
from .folders import require_writable
from .stopping import agree_on_sigterm
from .task import Task

LAST, BEST = "last.ckpt", "best.ckpt"


class Checkpoints(Checkpoint):
    """Saves atomically: a file appears whole or not at all, whatever is killed when.

    A step's checkpoint is saved when all that the step logs is logged. So it is never saved between a step and the
    validation that follows it, but after the validation or the next step, whichever lets an exact resume go on.

    Args:
        folder: where to save.
        every_n_steps: between two saves of ``last.ckpt``; it is saved at the end in any case.
        monitor: a metric such as "val/accuracy" whose best value saves ``best.ckpt``; None for none.
        mode: "max" or "min".

    Raises:
        TrainingError: a parameter is NaN or infinite (nothing is overwritten), the metric does not exist, or nothing
            can be written in the folder.
    """

    def __init__(self, folder: str, every_n_steps: int = 1000, monitor: str | None = None, mode: str = "max") -> None:
        if mode not in ("max", "min"):
            raise TrainingError(f"callbacks.checkpoints.mode={mode}: give max or min")
        if every_n_steps < 1:
            raise TrainingError(f"callbacks.checkpoints.every_n_steps={every_n_steps}: give 1 or more")
        self.folder, self.every_n_steps, self.monitor, self.mode = Path(folder), every_n_steps, monitor, mode
        self.best: float | None = None
        self._saved_at = 0
        self._saved: list[float] = []  # the fingerprint of what was saved last
        self._stops = False  # SIGTERM came during validation, or between the batches of one step
        self._of_full_precision = False  # what was measured last, before a delayed start

    def setup(self, trainer: Trainer, task: Task, stage: str) -> None:
        """Refuse at once a folder that no checkpoint can be saved in."""
        if not trainer.fast_dev_run:
            require_writable(self.folder, "callbacks.checkpoints.folder")

    def on_train_start(self, trainer: Trainer, task: Task) -> None:
        """Count from the step that a resumed run is at."""
        agree_on_sigterm(trainer)
        self._saved_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, task: Task, outputs: Any, batch: Any, batch_index: int) -> None:
        """Save when due, unless validation or the epoch's end comes first; and where max_steps cuts an epoch.

        There validation changes nothing that is saved, and at the end of training Lightning calls the epoch complete.
        Between the batches of one step nothing is saved, and SIGTERM waits: no checkpoint holds gradients.
        """
        if batch_index + 1 >= trainer.num_training_batches:
            return
        if not ends_step(trainer, batch_index):
            self._wait(trainer)
            return
        every = trainer.val_check_batch
        validates = bool(every) and every != float("inf") and (batch_index + 1) % every == 0
        if trainer.global_step == trainer.max_steps and trainer.global_step != self._saved_at:
            self._save(trainer, task, LAST)
        elif not validates:
            self._save_if_due(trainer, task)

    def on_validation_batch_end(self, trainer: Trainer, task: Task, *args: Any, **kwargs: Any) -> None:
        """Let validation end where SIGTERM comes: Lightning would stop here, with all since the last save lost."""
        if not trainer.sanity_checking:
            self._wait(trainer)

    def on_validation_end(self, trainer: Trainer, task: Task) -> None:
        """Remember of which network the metrics are, which stay until the next validation; in mid-epoch, save the best.

        By the epoch's end the network is another one.
        """
        self._of_full_precision = fake_quant_waits(task)
        if not (trainer.sanity_checking or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch):
            self._save_if_best(trainer, task)

    def on_train_batch_start(self, trainer: Trainer, task: Task, batch: Any, batch_index: int) -> None:
        """Stop after the next step, which is saved."""
        self._stop(trainer)

    def _wait(self, trainer: Trainer) -> None:
        if trainer.received_sigterm:
            self._stops, trainer._signal_connector.received_sigterm = True, False

    def _stop(self, trainer: Trainer) -> None:
        if self._stops:
            self._stops, trainer._signal_connector.received_sigterm = False, True

    def on_train_epoch_end(self, trainer: Trainer, task: Task) -> None:
        """Save the best, and the last when due.

        Raises:
            TrainingError: the monitor is not logged.
        """
        self._stop(trainer)
        self._save_if_best(trainer, task)
        if self.monitor not in (None, *trainer.callback_metrics) and trainer.callback_metrics:
            known = ", ".join(trainer.callback_metrics)
            raise TrainingError(f"callbacks.checkpoints.monitor={self.monitor} is not logged: choose from {known}")
        self._save_if_due(trainer, task)

    def on_train_end(self, trainer: Trainer, task: Task) -> None:
        """Save the last step, if it is not saved yet, or not as it is now, such as with averaged weights."""
        if trainer.global_step != self._saved_at or has_changed(trainer.strategy, task.model, self._saved):
            self._save(trainer, task, LAST)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the best value so far."""
        self.best = state["best"]

    def _save_if_best(self, trainer: Trainer, task: Task) -> None:
        """Save the network that was measured last, where none was better."""
        if self.monitor not in trainer.callback_metrics or self._of_full_precision or fake_quant_waits(task):
            return
        value = float(trainer.callback_metrics[self.monitor])
        if self.best is None or (value > self.best if self.mode == "max" else value < self.best):
            self.best = value
            self._save(trainer, task, BEST)

    def _save_if_due(self, trainer: Trainer, task: Task) -> None:
        """Save after so many steps, or after this one where SIGTERM has come: Lightning stops there."""
        steps = trainer.global_step - self._saved_at
        if steps >= self.every_n_steps or (steps and trainer.received_sigterm):
            self._save(trainer, task, LAST)

    def _save(self, trainer: Trainer, task: Task, name: str) -> None:
        finite = all_finite([parameter.detach() for parameter in task.model.parameters()])
        if not trainer.strategy.reduce_boolean_decision(finite):
            raise diverged(trainer, "a parameter is NaN or infinite")
        if trainer.fast_dev_run:  # of which Lightning keeps nothing: a checkpoint would stand in the real run's way
            return
        save_checkpoint(trainer, self.folder / name)
        if name == LAST:
            self._saved_at, self._saved = trainer.global_step, fingerprint(task.model)


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Save beside the path, then rename: Lightning's own save may copy across file systems, which a kill can cut.

    Raises:
        TrainingError: the disk is full, or nothing can be written there; what stood there is unchanged.
    """
    new = path.with_name(f".{path.name}.tmp")
    try:
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            os.replace(new, path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        left = "; the last one is untouched, and resume=auto goes on from it" if path.exists() else ""
        raise TrainingError(f"no checkpoint can be written to {path}: {error.strerror or error}{left}") from error
    trainer.strategy.barrier("checkpoint renamed")
