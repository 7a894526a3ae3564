"""Task: a network with its loss and its optimizer, in full precision or quantized; ``tasks`` holds the two kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..checkpoint import describe, own_quantizers
from ..errors import DataError, TrainingError
from ..inputs import Inputs
from ..models import architecture_of
from ..numerics import MIN_SCALE
from ..policy import QuantPolicy
from ..sharding import reshard
from ..spec import as_member
from ..surgery import prepare
from ..unsaved_buffers import dtypes_kept
from .compilation import Compilation
from .data_modules import example_of
from .fingerprint import fingerprint
from .in_memory_data import InMemoryData
from .loader import Loader
from .losses import mean_prediction
from .metrics import ClassificationMetrics, LanguageMetrics, check_targets, first_logits, logits_of, pair, run
from .optimization import Schedule, learning_rate_factor, parameter_groups, step_sizes, total_steps
from .own_loader import OwnLoader
from .random_state import random_state, set_random_state
from .resuming import (
    options_of,
    other_model,
    require_same_optimizer,
    require_same_policy,
    require_training_state,
    take_options,
    take_order,
)


class Task(LightningModule):
    """A network, its loss and its optimizer. Batches are (inputs, targets).

    Args:
        model: the network, not yet prepared; kept as ``self.model``.
        policy: what is quantized; one that quantizes nothing trains in full precision.
        optimizer: from parameter groups to an optimizer, such as a partial of ``torch.optim.SGD``.
        schedule, warmup: see ``learning_rate_factor``.
        step_size_lr_scale: the learning rate of step sizes, as a multiple of the optimizer's.
        label_smoothing: of the cross-entropy.
        teacher: a trained full-precision network to learn from, or several, whose probabilities are averaged.
        teacher_share: the weight of the teacher's predictions in the loss; the labels have the rest. A half is that of
            the LSQ paper's section on knowledge distillation (arXiv:1902.08153).
        temperature: by which the logits of network and teacher are divided (arXiv:1503.02531, section 2); the LSQ
            paper's is 1.
        example: shape, dtype and range of an input, which checkpoints record.
        compile_mode: see ``Compilation``; None runs eagerly.
        adapter: the network is an adapter on its base, quantized already: checkpoints hold what trains, and no more.

    Raises:
        QATError: a policy that does not fit the model.
        TrainingError: a number out of range, or an unknown compile mode.
    """

    metrics: ClassificationMetrics | LanguageMetrics

    def __init__(
        self,
        model: nn.Module,
        policy: QuantPolicy,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        schedule: str = "cosine",
        warmup: float = 0.0,
        step_size_lr_scale: float = 1.0,
        label_smoothing: float = 0.0,
        teacher: nn.Module | Sequence[nn.Module] | None = None,
        teacher_share: float = 0.5,
        temperature: float = 1.0,
        example: dict[str, Any] | None = None,
        compile_mode: str | None = None,
        adapter: bool = False,
    ) -> None:
        super().__init__()
        self.architecture, self.example = architecture_of(model), example
        self.policy, self.optimizer = policy, optimizer
        self.schedule, self.warmup = as_member(Schedule, "task.schedule", schedule), warmup
        self.step_size_lr_scale, self.label_smoothing = step_size_lr_scale, label_smoothing
        for key, share in (("warmup", warmup), ("label_smoothing", label_smoothing), ("teacher_share", teacher_share)):
            if not 0 <= share <= 1:
                raise TrainingError(f"task.{key}={share}: give a share from 0 to 1")
        if not step_size_lr_scale >= 0:
            raise TrainingError(f"task.step_size_lr_scale={step_size_lr_scale}: give a number that is not negative")
        if not temperature > 0:
            raise TrainingError(f"task.temperature={temperature}: give a positive number")
        self.compilation = Compilation(compile_mode)
        self.temperature, self.teacher_share = temperature, teacher_share
        self.mixup = 0.0
        self.model = model
        self.adapter = adapter
        self.strict_loading = not adapter  # a checkpoint of an adapter run leaves the base out
        if not policy.quantizes_nothing() and not adapter:
            prepare(model, policy, verbose=rank_zero_only.rank == 0)
        self._step_sizes: list[nn.Parameter] = []
        teachers = [teacher] if isinstance(teacher, nn.Module) else teacher or []
        self._teachers = tuple(teachers)  # in a tuple, so that they are no part of the state that is saved and trained
        self._rng_state: dict[str, Any] | None = None
        self._position: list[dict[str, Any]] = []
        self._within = False  # an epoch: that position
        self._asked: list[dict[str, Any]] = []  # options of the optimizer
        self._stored: list[dict[str, Any]] | None = None  # those of the checkpoint to resume
        self.measured: list[float] = []  # the fingerprint of the network that the logged metrics are of
        self._ran = self._targets_fit = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        with dtypes_kept(self):  # bf16-true casts all of the task
            return super()._apply(fn, recurse)

    def forward(self, inputs: Inputs) -> Tensor:
        """Return the network's logits."""
        return self.logits(self.model, inputs)

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Return the logits of the network, or of a copy of it, such as an unquantized one that calibration makes.

        Raises:
            DataError: it cannot run on the data, found at the first batch, or at one that is too small for batch norm.
        """
        try:
            logits = logits_of(run(model, inputs)) if self._ran else first_logits(model, inputs)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):  # torch's batch norm
                raise
            raise DataError(
                "a training batch of one example is too small for batch norm, which takes the spread over a batch: set "
                "data.batch_size=2 or more, and drop_last=True in a loader of your own whose last batch has one"
            ) from error
        self._ran = True
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of a batch."""
        inputs, targets = pair(batch)
        share = torch.distributions.Beta(self.mixup, self.mixup).sample().item() if self.mixup else 1.0
        if share < 1:  # a shuffled batch in reverse order is a random partner for each example
            inputs = torch.lerp(inputs.flip(0), inputs, share)
        self.compilation.begin_step()
        logits = self(inputs)
        if not self._targets_fit:
            check_targets(logits, targets)
            self._targets_fit = True
        taught = None
        if self._teachers:
            with torch.no_grad():
                taught = mean_prediction([logits_of(run(teacher, inputs)) for teacher in self._teachers])
        how = share, self.label_smoothing, self.temperature, self.teacher_share
        try:
            return self.compilation.loss(logits, targets, taught, *how)
        except IndexError:  # of a CPU; to look at each batch would wait for a GPU
            check_targets(logits, targets)
            raise

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Add a batch to the metrics."""
        inputs, targets = pair(batch)
        logits = self(inputs)
        check_targets(logits, targets)
        self.metrics.update(logits, targets)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, which are the same on every rank."""
        self.log_dict({f"val/{name}": value for name, value in self.metrics.compute().items()}, sync_dist=True)
        if not self.trainer.sanity_checking:
            self.measured = fingerprint(self.model)

    def setup(self, stage: str) -> None:
        """Take an example from the user's own data, which does not say what its inputs are."""
        data = self.trainer.datamodule
        if self.example is None and data is not None:
            self.example = example_of(data)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer, and the schedule that follows its steps.

        Raises:
            TrainingError: a learning rate below zero, or options that the optimizer refuses.
        """
        lr = getattr(self.optimizer, "keywords", {}).get("lr")
        if not isinstance(lr, int | float) or not lr >= 0:
            raise TrainingError(f"optim.lr={lr!r}: give a number that is not negative")
        groups = parameter_groups(self.model, lr, self.step_size_lr_scale)
        self._step_sizes = step_sizes(self.model)  # now that configure_model may have sharded them
        try:
            optimizer = self.optimizer(groups)
        except (TypeError, ValueError) as error:
            raise TrainingError(f"optim: {error}") from error
        factor = learning_rate_factor(self.schedule, self.warmup, total_steps(self.trainer))
        scheduler = LambdaLR(optimizer, factor)
        self._asked = options_of(optimizer.param_groups)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and keep the step sizes positive: ``LearnedStepSize.project`` for all of them in one launch."""
        super().optimizer_step(*args, **kwargs)
        if self._step_sizes:
            with torch.no_grad():
                torch._foreach_clamp_min_(self._step_sizes, MIN_SCALE)

    def on_fit_start(self) -> None:
        """Put the teachers where the network is; let go of sharded weights that callbacks' forwards have gathered.

        Raises:
            CheckpointError: the checkpoint to resume is of another optimizer.
        """
        if self._stored is not None:
            require_same_optimizer(self._stored, self._asked)
        reshard(self.model)
        for teacher in self._teachers:
            teacher.to(self.device).eval()

    def on_train_start(self) -> None:
        """Compile, now that calibration is over, and go on with the random state and the position of a killed run."""
        compiled = self.compilation.start((self.model, *self._teachers))
        if compiled is not None:
            self.print(f"compiling   {compiled}")
        if self._rng_state is not None:
            set_random_state(self._rng_state)
            if "cuda" in self._rng_state and self.device.type == "cuda":
                torch.cuda.set_rng_state(self._rng_state["cuda"].cpu(), self.device)
            self._rng_state = None
        if self._stored is not None:
            schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            schedule = next((one for one in schedules if isinstance(one, LambdaLR)), None)
            for line in take_options(self.trainer.optimizers[0], schedule, self._asked):
                self.print(f"changed     optim: {line}")
            self._stored = None
        loader = self.trainer.train_dataloader
        if isinstance(loader, OwnLoader) and self._position:
            loader.load_state_dict(self._position[0])
            self._compare(loader)
            self._position = []

    def on_validation_start(self) -> None:
        """Validate eagerly where blocks are compiled."""
        self.compilation.pause()

    def on_validation_end(self) -> None:
        """Go on with the compiled blocks."""
        self.compilation.go_on()

    def on_train_end(self) -> None:
        """Leave the blocks as they were."""
        self.compilation.stop()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what ``qat.checkpoint`` reads, and the random state."""
        checkpoint["qat"] = describe(self.architecture, self.policy, self.example)
        checkpoint["qat"]["own_quantizers"] = own_quantizers(self.model)
        if self.adapter:
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            checkpoint["qat"]["adapter"] = True
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["rng"] = random_state()
        if self.device.type == "cuda":
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Take a state.

        Raises:
            CheckpointError: it is that of another network.
        """
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            raise other_model(error) from error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random state, and the position in the user's own data, until training starts.

        Raises:
            CheckpointError: the checkpoint has another policy or order of examples, or no state of training.
        """
        require_training_state(checkpoint)
        require_same_policy(checkpoint["qat"]["policy"], self.policy)
        self.print(f"resumed     at step {checkpoint['global_step']}")
        self._rng_state = checkpoint["rng"]
        self._stored = [
            options for state in checkpoint["optimizer_states"] for options in options_of(state["param_groups"])
        ]
        self._position = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        self._within = bool(self._position) and self._position[0].get("epoch") == checkpoint["epoch"]
        data = self.trainer.datamodule
        if isinstance(data, InMemoryData):
            self._compare(data.train_dataloader())

    def _compare(self, loader: Loader | OwnLoader) -> None:
        """Say what is not as it was when the checkpoint to resume was saved."""
        for position in self._position[:1]:
            for line in take_order(position.get("order", {}), loader.order(), self._within):
                self.print(f"changed     {line}")
