"""One training run: from a config to a checkpoint."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..checkpoint import TOKENIZER, damage_of, load_state, read_checkpoint
from ..errors import CheckpointError, TrainingError, did_you_mean
from ..formats import format_of, read
from ..layers import is_prepared
from ..models import build
from ..policy import QuantPolicy
from ..quantized_model import QuantizedModel
from ..starting import fill, take_codes
from ..table import stored_size
from .adapter_run import make_adapter, ship_adapter
from .checkpointing import LAST, save_checkpoint
from .data_modules import check_module
from .evaluation import evaluate
from .fingerprint import has_changed
from .gradient_checkpointing import checkpoint_gradients
from .in_memory_data import InMemoryData
from .instantiation import check_least, check_types, make
from .own_loader import keep_position
from .progress import own_model, print_result
from .result import remove_result, write_result
from .run_lock import hold
from .task import Task
from .tokenizer import keep_tokenizer

QUANTIZERS = (".weight_quantizer.", ".activation_quantizer.")
LEAST = {  # of Lightning's numbers: below it fails late, or does something else in silence
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
}
PRECISIONS = ("highest", "high", "medium")


def train(config: DictConfig) -> dict[str, float]:
    """Run what the config says, and print where the result is.

    Returns:
        The metrics of the final weights.

    Raises:
        QATError: see the parts.
    """
    _check(config)
    run_dir = _run_dir(config)
    lock = hold(run_dir) if rank_zero_only.rank == 0 else None
    saves = config.callbacks.get("checkpoints")
    checkpoint = (Path(saves.folder).absolute() if saves else run_dir) / LAST
    resume = _resume_from(config.resume, checkpoint)
    policy = QuantPolicy.from_dict(OmegaConf.to_container(config.policy, resolve=True, enum_to_str=True))
    seed_everything(config.seed, verbose=False)
    torch.set_float32_matmul_precision(config.matmul_precision)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _quiet()
    data = make(config.data)
    check_module(data)
    if isinstance(data, InMemoryData):
        data.train_loader("cpu")  # says what is missing before the model is read
    keep_position(data)
    model = _model(config.model)
    codes = None if config.init_from is None or resume is not None else _start(model, config.init_from)
    if codes is not None and config.adapter:
        raise TrainingError(f"init_from={config.init_from}: an adapter opens a quantized base with model=hf_frozen")
    if config.gradient_checkpointing:
        checkpoint_gradients(model, config.gradient_checkpointing)
    if config.adapter:
        model = make_adapter(config, model, policy, data)
    task = _task(config, model, policy, data)
    if codes is not None and is_prepared(model):
        print(take_codes(model, codes))
    tokenizer = getattr(data, "tokenizer", None)
    if tokenizer is not None:
        rank_zero_only(keep_tokenizer)(tokenizer, model, run_dir / TOKENIZER)
    trainer = _trainer(config, task, run_dir)
    _fit(trainer, task, data, resume, checkpoint)
    if trainer.global_step == 0 and not trainer.fast_dev_run:  # calibrated only: no step has saved it
        save_checkpoint(trainer, checkpoint)
    metrics = _final_metrics(trainer, task, data)
    overrides, size = HydraConfig.get().overrides.task, None if config.adapter else stored_size(task.model)
    if not trainer.fast_dev_run:
        rank_zero_only(write_result)(run_dir, overrides, metrics, size)
    if config.adapter:
        ship_adapter(run_dir, model, metrics)
    else:
        own = own_model(config.model, task.model)
        print_result(run_dir, checkpoint, metrics, quantized=not policy.quantizes_nothing(), own_model=own)
    if lock is not None:
        lock.close()
    return metrics


def _task(config: DictConfig, model: nn.Module, policy: QuantPolicy, data: Any) -> Task:
    return make(
        config.task,
        model=model,
        policy=policy,
        optimizer=instantiate(config.optim),
        teacher=_teachers(config.teacher, config.model),
        example=data.example() if isinstance(data, InMemoryData) else None,
        compile_mode=config.compile_mode if config.compile else None,
        adapter=bool(config.adapter),
    )


def _trainer(config: DictConfig, task: Task, run_dir: Path) -> Trainer:
    callbacks = [make(callback) for callback in config.callbacks.values() if callback]
    if config.trainer.get("enable_progress_bar") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    logger = make(config.logger) if config.logger else False
    parts: dict[str, Any] = {"logger": logger, "callbacks": [*callbacks, _GoesOn(run_dir)]}
    if not any(isinstance(callback, Checkpoint) for callback in callbacks):
        parts["enable_checkpointing"] = False  # Lightning would add a callback of its own
    trainer = make(config.trainer, **parts)
    ours = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    for each in trainer.loggers:
        each.log_hyperparams(OmegaConf.to_container(ours, resolve=True, enum_to_str=True))
    if isinstance(trainer.strategy, ModelParallelStrategy):
        _check_sharded(trainer.strategy, task)
    return trainer


def _fit(trainer: Trainer, task: Task, data: Any, resume: Path | None, checkpoint: Path) -> None:
    """Train; where the run is stopped, say how to go on and exit."""
    try:
        trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
    except RuntimeError as error:
        if "gloo/transport" in str(error):  # its traceback would hide what the rank that failed has said
            reason = str(error).partition("] ")[2].partition(". ")[0]
            print(f"error: another rank is gone, see what it said: {reason}", file=sys.stderr)
            sys.exit(1)
        if not str(error).startswith("Early stopping conditioned on metric"):
            raise
        raise TrainingError(f"callbacks: {error}") from error
    except SIGTERMException:
        task.print(f"stopped by SIGTERM at step {trainer.global_step}: add resume=auto to go on")
        sys.exit(128 + signal.SIGTERM)
    except SystemExit:  # Lightning's own at Ctrl-C, of which it says nothing
        on = "add resume=auto to go on from the last checkpoint" if checkpoint.exists() else "nothing was saved yet"
        task.print(f"interrupted at step {trainer.global_step}: {on}; SIGTERM saves first")
        raise


def _check(config: DictConfig) -> None:
    """Refuse at once what would fail late, or without a word that helps."""
    if not 0 <= config.seed < 2**32:
        raise TrainingError(f"seed={config.seed}: give a whole number from 0 to {2**32 - 1}")
    if config.threads is not None and config.threads < 1:
        raise TrainingError(f"threads={config.threads}: give 1 or more, or null to leave it to PyTorch")
    if config.matmul_precision not in PRECISIONS:
        known = did_you_mean(config.matmul_precision, PRECISIONS)
        raise TrainingError(f"matmul_precision={config.matmul_precision!r} is unknown{known}")
    check_types(config.optim)
    check_types(config.trainer)
    check_least(config.trainer, LEAST)
    accelerator = config.trainer.get("accelerator")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise TrainingError(
            f"trainer.accelerator={accelerator}: PyTorch sees no GPU here (python -m qat.doctor shows what it sees); "
            "trainer.accelerator=auto takes what there is"
        )


def _check_sharded(strategy: ModelParallelStrategy, task: Task) -> None:
    if not is_overridden("configure_model", task):
        raise TrainingError(
            "trainer.strategy: FSDP2 is for a training loop of your own, with qat.shard_step_sizes; here several ranks "
            "train with trainer.strategy=ddp"
        )
    if strategy._save_distributed_checkpoint:
        raise TrainingError(
            "trainer.strategy: its checkpoints would be folders, which resume=auto and qat.convert do not read; give "
            "it save_distributed_checkpoint: false"
        )


def _start(model: nn.Module, path: str) -> QuantizedModel | None:
    """Fill a model from ``init_from``; return the quantized model whose codes it is to take, if it is one."""
    if format_of(Path(path)) is None:
        return load_weights(model, path)
    source = read(Path(path))
    fill(model, source)
    return source


def load_weights(model: nn.Module, path: str) -> None:
    """Fill a model that is not prepared yet from a full-precision or quantized checkpoint of the same architecture.

    Raises:
        CheckpointError: it cannot be read, or does not fit; the message names what differs.
    """
    state = read_checkpoint(path).state_dict
    weights = {name: value for name, value in state.items() if not any(part in f".{name}" for part in QUANTIZERS)}
    load_state(model, weights, f"init_from={path}")


def _quiet() -> None:
    """Keep what Lightning says of itself out of the output; its warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="The number of training batches")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def _run_dir(config: DictConfig) -> Path:
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:  # each job of a sweep has its own folder, and is told apart by its name
        config.run_dir = hydra.runtime.output_dir
        config.name = f"{config.name}/{Path(config.run_dir).name}"
    return Path(config.run_dir).absolute()


def _resume_from(resume: str | None, last: Path) -> Path | None:
    if resume is None:
        if last.exists():
            raise TrainingError(
                f"{last.parent} holds a checkpoint already: add resume=auto to go on with that run, or name=OTHER"
            )
        return None
    own = resume == "auto"
    if own and not last.exists():
        return None
    path = last if own else Path(resume)
    if not path.is_file():
        raise CheckpointError(f"resume={resume}: there is no checkpoint at that path; resume=auto finds the run's own")
    if damage := damage_of(path):
        other = "resume=PATH takes another, name=OTHER starts anew" if own else "resume=auto finds the run's own"
        raise CheckpointError(f"resume={path if own else resume} is damaged, or no checkpoint; {other} ({damage})")
    return path


def _model(node: DictConfig) -> nn.Module:
    if "_target_" in node:
        model = make(node)
        if not isinstance(model, nn.Module):
            what = type(model).__name__
            raise TrainingError(f"model._target_={node._target_} gives a {what}: name what gives a torch.nn.Module")
        return model.train()  # from_pretrained gives a model in eval mode, and Lightning leaves it there
    return build(OmegaConf.to_container(node, resolve=True))


def _teachers(paths: str | ListConfig | None, model: DictConfig) -> list[nn.Module]:
    listed = list(paths) if isinstance(paths, ListConfig) else [] if paths is None else [paths]
    if not all(isinstance(path, str) for path in listed):
        raise TrainingError(f"teacher={paths}: give a checkpoint's path, or a list of paths")
    return [_teacher(path, model) for path in listed]


def _teacher(path: str, model: DictConfig) -> nn.Module:
    """Read a teacher; where its checkpoint names no architecture, it is a network like the one that trains."""
    checkpoint = read_checkpoint(path)
    if not checkpoint.policy.quantizes_nothing():
        raise CheckpointError(f"teacher={path} is quantized: give a full-precision checkpoint")
    return checkpoint.build(None if checkpoint.architecture else _model(model)).requires_grad_(False)


class _GoesOn(Callback):
    """Drops the result of a run when it begins to train: nothing refuses it any more."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, task: Task) -> None:
        """Drop it, unless nothing of this run is kept."""
        if not trainer.fast_dev_run:
            remove_result(self.run_dir)


def _final_metrics(trainer: Trainer, task: Task, data: Any) -> dict[str, float]:
    if has_changed(trainer.strategy, task.model, task.measured):
        return evaluate(task.model, data, trainer.strategy.root_device)
    return {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()}
