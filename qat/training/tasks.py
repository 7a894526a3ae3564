"""What is trained: image classification and causal language modelling, in full precision or quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, TrainingError
from ..float32 import in_float32
from ..inputs import Inputs
from .chunked_loss import check_head, chunked_loss
from .instruction_data import InstructionData, require_apart
from .metrics import ClassificationMetrics, LanguageMetrics, pair
from .task import Task


class ImageClassification(Task):
    """Images (B, C, H, W) to classes (B,).

    Args:
        channels_last: run convolutions in that memory format, which GPUs prefer.
        mixup: train on mixtures of two images, with shares from Beta(mixup, mixup) (arXiv:1710.09412); 0 for none.
    """

    def __init__(self, *args: Any, channels_last: bool = False, mixup: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if mixup < 0:
            raise TrainingError(f"task.mixup={mixup}: give 0 for none, or a positive number such as 0.2")
        self.mixup = mixup
        self.metrics = ClassificationMetrics()
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.model.to(memory_format=self.memory_format)

    def setup(self, stage: str) -> None:
        """Refuse to mix what is no image.

        Raises:
            DataError: task.mixup, and inputs by name or of whole numbers.
        """
        super().setup(stage)
        if self.mixup and self.trainer.datamodule is not None and (self.example or {}).get("dtype") != "float32":
            raise DataError(
                f"task.mixup={self.mixup} adds up shares of two images, each a tensor of floats; the inputs of these "
                "data are whole numbers or have names: set task.mixup=0"
            )

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Return the logits of the network or a copy of it."""
        if isinstance(inputs, Tensor):
            inputs = inputs.to(memory_format=self.memory_format)
        return super().logits(model, inputs)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Add a batch to the metrics, measured as an artifact is: outside autocast, and not in TF32.

        Either moves values across the thresholds of quantizers, and so the accuracy of 2 bits by half a point.
        """
        with torch.autocast(self.device.type, enabled=False), in_float32():
            super().validation_step(batch, batch_index)


class CausalLanguageModel(Task):
    """Tokens (B, T) to the tokens that follow them (B, T).

    Args:
        loss_rows: make the logits of so many predictions at a time, and never all of them; None makes all at once.
    """

    def __init__(self, *args: Any, loss_rows: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics = LanguageMetrics()
        if loss_rows is not None and loss_rows < 1:
            raise TrainingError(f"task.loss_rows={loss_rows}: give a positive number, such as 1024, or null")
        if loss_rows is not None and (self.label_smoothing or self._teachers):
            raise TrainingError("task.loss_rows goes with neither a teacher nor task.label_smoothing: leave it at null")
        self.loss_rows, self._head_checked = loss_rows, False

    def on_fit_start(self) -> None:
        """Refuse packed rows for an architecture that does not keep their examples apart."""
        super().on_fit_start()
        data = self.trainer.datamodule
        if isinstance(data, InstructionData) and data.pack:
            with self.trainer.precision_plugin.forward_context():
                require_apart(self.model, self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of a batch."""
        if self.loss_rows is None:
            return super().training_step(batch, batch_index)
        inputs, targets = pair(batch)
        if not self._head_checked:
            check_head(self.model, inputs)
            self._head_checked = True
        return chunked_loss(self.model, inputs, targets, self.loss_rows)
