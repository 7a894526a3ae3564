"""Weights & Biases, offline unless the user is logged in."""

from __future__ import annotations

import netrc
import os
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger

from ..errors import TrainingError

HOST = "api.wandb.ai"


def wandb_logger(project: str, name: str, save_dir: str) -> WandbLogger:
    """Return the logger.

    Raises:
        TrainingError: wandb is not installed.
    """
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    try:
        return WandbLogger(project=project, name=name, save_dir=save_dir, offline=not is_logged_in())
    except ModuleNotFoundError:
        raise TrainingError("logger=wandb needs wandb: pip install 'qat-lsq[wandb]', or use logger=csv") from None


def is_logged_in() -> bool:
    """Return whether there is an API key in the environment or in the netrc file that ``wandb login`` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
