"""Measure a quantized model or a checkpoint: ``python -m qat.evaluate PATH data=NAME [key=value ...]``.

Of a language model also tasks of EleutherAI's harness, where it is installed: ``... PATH --tasks arc_easy,hellaswag``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from .broken_pipe import ends_quietly
from .errors import QATError
from .training.command_line import TRACEBACK_WANTED, as_it_stands, explain, fail, own_configs, parse

if TYPE_CHECKING:
    from torch import nn

CONFIG = "evaluate"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat.evaluate", description=__doc__)
    parser.add_argument("path", help="a quantized model in any format, a checkpoint, or a folder of transformers")
    parser.add_argument(
        "overrides", nargs="*", metavar="data=NAME", help="as for python -m qat.train: data=..., data.KEY=..."
    )
    parser.add_argument("--reference", metavar="PATH", help="a full-precision model to compare a language model with")
    parser.add_argument("--adapter", metavar="DIR", help="put it on the model; default: what lies beside an artifact")
    parser.add_argument("--no-adapter", action="store_true", help="measure the base alone")
    parser.add_argument("--tasks", metavar="NAME,NAME", help="of EleutherAI's harness (pip install 'lm-eval[hf]')")
    parser.add_argument("--task-folder", type=Path, metavar="DIR", help="with tasks of your own for it")
    parser.add_argument("--limit", type=int, metavar="N", help="examples of each task; default: all")
    parser.add_argument("--tokenizer", metavar="DIR", help="for the tasks; default: what lies in PATH")
    parser.add_argument("--model", help="package.module:function that builds an untrained model of your own")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="with data/ files of your own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics there, too")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    return parser


@ends_quietly()
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = _parser()
    options = parse(parser, sys.argv[1:] if argv is None else argv, CONFIG)
    options.overrides = [as_it_stands(word) for word in options.overrides]
    if not options.overrides and not options.tasks:
        parser.error("say what to measure on: data=NAME, or --tasks NAME")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        fail(f"--json {options.json}: there is no folder {options.json.absolute().parent}")
    if options.config_dir is not None and not options.config_dir.is_dir():
        fail(f"--config-dir {options.config_dir}: there is no such folder")
    try:
        metrics = _measure(options)
    except (QATError, PermissionError, HydraException, OmegaConfBaseException) as error:
        if TRACEBACK_WANTED:
            raise
        fail(explain(error, CONFIG, [*own_configs(options.config_dir), *options.overrides]))
    for name, value in metrics.items():
        print(f"{name} {value:.4f}" if abs(value) >= 0.01 else f"{name} {value:.3g}")  # a small divergence is no zero
    if options.json is not None:
        try:
            options.json.write_text(json.dumps(metrics) + "\n")
        except OSError as error:
            fail(f"--json {options.json} cannot be written: {error.strerror}")


def _measure(options: argparse.Namespace) -> dict[str, float]:
    config = None
    if options.overrides:
        with initialize_config_module("qat.conf", version_base="1.3"):
            config = compose(CONFIG, overrides=[*own_configs(options.config_dir), *options.overrides])
    adapter = Path(options.adapter) if options.adapter else None
    if adapter is None and not options.no_adapter:
        adapter = adapter_beside(options.path)
    if adapter is not None:
        print(f"with the adapter {adapter}; --no-adapter leaves it out")
    tasks = None
    if options.tasks:
        tokenizer = options.tokenizer or options.path
        tasks = Tasks(options.tasks.split(","), tokenizer, options.task_folder, options.limit)
    return evaluate_path(options.path, config, options.device, options.reference, adapter, options.model, tasks)


class Tasks(NamedTuple):
    """What ``harness.task_metrics`` is asked for."""

    names: list[str]
    tokenizer: str
    folder: Path | None = None
    limit: int | None = None


def evaluate_path(
    path: str,
    config: DictConfig | None,
    device: str | None = None,
    reference: str | None = None,
    adapter: Path | None = None,
    own_model: str | None = None,
    tasks: Tasks | None = None,
) -> dict[str, float]:
    """Return the metrics of a quantized model, a checkpoint or a model of transformers on the config's data.

    Args:
        path: what to measure.
        config: with a key ``data``; None measures the tasks alone.
        device: None takes a GPU where there is one.
        reference: a model of the same kinds to compare a language model with.
        adapter: a folder of peft's to put on the model.
        own_model: package.module:function that builds an untrained model of the user's own.
        tasks: of the harness.

    Raises:
        QATError: it cannot be read, or the data cannot.
    """
    import torch

    from .training.data_modules import open_module
    from .training.evaluation import evaluate
    from .training.instantiation import make

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise QATError(f"--device {device}: {str(error).splitlines()[0]}") from error
    compared = None if reference is None else read_model(reference)
    model = read_model(path, own_model)
    if adapter is not None:
        from .adapters import load_adapter

        model = load_adapter(model, adapter)
    metrics = {} if config is None else evaluate(model, open_module(make(config.data)), device, compared)
    if tasks is not None:
        from .training.harness import task_metrics

        metrics |= task_metrics(model, tasks.tokenizer, tasks.names, device, tasks.folder, tasks.limit)
    return metrics


def adapter_beside(path: str) -> Path | None:
    """Return the folder of the adapter that an artifact ships with, if it has one."""
    from . import adapters

    folder = Path(path) / adapters.FOLDER
    return folder if (folder / adapters.CONFIG).is_file() else None


def read_model(path: str, own_model: str | None = None) -> nn.Module:
    """Return the model of a checkpoint, of a quantized model in any format, or of a folder of transformers.

    Args:
        path: of one of these.
        own_model: package.module:function that builds an untrained model; None where they name theirs.

    Raises:
        QATError: it cannot be read.
    """
    from .checkpoint import read_checkpoint
    from .convert import build_model, is_checkpoint
    from .formats import format_of, read
    from .frozen_model import to_model

    folder = Path(path)
    if is_checkpoint(folder):
        return read_checkpoint(path).build(build_model(own_model))
    if format_of(folder) is not None or not (folder / "config.json").is_file():
        return to_model(read(folder), build_model(own_model))
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


if __name__ == "__main__":
    main()
