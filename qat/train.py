"""Train a model, in full precision or quantized: ``python -m qat.train experiment=NAME key=value ...``."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from .training.command_line import run_command, run_job
from .training.config import CONFIG_PATH, register

register()


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="train")
def _job(config: DictConfig) -> None:
    run_job("qat.training.run", "train", config)


def main() -> None:
    """Run the command line."""
    run_command(_job, config_name="train")


if __name__ == "__main__":
    main()
