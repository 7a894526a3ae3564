"""Metrics of a model on test data, without a trainer."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from ..errors import DataError
from ..float32 import in_float32
from ..modes import in_eval_mode
from .data_modules import test_batches
from .image_data import ImageData
from .instruction_data import InstructionData, require_apart
from .metrics import ClassificationMetrics, LanguageMetrics, check_targets, first_logits, logits_of, run

ONLY_LANGUAGE = "only language models are compared with a reference: leave it out"


def evaluate(
    model: nn.Module,
    data: LightningDataModule,
    device: torch.device | str = "cpu",
    reference: nn.Module | None = None,
) -> dict[str, float]:
    """Return accuracy and loss on images, or perplexity and loss on text.

    Convolutions of float32 are computed in float32, on a GPU too.

    Args:
        model: from inputs to logits; it is moved to the device, and its mode is restored.
        data: a data module of ours, whose test part is used, or of the user's own, set up, whose validation part is.
        device: where to run.
        reference: a language model to compare with, such as the one before quantization: adds ``kl`` and ``agreement``
            (see LanguageMetrics). Moved to the device, and left in eval mode.

    Raises:
        DataError: there are none, or they do not fit the model; a reference for images; or a model that does not keep
            packed examples apart.
    """
    if reference is not None and isinstance(data, ImageData):
        raise DataError(ONLY_LANGUAGE)
    metrics: ClassificationMetrics | LanguageMetrics | None = None
    model.to(device)
    if reference is not None:
        reference.to(device).eval()
    if isinstance(data, InstructionData) and data.pack:
        require_apart(model, device)
    with in_eval_mode(model), in_float32(), torch.inference_mode():
        for inputs, targets in test_batches(data, device):
            logits = first_logits(model, inputs) if metrics is None else logits_of(run(model, inputs))
            check_targets(logits, targets)
            if metrics is None:
                metrics = _metrics(logits, reference is not None).to(device)
            more = () if reference is None else (logits_of(run(reference, inputs)),)
            metrics.update(logits, targets, *more)
    if metrics is None:
        raise DataError(f"{type(data).__name__} has no batch to measure on")
    return {name: value.item() for name, value in metrics.compute().items()}


def _metrics(logits: Tensor, compared: bool) -> ClassificationMetrics | LanguageMetrics:
    """Return what measures logits (B, C), or those of a language model, (B, T, C)."""
    if logits.dim() > 2:
        return LanguageMetrics(compared)
    if compared:
        raise DataError(ONLY_LANGUAGE)
    return ClassificationMetrics()
