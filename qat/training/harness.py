"""Tasks of EleutherAI's lm-evaluation-harness, where it is installed, on any language model that can be read here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import DataError, did_you_mean, first_line
from ..modes import in_eval_mode


def task_metrics(
    model: nn.Module,
    tokenizer: str | Path,
    tasks: list[str],
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    limit: int | None = None,
) -> dict[str, float]:
    """Return what the harness measures, by "task/metric"; standard errors are left out.

    Args:
        model: a causal language model of transformers, frozen or not; it is moved to the device.
        tokenizer: a folder that transformers reads one from.
        tasks: names, or groups or tags of several.
        device: where to run.
        folder: tasks of your own, as YAML files.
        limit: examples of each task; None for all.

    Raises:
        DataError: the harness is not installed, an unknown task, data that cannot be had, or another kind of model.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DataError(f"--tasks needs EleutherAI's harness ({error}): pip install 'lm-eval[hf]'") from None
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise DataError(f"--tasks are for language models of transformers, and this is a {type(model).__name__}")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for task in tasks:
        if not manager.match_tasks([task]):
            raise DataError(f"--tasks {task}: the harness has no such task{did_you_mean(task, manager.all_tasks):.300}")
    with in_eval_mode(model), torch.inference_mode():
        client = HFLM(pretrained=model.to(device), tokenizer=_tokenizer(tokenizer), batch_size=8)
        try:
            found = simple_evaluate(client, tasks=tasks, limit=limit, task_manager=manager, log_samples=False)
        except Exception as error:  # of any kind: a task brings code and data of its own
            raise DataError(f"--tasks {','.join(tasks)}: {first_line(error):.300}") from error
    return _numbers(found["results"])


def _tokenizer(folder: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no tokenizer ({first_line(error):.200}): give --tokenizer") from None


def _numbers(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return {"task/metric": value} of results keyed "metric,filter"; a filter's name follows if it has one."""
    numbers = {}
    for task, row in results.items():
        for key, value in row.items():
            metric, _, name = key.partition(",")
            if isinstance(value, int | float) and name and not metric.endswith("_stderr"):
                numbers[f"{task}/{metric}" + ("" if name == "none" else f"/{name}")] = float(value)
    return numbers
