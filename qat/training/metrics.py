"""What a trained model is measured by: the same code in the training loop and in ``python -m qat.evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from ..errors import DataError, QATError, first_line
from ..inputs import Inputs, described, mapped
from ..layers import frozen_layers
from ..modes import call_without_cache
from ..quantizers.fixed_dtype import keeping_dtype

FLOATS = torch.float32, torch.bfloat16, torch.float16
IGNORED = -100  # a target that counts nowhere: of a prompt, or of padding


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Return a model's output for a batch's inputs: one tensor, several, or named ones: its forward's arguments.

    A transformers model runs without its key-value cache: in its presence transformers does not keep packed examples
    apart, and each block would be compiled anew, as it has a cache of its own. Images have the dtype of the model, as
    Lightning gives them to one in 16 bits while it trains: calibration, teachers and measuring take the data's own.
    """
    return call_without_cache(model, mapped(inputs, partial(_in_dtype_of, model)))


def _in_dtype_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return floats of up to 32 bits in the dtype of the model, its first parameter's; autocast casts them itself."""
    if not isinstance(inputs, Tensor) or inputs.dtype not in FLOATS or torch.is_autocast_enabled(inputs.device.type):
        return inputs
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    dtype = next(dtypes, None) or next((layer.like.dtype for _, layer in frozen_layers(model)), None)
    return inputs.to(dtype) if dtype in FLOATS else inputs


def logits_of(output: Any) -> Tensor:
    """Return a model's logits: its output, or the field ``logits`` of a transformers output.

    Raises:
        DataError: neither is a tensor.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise DataError(
            f"the model gives a {type(logits).__name__}: let it give its logits, a tensor, or an output with the field "
            "logits; in training, too"
        )
    return logits


def first_logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return a model's logits for the first batch of some data.

    Raises:
        DataError: the model cannot run on such inputs.
    """
    try:
        return logits_of(run(model, inputs))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, QATError | torch.OutOfMemoryError):
            raise
        what = f"shape {described(inputs)}" if isinstance(inputs, Tensor) else described(inputs)
        if isinstance(error, IndexError) and isinstance(inputs, Tensor) and inputs.numel():  # a token past the last
            what += f" with numbers up to {inputs.max():g}"
        raise DataError(
            f"the model cannot run on these data, {what}: {first_line(error)} (HYDRA_FULL_ERROR=1 shows "
            "where); the model and the data have to fit each other"
        ) from error


def pair(batch: Any) -> tuple[Any, Tensor]:
    """Return a batch's inputs and targets.

    Raises:
        DataError: it is not these two.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"{len(batch)} parts" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
        raise DataError(f"a batch of the data is {what}: give (inputs, targets)")
    return tuple(batch)


def check_targets(logits: Tensor, targets: Any) -> None:
    """Compare targets (...) with logits (..., C), with one transfer from the device.

    Raises:
        DataError: targets that are no class numbers, or not one for each row of logits; one that the model has no
            output for.
    """
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.uint8):
        what = targets.dtype if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
        raise DataError(f"the data's targets are {what}: give class numbers, a tensor of int64")
    if targets.shape != logits.shape[:-1]:
        raise DataError(
            f"the data's targets have the shape {list(targets.shape)} and the model's logits {list(logits.shape)}: "
            f"give one class number for each, of shape {list(logits.shape[:-1])}"
        )
    classes, outputs = targets.long(), logits.shape[-1]
    lowest, highest = torch.stack(torch.where(classes == IGNORED, 0, classes).aminmax()).tolist()
    if lowest < 0:
        raise DataError(f"the data have a target {lowest}: classes are whole numbers from 0, or {IGNORED} for none")
    if highest >= outputs:
        raise DataError(
            f"the data have a target {highest}, and the model has outputs for 0 to {outputs - 1}: it needs more "
            "classes, as with model.args.num_classes, or a larger vocabulary"
        )


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean over all predictions that count, for logits (..., C) and targets (...), in float32."""
    flat = logits.flatten(0, -2).float()
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing)


class Mean(Metric):
    """A mean over batches and ranks in which NaN stays NaN: torchmetrics' MeanMetric drops it, or else the weights.

    It sums in float32 whatever its model is cast to: in bf16, as Lightning's bf16-true makes of the task, a sum of
    256 batches no longer grows.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(keeping_dtype(fn), exclude_state)

    def update(self, total: Tensor, count: int | Tensor) -> None:
        """Add the sum over so many values."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.count


class ClassificationMetrics(nn.Module):
    """``accuracy`` (top-1) and ``loss`` (cross-entropy without smoothing)."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.accuracy = Mean(), Mean()

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch of logits (B, C) and classes (B,)."""
        self.loss.update(cross_entropy(logits, targets) * targets.numel(), targets.numel())
        self.accuracy.update((logits.argmax(-1) == targets).sum(), targets.numel())

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics over all batches and ranks, and start again."""
        return _compute_and_reset(accuracy=self.accuracy, loss=self.loss)


class LanguageMetrics(nn.Module):
    """``perplexity`` (of a token) and ``loss`` (its logarithm).

    Args:
        compared: also ``kl``, the mean divergence KL(reference || model) of a prediction in nats, and ``agreement``,
            the share of predictions whose most likely token is the reference's. Both tell models apart that perplexity,
            which only looks at the probability of one token, does not.
    """

    def __init__(self, compared: bool = False) -> None:
        super().__init__()
        names = ("loss", "kl", "agreement") if compared else ("loss",)
        self.means = nn.ModuleDict({name: Mean() for name in names})

    def update(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> None:
        """Add a batch of logits (B, T, vocabulary) and next tokens (B, T), with the reference's logits if compared.

        IGNORED tokens do not count.
        """
        counted = targets != IGNORED
        count = counted.sum()
        self.means["loss"].update(torch.where(count > 0, cross_entropy(logits, targets) * count, 0.0), count)
        if reference is not None:
            logits, reference = logits[counted], reference[counted]
            self.means["kl"].update(divergence(reference, logits), count)
            self.means["agreement"].update((logits.argmax(-1) == reference.argmax(-1)).sum(), count)

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics over all batches and ranks, and start again."""
        values = _compute_and_reset(**self.means)
        return {"perplexity": values["loss"].exp(), **values}


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Return KL(reference || model) in nats, summed over predictions, for logits (..., C); 1024 at a time."""
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for taught, found in zip(reference.flatten(0, -2).split(1024), logits.flatten(0, -2).split(1024), strict=True):
        log_p, log_q = taught.float().log_softmax(-1), found.float().log_softmax(-1)
        total += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total


def _compute_and_reset(**metrics: Mean) -> dict[str, Tensor]:
    values = {name: metric.compute() for name, metric in metrics.items()}
    for metric in metrics.values():
        metric.reset()
    return values
