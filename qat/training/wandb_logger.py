"""Weights & Biases, offline unless the user is logged in."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ..errors import TrainingError

HOST = "api.wandb.ai"


class OneRunLogger(WandbLogger):
    """Ends its run with the training: the next job of a sweep, in the same process, would log into it.

    A run that was open already is its owner's to end.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        import wandb

        self._found = wandb.run

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run; one of an error or an interruption is marked as failed."""
        super().finalize(status)
        if self._experiment is not None and self._experiment is not self._found:
            self._experiment.finish(exit_code=int(status != "success"))


def wandb_logger(project: str, name: str, save_dir: str) -> WandbLogger:
    """Return the logger.

    Raises:
        TrainingError: wandb is not installed.
    """
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    try:
        return OneRunLogger(project=project, name=name, save_dir=save_dir, offline=not is_logged_in())
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
