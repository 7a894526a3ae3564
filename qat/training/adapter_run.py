"""What a run with an adapter does apart: the adapter is made, on data where it starts from some, and shipped."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import nn

from ..adapters import CONFIG, save_adapter
from ..artifact import save
from ..atomic import atomic_folder
from ..checkpoint import TOKENIZER
from ..errors import TrainingError
from ..freezing import freeze
from ..layers import is_frozen, is_prepared
from ..lora import Start
from ..policy import QuantPolicy
from .data_modules import training_batches
from .instantiation import make
from .metrics import run


def make_adapter(config: DictConfig, model: nn.Module, policy: QuantPolicy, data: LightningDataModule) -> nn.Module:
    """Return the model with the adapter that ``config.adapter`` says, in training mode.

    Raises:
        TrainingError: it starts from data, and the calibration callback that says which is switched off.
        QATError: as the adapter raises it.
    """
    given = _calibration(config, data) if config.adapter.get("start") == Start.cloq else {}
    return make(config.adapter, model=model, policy=policy, **given).train()  # a base that it froze is in eval mode


def _calibration(config: DictConfig, data: LightningDataModule) -> dict[str, Any]:
    """Return what the calibration callback would read, and how to run it; the same on every rank.

    The model is still in the CPU's memory: where the run has a GPU, one block at a time is worked on there.
    """
    if not config.callbacks.get("calibration"):
        raise TrainingError(f"adapter.start={config.adapter.start} reads calibration data: keep callbacks.calibration")
    calibration = make(config.callbacks.calibration)
    options = calibration.options
    if options.device is None and torch.cuda.is_available() and config.trainer.get("accelerator") != "cpu":
        options = replace(options, device="cuda")
    data.prepare_data()
    data.setup("fit")
    batches = (inputs for inputs, _ in islice(training_batches(data, torch.device("cpu")), calibration.batches))
    return {"batches": batches, "forward": run, "options": options}


@rank_zero_only
def ship_adapter(run_dir: Path, model: nn.Module, metrics: dict[str, float]) -> None:
    """Write what an adapter run deploys: its artifact, or the adapter alone where its base lies in a folder already."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    print(f"run folder  {run_dir}")
    own = is_prepared(model)  # its codes, or their zero points, hold what trained
    if own:
        freeze(model)
    if is_frozen(model) and (own or getattr(base, "qat_source", None) is None):
        beside = run_dir / TOKENIZER
        save(model, run_dir / "artifact", beside if beside.is_dir() else None)
        print(f"artifact    {run_dir / 'artifact'}")
    else:
        with atomic_folder(run_dir / "adapter", lambda there: (there / CONFIG).is_file()) as folder:
            save_adapter(model, folder)
        print(f"adapter     {run_dir / 'adapter'}")
    print("metrics     " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
