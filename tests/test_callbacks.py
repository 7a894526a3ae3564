"""What happens around training steps, in one process: calibration, batch norm, checkpoints, logs."""

import csv
import itertools
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback
from ranks import answers
from small_training import W4A4, Recorder, data, task, trainer
from torch import nn

import qat
from qat import numerics
from qat.checkpoint import read_checkpoint
from qat.errors import CheckpointError, TrainingError
from qat.quantizers import LearnedStepSize, WeightLSQ
from qat.training.batch_norm import BatchNormEstimate
from qat.training.callbacks import (
    Calibration,
    FakeQuantStart,
    KeptWeights,
    Monitor,
    ScaleMonitor,
)
from qat.training.checkpointing import Checkpoints
from qat.training.csv_logger import ResumableCSVLogger
from qat.training.fingerprint import fingerprint
from qat.training.optimization import step_sizes


def test_calibration_does_not_change_what_training_sees():
    def inputs(*callbacks) -> list:
        recorder = Recorder()
        trainer(recorder, *callbacks).fit(task(), datamodule=data())
        return recorder.inputs

    torch.manual_seed(5)
    plain = inputs()
    recorder, quantized = Recorder(), task(W4A4)
    state = torch.get_rng_state()
    trainer(recorder, Calibration(3)).fit(quantized, datamodule=data())
    assert all(torch.equal(a, b) for a, b in zip(plain, recorder.inputs, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.is_initialised for module in quantized.model.modules() if isinstance(module, LearnedStepSize))


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_init_that_compares_with_an_unquantized_copy_starts_as_in_python(channels_last):
    """GPTAQ runs a copy of a network without blocks."""
    policy = W4A4 | {"init": "gptaq"}
    started = task(policy, channels_last=channels_last)
    trainer(Calibration(2), max_steps=0).fit(started, datamodule=data())
    batches = [inputs for inputs, _ in itertools.islice(data().train_loader("cpu"), 2)]
    expected = qat.calibrate(task(policy).model, batches, verbose=False)
    before = task().model.state_dict()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(started.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)
    changed = [name for name, weight in before.items() if not torch.equal(started.model.state_dict()[name], weight)]
    assert len(changed) == 5


def test_calibration_leaves_initialised_step_sizes_alone(capsys):
    quantized = task(W4A4)
    for module in quantized.model.modules():
        if isinstance(module, LearnedStepSize):
            module.set_step_size(torch.tensor(0.5).expand(module.step_size.shape))
    trainer(Calibration(2), max_steps=0).fit(quantized, datamodule=data())
    assert all((step_size == 0.5).all() for step_size in step_sizes(quantized.model))
    assert "calibrated" not in capsys.readouterr().out


def test_kept_weights_train_the_same_model():
    """Over two micro-batches a step: every weight rounded half as often, the same losses and parameters."""
    runs = []
    for callbacks in ([], [KeptWeights()]):
        recorder, quantized = Recorder(), task(W4A4)
        fit = trainer(Calibration(1), recorder, *callbacks, accumulate_grad_batches=2, max_steps=3)
        with mock.patch.object(numerics, "fake_quantized", side_effect=numerics.fake_quantized) as rounded:
            fit.fit(quantized, datamodule=data())
        shapes = [tuple(call.args[0].shape) for call in rounded.call_args_list]
        weights = {tuple(parameter.shape) for parameter in quantized.model.parameters() if parameter.dim() > 1}
        runs.append((recorder.losses, list(quantized.model.parameters()), sum(shape in weights for shape in shapes)))
    (losses, parameters, often), (kept_losses, kept_parameters, seldom) = runs
    assert losses == kept_losses
    assert all(torch.equal(one, other) for one, other in zip(parameters, kept_parameters, strict=True))
    assert 0 < seldom <= often / 2
    quantizers = [module for module in quantized.model.modules() if isinstance(module, WeightLSQ)]
    assert quantizers and all(quantizer.kept is None for quantizer in quantizers)


def test_batch_norm_statistics_are_those_of_the_final_weights(tmp_path):
    """The mean over the first batches, in closed form for the first layer's input to it, and in the checkpoint."""
    quantized = task(W4A4, mixup=0.2)
    every_step = Checkpoints(tmp_path, every_n_steps=1)  # the last step is saved before the estimate, too
    trainer(Calibration(1), BatchNormEstimate(3), every_step).fit(quantized, datamodule=data())
    model = quantized.model
    name, norm = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    seen = []
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = [batch[0] for batch, _ in zip(data().train_loader("cpu"), range(3), strict=False)]
    with torch.no_grad():
        for batch in images:
            model.train()(batch)
    handle.remove()
    mean = torch.stack([batch.double().mean((0, 2, 3)) for batch in seen[:3]]).mean(0)
    variance = torch.stack([batch.double().var((0, 2, 3)) for batch in seen[:3]]).mean(0)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(saved[f"model.{name}.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(saved[f"model.{name}.running_var"].double(), variance, rtol=1e-5, atol=1e-6)
    assert norm.momentum == 0.1 and quantized.measured != fingerprint(model)
    with pytest.raises(TrainingError, match="batches=0"):
        BatchNormEstimate(0)


def test_fake_quantization_starts_at_its_step_and_ends_on():
    recorder, quantized = Recorder(), task(W4A4)
    trainer(Calibration(1), FakeQuantStart(4), recorder).fit(quantized, datamodule=data())
    assert recorder.enabled == [{False}] * 4 + [{True}] * 2
    plain = Recorder()
    trainer(plain).fit(task(), datamodule=data())
    assert recorder.losses[:4] == plain.losses[:4] and recorder.losses[4] != plain.losses[4]


@pytest.mark.parametrize(("step", "comes"), [(5, True), (6, False)])
def test_a_delayed_start_that_never_comes_is_said_and_what_ships_is_measured(step, comes, capsys):
    quantized, epoch = task(W4A4), {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 6, "limit_val_batches": 1}
    trainer(Calibration(1), FakeQuantStart(step), **epoch).fit(quantized, datamodule=data())
    said = "warning     fake quantization never ran: training ended at step 6, and callbacks.fake_quant_start.step=6"
    assert (said not in capsys.readouterr().out) == comes
    assert (quantized.measured == fingerprint(quantized.model)) == comes


def test_delayed_start_is_followed_by_a_resumed_run(tmp_path):
    trainer(Calibration(1), FakeQuantStart(4), Checkpoints(tmp_path), max_steps=3).fit(task(W4A4), datamodule=data())
    recorder = Recorder()
    resumed = trainer(Calibration(1), FakeQuantStart(4), recorder)
    resumed.fit(task(W4A4), datamodule=data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert recorder.enabled == [{False}, {True}, {True}]


def test_diverging_run_stops_with_the_fix_and_keeps_its_checkpoint(tmp_path):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_index) -> None:
            if trainer.global_step == 3:
                batch[0].fill_(math.nan)

    checkpoints = Checkpoints(tmp_path, every_n_steps=1)
    with pytest.raises(TrainingError, match=r"at step 4: lower optim\.lr=0\.05, .*gradient_clip_val"):
        trainer(Poison(), Monitor(), checkpoints).fit(task(), datamodule=data())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_diverging_parameters_are_not_saved_between_log_steps(tmp_path):
    class Poison(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_index) -> None:
            if trainer.global_step == 3:
                task.model.classifier.bias.data.fill_(math.inf)

    checkpoints = Checkpoints(tmp_path, every_n_steps=1)
    with pytest.raises(TrainingError, match="a parameter is NaN or infinite at step 3"):
        trainer(Poison(), checkpoints, log_every_n_steps=50).fit(task(), datamodule=data())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_best_checkpoint_is_the_best(tmp_path):
    class Scripted(Callback):
        def on_validation_epoch_end(self, trainer, task) -> None:
            task.log("score", torch.tensor([0.5, 0.9, 0.7][trainer.current_epoch]))

    checkpoints = Checkpoints(tmp_path, monitor="score")
    fit = trainer(Scripted(), checkpoints, max_steps=-1, max_epochs=3, limit_train_batches=2)
    fit.fit(task(), datamodule=data())
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 1
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    with pytest.raises(TrainingError, match=r"monitor=scoer is not logged: choose from .*score"):
        fit = trainer(Scripted(), Checkpoints(tmp_path, monitor="scoer"), max_steps=-1, max_epochs=1)
        fit.fit(task(), datamodule=data())


@pytest.mark.parametrize("ends", [{"max_epochs": 2}, {"max_epochs": 1}])
def test_the_best_checkpoint_is_the_network_that_was_measured_in_mid_epoch(ends, tmp_path):
    """An epoch has five steps and is validated after two and four."""
    scores, measured = [0.3, 0.9, 0.95, 0.1], {}

    class Scripted(Callback):
        def on_validation_epoch_end(self, trainer, task) -> None:
            task.log("score", torch.tensor(scores[len(measured)]))
            measured[trainer.global_step] = {name: value.clone() for name, value in task.state_dict().items()}

    fit = trainer(
        Scripted(),
        Checkpoints(tmp_path, monitor="score"),
        **{
            "max_steps": -1,
            "limit_train_batches": 5,
            "limit_val_batches": 1,
            "val_check_interval": 2,
            "num_sanity_val_steps": 0,
            **ends,
        },
    )
    fit.fit(task(), datamodule=data())
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    best = max(measured, key=lambda step: scores[list(measured).index(step)])
    assert saved["global_step"] == best
    assert all(torch.equal(value, measured[best][name]) for name, value in saved["state_dict"].items())


@pytest.mark.parametrize("every", [1, 2])
def test_the_best_checkpoint_is_of_a_quantized_network(every, tmp_path):
    """Also at the end of an epoch without validation, when fake quantization runs and the metrics are from before."""

    class Scripted(Callback):
        def on_validation_epoch_end(self, trainer, task) -> None:
            task.log("score", torch.tensor([0.9, 0.5, 0.4][trainer.current_epoch // every]))

    callbacks = Calibration(1), FakeQuantStart(2 * every), Scripted(), Checkpoints(tmp_path, monitor="score")
    epochs = {"max_steps": -1, "max_epochs": 3 * every, "check_val_every_n_epoch": every}
    trainer(*callbacks, limit_train_batches=2, limit_val_batches=1, **epochs).fit(task(W4A4), datamodule=data())
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 2 * every - 1


def test_a_quantizer_of_ones_own_ships_from_python_alone(tmp_path):
    """With the names of ours in its state: built by the policy, the network had other integers in silence."""

    class Floor(WeightLSQ):
        def quantize(self, weight):
            return super().quantize(weight - 0.5 * self.step_size.view(-1, 1, 1, 1))

        def forward(self, weight):
            return self.quantize(weight).dequantize(weight.dtype) + (weight - weight.detach())

    class UseFloor(Callback):
        def setup(self, trainer, task, stage) -> None:
            task.model.features[1][0].weight_quantizer.__class__ = Floor

    network = task(W4A4)
    trainer(UseFloor(), Calibration(1), Checkpoints(tmp_path), max_steps=1).fit(network, datamodule=data())
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"quantizers of your own \(features\.1\.0\): in Python"):
        checkpoint.build()
    model = task(W4A4).model
    UseFloor().setup(None, SimpleNamespace(model=model), "fit")
    model.load_state_dict(checkpoint.state_dict)
    codes = qat.quantized_tensors(qat.freeze(model))["features.1.0"].codes
    assert torch.equal(codes, qat.quantized_tensors(network.model)["features.1.0"].codes)


def test_log_rewinds_to_the_checkpoint(tmp_path):
    def rows() -> list:
        with (tmp_path / "metrics.csv").open(newline="") as file:
            return list(csv.reader(file))

    logger = ResumableCSVLogger(tmp_path)
    logger.log_metrics({"epoch": 0, "loss": 1.5}, step=1)
    logger.log_metrics({"epoch": 0, "loss": 1.25}, step=3)
    before = rows()
    logger.log_metrics({"epoch": 0, "accuracy": 0.5}, step=4)
    assert rows()[0] == ["step", "epoch", "loss", "accuracy"]
    again = ResumableCSVLogger(tmp_path)
    again.rewind(4)
    assert rows() == before == [["step", "epoch", "loss"], ["1", "0", "1.5"], ["3", "0", "1.25"]]
    again.log_metrics({"epoch": 1, "loss": 1.0}, step=5)
    assert rows() == [*before, ["5", "1", "1.0"]]


def test_monitors_log_loss_rate_and_stored_scales(tmp_path):
    quantized, logger = task(W4A4), ResumableCSVLogger(tmp_path)
    trainer(Calibration(1), Monitor(), ScaleMonitor(), logger=logger).fit(quantized, datamodule=data())
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"1", "3", "5"}
    last = next(row for row in reversed(rows) if row["scale/classifier.weight/mean"])
    scale = quantized.model.classifier.weight_quantizer.scale().float()
    assert float(last["scale/classifier.weight/mean"]) == pytest.approx(scale.mean().item())
    assert float(last["scale/classifier.weight/max"]) == scale.max().item()
    assert float(last["scale/classifier.input/mean"]) == quantized.model.classifier.activation_quantizer.scale().item()
    assert all(float(row["train/loss"]) > 0 for row in rows if row["train/loss"])


def test_a_step_of_several_batches_is_logged_once_with_a_batchs_loss(tmp_path):
    """An epoch of 7 batches has steps after 3, 6 and 7 of them."""
    logger, seen = ResumableCSVLogger(tmp_path), Recorder()
    many = {"accumulate_grad_batches": 3, "limit_train_batches": 7, "log_every_n_steps": 1}
    trainer(Monitor(), seen, logger=logger, **many).fit(task(), datamodule=data())
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row["train/loss"]]
    assert [step for step, _ in rows] == [0, 1, 2, 3, 4, 5]
    losses = [seen.losses[7 * epoch + batch] * 3 for epoch in (0, 1) for batch in (2, 5, 6)]
    assert [loss for _, loss in rows] == pytest.approx(losses)
    assert rows[0][1] == pytest.approx(math.log(10), rel=0.2)  # of a network that has not learned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_fingerprint_tells_networks_apart_by_a_bit(dtype):
    """A norm in 16 bits would be the same for both."""
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).to(dtype)
    before = fingerprint(model)
    assert fingerprint(model) == before and len(before) == 6
    with torch.no_grad():
        weight = model[0].weight
        weight[3, 5] = torch.nextafter(weight[3, 5], weight.new_tensor(torch.inf))
    assert fingerprint(model) != before


def test_ranks_agree_on_whether_a_network_has_changed(tmp_path):
    """Measuring, and saving, is for all: a rank whose part of the weights is as before would leave the others alone."""
    script = """
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from qat.training.fingerprint import fingerprint, has_changed
os.environ["LOCAL_RANK"] = str(rank)
strategy = DDPStrategy("cpu", [torch.device("cpu")] * 2, LightningEnvironment())
model = torch.nn.Linear(4, 4)
before, answer = fingerprint(model), []
for changes in ((), (1,), (0, 1)):
    if rank in changes:
        model.weight.data += 1
    answer.append(has_changed(strategy, model, before))
"""
    assert answers(script, tmp_path) == [[False, True, True]] * 2
