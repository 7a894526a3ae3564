"""Metrics of a model on test data, without a trainer."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import DataError
from .image_data import ImageData
from .instruction_data import InstructionData
from .metrics import ClassificationMetrics, LanguageMetrics, logits_of, run
from .text_data import TextData

Data = ImageData | TextData | InstructionData
METRICS = {ImageData: ClassificationMetrics, TextData: LanguageMetrics, InstructionData: LanguageMetrics}


def evaluate(model: nn.Module, data: Data, device: torch.device | str = "cpu") -> dict[str, float]:
    """Return accuracy and loss on images, or perplexity and loss on text.

    Args:
        model: from inputs to logits; it is moved to the device, and its mode is restored.
        data: a data module of ours; its test part is used.
        device: where to run.

    Raises:
        DataError: another kind of data.
    """
    if type(data) not in METRICS:
        raise DataError(f"cannot evaluate on {type(data).__name__}: give ImageData, TextData or InstructionData")
    metrics = METRICS[type(data)]().to(device)
    training = model.training
    model.to(device).eval()
    with torch.inference_mode():
        for inputs, targets in data.test_loader(device):
            metrics.update(logits_of(run(model, inputs)), targets)
    model.train(training)
    return {name: value.item() for name, value in metrics.compute().items()}
