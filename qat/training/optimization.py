"""Parameter groups and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from ..errors import TrainingError
from ..quantizers import ActivationPACT, LearnedStepSize
from .in_memory_data import InMemoryData


class Schedule(StrEnum):
    """How the learning rate goes on after the warm-up."""

    cosine = "cosine"
    constant = "constant"


def step_sizes(model: nn.Module) -> list[nn.Parameter]:
    """Return a model's step sizes, each once."""
    return [module.step_size for module in model.modules() if isinstance(module, LearnedStepSize)]


def parameter_groups(model: nn.Module, lr: float, step_size_lr_scale: float) -> list[dict[str, Any]]:
    """Return the groups that an optimizer takes; every trainable parameter is in exactly one.

    Weights (two axes or more) take the optimizer's own weight decay. Biases and norms have none, nor have step sizes,
    whose learning rate is ``lr * step_size_lr_scale``; PACT's, which are its clipping bounds, have both.
    """
    quantizers = [module for module in model.modules() if isinstance(module, LearnedStepSize)]
    bounds = {id(q.step_size) for q in quantizers if isinstance(q, ActivationPACT)}
    scales = {id(parameter) for quantizer in quantizers for parameter in quantizer.parameters()} - bounds
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = [parameter for parameter in trained if id(parameter) not in scales | bounds]
    groups = [
        {"name": "weights", "params": [p for p in plain if p.dim() > 1]},
        {"name": "biases", "params": [p for p in plain if p.dim() <= 1], "weight_decay": 0.0},
        {
            "name": "step_sizes",
            "params": [p for p in trained if id(p) in scales],
            "weight_decay": 0.0,
            "lr": lr * step_size_lr_scale,
        },
        {"name": "clipping_bounds", "params": [p for p in trained if id(p) in bounds], "lr": lr * step_size_lr_scale},
    ]
    return [group for group in groups if group["params"]]


def total_steps(trainer: Trainer) -> float:
    """Return the optimizer steps of the whole run; infinity where nothing ends it.

    Lightning's own estimate would set up our data loader before a checkpoint's position in it is read.

    Raises:
        TrainingError: validation would come after more batches than an epoch has.
    """
    if not isinstance(trainer.datamodule, InMemoryData):
        steps = trainer.estimated_stepping_batches
        return math.inf if steps == -1 else steps  # -1: an endless loader
    batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    every = trainer.val_check_interval
    if trainer.check_val_every_n_epoch is not None and isinstance(every, int) and batches and not 0 < every <= batches:
        raise TrainingError(
            f"trainer.val_check_interval={every}: an epoch has {batches} batches; give 1 to {batches}, a share such as "
            "0.5, or trainer.check_val_every_n_epoch=null to count across epochs"
        )
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = math.ceil(batches / trainer.accumulate_grad_batches) * epochs
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def learning_rate_factor(schedule: Schedule, warmup: float, steps: float) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the step.

    Args:
        schedule: "cosine" ends at zero, "constant" stays.
        warmup: the share of all steps in which the factor rises linearly to 1.
        steps: of the whole run.

    Raises:
        TrainingError: a cosine over an endless run.
    """
    if math.isinf(steps) and (schedule is Schedule.cosine or warmup):
        raise TrainingError(
            "a schedule needs an end: set trainer.max_epochs or trainer.max_steps, or schedule=constant"
        )
    warmup_steps = round(warmup * steps) if warmup else 0

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule is Schedule.constant:
            return 1.0
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
