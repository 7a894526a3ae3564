"""Metrics of a model on test data, without a trainer."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import DataError
from .image_data import ImageData
from .instruction_data import InstructionData, require_apart
from .metrics import ClassificationMetrics, LanguageMetrics, check_targets, first_logits, logits_of, run
from .text_data import TextData

Data = ImageData | TextData | InstructionData
METRICS = {ImageData: ClassificationMetrics, TextData: LanguageMetrics, InstructionData: LanguageMetrics}


def evaluate(
    model: nn.Module,
    data: Data,
    device: torch.device | str = "cpu",
    reference: nn.Module | None = None,
) -> dict[str, float]:
    """Return accuracy and loss on images, or perplexity and loss on text.

    Args:
        model: from inputs to logits; it is moved to the device, and its mode is restored.
        data: a data module of ours; its test part is used.
        device: where to run.
        reference: a language model to compare with, such as the one before quantization: adds ``kl`` and ``agreement``
            (see LanguageMetrics). Moved to the device, and left in eval mode.

    Raises:
        DataError: another kind of data, or data that do not fit the model; a reference for images; or a model that
            does not keep packed examples apart.
    """
    if type(data) not in METRICS:
        raise DataError(f"cannot evaluate on {type(data).__name__}: give ImageData, TextData or InstructionData")
    if reference is not None and METRICS[type(data)] is not LanguageMetrics:
        raise DataError("only language models are compared with a reference: leave it out")
    metrics = (METRICS[type(data)]() if reference is None else LanguageMetrics(compared=True)).to(device)
    training = model.training
    model.to(device).eval()
    if reference is not None:
        reference.to(device).eval()
    if isinstance(data, InstructionData) and data.pack:
        require_apart(model, device)
    with torch.inference_mode():
        for index, (inputs, targets) in enumerate(data.test_loader(device)):
            logits = logits_of(run(model, inputs)) if index else first_logits(model, inputs)
            if not index:
                check_targets(logits, targets)
            more = () if reference is None else (logits_of(run(reference, inputs)),)
            metrics.update(logits, targets, *more)
    model.train(training)
    return {name: value.item() for name, value in metrics.compute().items()}
