"""What the tests of training share: a small task, its data, a quiet trainer, and a record of what each step saw."""

import functools

import torch
from lightning.pytorch import Callback, Trainer

import qat
from qat.models import build
from qat.quantizers import LearnedStepSize
from qat.training.checkpointing import Checkpoints
from qat.training.image_data import ImageData
from qat.training.tasks import ImageClassification

W4A4 = {"weight": {"bits": 4}, "activation": {"bits": 4, "granularity": "tensor"}}
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)


def data() -> ImageData:
    return ImageData("digits", [0.3], [0.4], batch_size=100)


def task(policy: dict | None = None, **options) -> ImageClassification:
    torch.manual_seed(0)
    model = build({"builder": "cnn", "args": {"width": 2}})
    return ImageClassification(model, qat.QuantPolicy.from_dict(policy or {}), **{"optimizer": SGD, **options})


def trainer(*callbacks: Callback, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    defaults = {
        "max_steps": 6,
        "log_every_n_steps": 2,
        "enable_checkpointing": any(isinstance(c, Checkpoints) for c in callbacks),
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **defaults, **options})


class Recorder(Callback):
    """Keeps what each step saw."""

    def __init__(self) -> None:
        self.inputs, self.losses, self.enabled = [], [], []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_index) -> None:
        self.inputs.append(batch[0])
        self.losses.append(outputs["loss"].item())
        quantizers = [module for module in task.model.modules() if isinstance(module, LearnedStepSize)]
        self.enabled.append({quantizer.enabled for quantizer in quantizers})
