"""What happens around training steps: calibration, logging, a delayed start of fake quantization."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ..accumulation import weight_quantizers
from ..calibration import activation_quantizers, calibrate, weights_wait
from ..errors import TrainingError, first_line
from ..inputs import mapped, random_input
from ..layers import is_prepared, quant_layers
from ..memory import estimate
from ..numerics import stored_scale
from ..ptq import Options
from ..quantizers import LearnedStepSize, Quantizer
from ..reach import check
from .chunked_loss import chunked_loss
from .csv_logger import ResumableCSVLogger
from .data_modules import training_batches
from .metrics import cross_entropy, logits_of, run
from .task import Task


class Calibration(Callback):
    """Sets activation step sizes, and weights whose init reads data, from the first training batches.

    It reads a loader of its own before the first step, so that training sees the batches it would have seen anyway.

    Args:
        batches: how many; several are better than one, and GPTQ and its like want more rows than a layer has inputs.
        options: of an init that reads data, the fields of ``qat.ptq.Options``.
    """

    def __init__(self, batches: int = 8, options: dict[str, Any] | None = None) -> None:
        if batches < 1:
            raise TrainingError(f"callbacks.calibration.batches={batches}: give 1 or more")
        self.batches, self.options = batches, Options(**(options or {}))

    def on_fit_start(self, trainer: Trainer, task: Task) -> None:
        """Calibrate, unless a checkpoint brought every step size."""
        waiting = [quantizer for quantizer in activation_quantizers(task.model) if not quantizer.is_initialised]
        if not waiting and not weights_wait(task.model):
            return
        loader = training_batches(trainer.datamodule, task.device, trainer.global_rank, trainer.world_size)
        batches = (inputs for inputs, _ in islice(loader, self.batches))
        with trainer.strategy.precision_plugin.forward_context():
            calibrate(task.model, batches, task.logits, self.options, rank_zero_only.rank == 0)
        if waiting:
            rank_zero_only(print)(f"calibrated {len(waiting)} activation step sizes on {self.batches} batches")


class Reach(Callback):
    """Says before the first step which layers are not reached, and whose weights miss their fake quantization.

    It runs one random example, as ``qat.check`` has it.
    """

    def on_fit_start(self, trainer: Trainer, task: Task) -> None:
        """Check a prepared model."""
        if task.example is None or not is_prepared(task.model):
            return
        example = mapped(random_input(task.example, batch=1), lambda x: x.to(task.device))
        try:
            with trainer.strategy.precision_plugin.forward_context():
                lines = check(task.model, example, run)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
        ) as error:  # not for such a batch
            lines = [f"not checked which layers a batch reaches: {first_line(error)}"]
        for line in lines:
            rank_zero_only(print)(f"warning     {line}")


class MemoryEstimate(Callback):
    """Prints what a training step will take, before the first one."""

    def on_fit_start(self, trainer: Trainer, task: Task) -> None:
        """Estimate it from the first batch."""
        loader = training_batches(trainer.datamodule, task.device, trainer.global_rank, trainer.world_size)
        batch = next(iter(loader))
        forward = trainer.strategy.precision_plugin.forward_context

        def loss(model: torch.nn.Module, batch: Any) -> Tensor:
            with forward():
                if getattr(task, "loss_rows", None) is not None:
                    return chunked_loss(model, *batch, task.loss_rows)
                return cross_entropy(logits_of(run(model, batch[0])), batch[1])

        try:
            blocks = task.compilation.blocks(task.model)
            memory = str(estimate(task.model, task.optimizer, batch, loss, blocks))
        except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:  # an operator that needs data
            memory = f"not estimated: {first_line(error)}"
        rank_zero_only(print)(f"memory      {memory}")


class FakeQuantStart(Callback):
    """Trains in full precision until a step; step sizes start to learn there. Derived from the global step alone.

    What is measured before that is of the network in full precision, and chooses no best checkpoint.

    Args:
        step: the first optimizer step that runs fake-quantized.
    """

    def __init__(self, step: int) -> None:
        if step < 0:
            raise TrainingError(f"callbacks.fake_quant_start.step={step}: give 0 or more")
        self.step = step

    def on_train_start(self, trainer: Trainer, task: Task) -> None:
        """Follow the step that a resumed run is at."""
        self._follow(trainer, task)

    def on_train_batch_start(self, trainer: Trainer, task: Task, batch: Any, batch_index: int) -> None:
        """Switch fake quantization on when its step has come."""
        if trainer.global_step == self.step:
            self._follow(trainer, task)

    def on_train_end(self, trainer: Trainer, task: Task) -> None:
        """Leave a model that is quantized; say so where it never trained as one."""
        if fake_quant_waits(task):
            rank_zero_only(print)(
                f"warning     fake quantization never ran: training ended at step {trainer.global_step}, and "
                f"callbacks.fake_quant_start.step={self.step}; let it start earlier, or train on with resume=auto"
            )
            task.measured = []  # what ships is measured, not what was validated
        set_fake_quant(task, True)

    def _follow(self, trainer: Trainer, task: Task) -> None:
        set_fake_quant(task, trainer.global_step >= self.step)


def set_fake_quant(task: Task, enabled: bool) -> None:
    """Switch every quantizer of a task's network on or off."""
    for module in task.model.modules():
        if isinstance(module, Quantizer):
            module.enabled = enabled


def fake_quant_waits(task: Task) -> bool:
    """Return whether a task's network runs in full precision for now, before a delayed start."""
    return any(isinstance(module, Quantizer) and not module.enabled for module in task.model.modules())


class KeptWeights(Callback):
    """Rounds each weight once for all micro-batches of an optimizer step: ``qat.kept_weights``, with its memory."""

    def on_train_start(self, trainer: Trainer, task: Task) -> None:
        """Start to keep."""
        for quantizer in weight_quantizers(task.model):
            quantizer.kept = {}

    def on_before_optimizer_step(self, trainer: Trainer, task: Task, optimizer: torch.optim.Optimizer) -> None:
        """Drop what the step is about to change."""
        self.on_train_start(trainer, task)

    def on_train_end(self, trainer: Trainer, task: Task) -> None:
        """Keep no longer."""
        for quantizer in weight_quantizers(task.model):
            quantizer.kept = None


class Monitor(Callback):
    """At Lightning's log steps, and only there: checks the loss, and logs it with the learning rate.

    It logs before checkpoints are saved, so that a checkpoint's step is in the log that a resumed run goes on with.

    Raises:
        TrainingError: the loss is NaN or infinite.
    """

    def on_train_start(self, trainer: Trainer, task: Task) -> None:
        """Drop what a killed run logged after the checkpoint that is resumed from."""
        for logger in trainer.loggers:
            if isinstance(logger, ResumableCSVLogger):
                logger.rewind(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, task: Task, outputs: Any, batch: Any, batch_index: int) -> None:
        """Log, at a log step."""
        if not is_log_step(trainer, batch_index):
            return
        loss = outputs["loss"].item() * trainer.accumulate_grad_batches  # Lightning has divided it by these
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        if not math.isfinite(loss):
            raise diverged(trainer, f"the loss is {loss}")
        log(trainer, {"train/loss": loss, "lr": lr})


class ScaleMonitor(Callback):
    """Logs each quantizer's stored scale at log steps: its mean, minimum and maximum.

    Args:
        every_n_logs: log at every n-th log step.
    """

    def __init__(self, every_n_logs: int = 1) -> None:
        if every_n_logs < 1:
            raise TrainingError(f"callbacks.scales.every_n_logs={every_n_logs}: give 1 or more")
        self.every_n_logs = every_n_logs

    def on_train_batch_end(self, trainer: Trainer, task: Task, outputs: Any, batch: Any, batch_index: int) -> None:
        """Log, with one transfer from the device for all scales."""
        if (
            is_log_step(trainer, batch_index)
            and (trainer.global_step // trainer.log_every_n_steps) % self.every_n_logs == 0
        ):
            values = scale_statistics(task)
            if values:
                log(trainer, values)


def scale_statistics(task: Task) -> dict[str, float]:
    """Return {"scale/LAYER.weight/mean": ...} for every quantizer; only "mean" for a single scale."""
    names, values = [], []
    for name, layer in quant_layers(task.model):
        for part, quantizer in (("weight", layer.weight_quantizer), ("input", layer.activation_quantizer)):
            if not isinstance(quantizer, LearnedStepSize):
                continue
            scale = stored_scale(quantizer.step_size, quantizer.spec).float()
            statistics = {"mean": scale.mean()}
            if scale.numel() > 1:
                statistics |= {"min": scale.min(), "max": scale.max()}
            names += [f"scale/{name}.{part}/{what}" for what in statistics]
            values += statistics.values()
    return dict(zip(names, torch.stack(values).tolist(), strict=True)) if values else {}


def is_log_step(trainer: Trainer, batch_index: int) -> bool:
    """Return whether a batch has just ended a step at which Lightning logs."""
    every = trainer.log_every_n_steps
    return every > 0 and trainer.global_step % every == 0 and ends_step(trainer, batch_index)


def ends_step(trainer: Trainer, batch_index: int) -> bool:
    """Return whether an optimizer step follows a training batch: with accumulated gradients, not each has one."""
    batches = batch_index + 1
    return batches % trainer.accumulate_grad_batches == 0 or batches >= trainer.num_training_batches


def log(trainer: Trainer, values: dict[str, float]) -> None:
    """Log to every logger, at the index of the step that has just been taken."""
    for logger in trainer.loggers:
        logger.log_metrics({"epoch": trainer.current_epoch, **values}, step=trainer.global_step - 1)


def diverged(trainer: Trainer, what: str) -> TrainingError:
    """Return the error for a run that went to NaN or infinity."""
    lr = trainer.optimizers[0].defaults["lr"]
    return TrainingError(
        f"{what} at step {trainer.global_step}: lower optim.lr={lr:g}, raise task.warmup or set "
        "trainer.gradient_clip_val=1.0; checkpoints from before that are untouched"
    )


def all_finite(tensors: list[Tensor]) -> bool:
    """Return whether no tensor (of a sharded one: its part here) holds NaN or infinity, with one transfer."""
    tensors = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    tensors = [tensor for tensor in tensors if tensor.numel()]  # an empty one has no norm
    if not tensors:
        return True
    norms = torch._foreach_norm(tensors, float("inf"))
    return bool(torch.stack([norm.float() for norm in norms]).isfinite().all())
