"""Measure an artifact or a checkpoint: ``python -m qat.evaluate PATH data=NAME [key=value ...]``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from .errors import QATError
from .training.command_line import explain, fail

CONFIG = "evaluate"


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m qat.evaluate", description=__doc__)
    parser.add_argument("path", help="an artifact folder, or a checkpoint of python -m qat.train")
    parser.add_argument(
        "overrides", nargs="+", metavar="data=NAME", help="as for python -m qat.train: data=..., data.KEY=..."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics there, too")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    options = parser.parse_intermixed_args(argv)
    try:
        with initialize_config_module("qat.conf", version_base="1.3"):
            config = compose(CONFIG, overrides=options.overrides)
        metrics = evaluate_path(options.path, config, options.device)
    except (QATError, HydraException, OmegaConfBaseException) as error:
        fail(explain(error, CONFIG, options.overrides))
    for name, value in metrics.items():
        print(f"{name} {value:.4f}")
    if options.json is not None:
        options.json.write_text(json.dumps(metrics) + "\n")


def evaluate_path(path: str, config: DictConfig, device: str | None = None) -> dict[str, float]:
    """Return the metrics of an artifact folder or a checkpoint on the data that the config names.

    Raises:
        QATError: it cannot be read, or the data cannot.
    """
    import torch

    from . import load
    from .checkpoint import read_checkpoint
    from .training.evaluation import evaluate
    from .training.run import make

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(path) if Path(path).is_dir() else read_checkpoint(path).build()
    return evaluate(model, make(config.data), device)


if __name__ == "__main__":
    main()
