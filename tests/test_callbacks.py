"""Tasks, parameter groups, schedules and callbacks, in one process."""

import csv
import functools
import itertools
import math
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

import qat
from qat import numerics
from qat.errors import TrainingError
from qat.models import build
from qat.numerics import MIN_SCALE
from qat.ptq.units import repeated
from qat.quantizers import LearnedStepSize, WeightLSQ
from qat.training.batch_norm import BatchNormEstimate
from qat.training.callbacks import Calibration, FakeQuantStart, KeptWeights, Monitor, ScaleMonitor
from qat.training.checkpointing import Checkpoints
from qat.training.csv_logger import ResumableCSVLogger
from qat.training.image_data import ImageData
from qat.training.losses import soft_cross_entropy
from qat.training.optimization import Schedule, learning_rate_factor, parameter_groups, step_sizes
from qat.training.tasks import CausalLanguageModel, ImageClassification
from qat.training.text_data import TextData

W4A4 = {"weight": {"bits": 4}, "activation": {"bits": 4, "granularity": "tensor"}}
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)


def data() -> ImageData:
    return ImageData("digits", [0.3], [0.4], batch_size=100)


def task(policy: dict | None = None, **options) -> ImageClassification:
    torch.manual_seed(0)
    model = build({"builder": "cnn", "args": {"width": 2}})
    return ImageClassification(model, qat.QuantPolicy.from_dict(policy or {}), **{"optimizer": SGD, **options})


def trainer(*callbacks: Callback, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    defaults = {
        "max_steps": 6,
        "log_every_n_steps": 2,
        "enable_checkpointing": any(isinstance(c, Checkpoints) for c in callbacks),
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **defaults, **options})


class Recorder(Callback):
    """Keeps what each step saw."""

    def __init__(self) -> None:
        self.inputs, self.losses, self.enabled = [], [], []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_index) -> None:
        self.inputs.append(batch[0])
        self.losses.append(outputs["loss"].item())
        quantizers = [module for module in task.model.modules() if isinstance(module, LearnedStepSize)]
        self.enabled.append({quantizer.enabled for quantizer in quantizers})


@pytest.mark.parametrize("builder", ["cnn", "gpt"])
def test_groups_hold_every_parameter_once_and_decay_weights_only(builder):
    model = build(
        {"builder": builder, "args": {"tie_embeddings": True, "width": 32, "depth": 1} if builder == "gpt" else {}}
    )
    qat.prepare(model, qat.QuantPolicy.from_dict(W4A4), verbose=False)
    groups = {group["name"]: group for group in parameter_groups(model, lr=0.1, step_size_lr_scale=0.5)}
    held = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    assert {id(p) for p in groups["step_sizes"]["params"]} == {id(p) for p in step_sizes(model)}
    optimizer = SGD(list(groups.values()))
    decay = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert decay == {"weights": 1e-3, "biases": 0.0, "step_sizes": 0.0}
    assert rates == {"weights": 0.05, "biases": 0.05, "step_sizes": 0.05}
    assert all(parameter.dim() <= 1 for parameter in groups["biases"]["params"])


def test_frozen_parameters_are_left_out():
    model = build({"builder": "cnn"})
    model.features.requires_grad_(False)
    held = [p for group in parameter_groups(model, 0.1, 1.0) for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.classifier.parameters()}


def test_schedule():
    cosine = learning_rate_factor(Schedule.cosine, 0.1, 100)
    assert [cosine(step) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert cosine(55) == pytest.approx(0.5) and cosine(100) == pytest.approx(0) and cosine(120) == pytest.approx(0)
    assert learning_rate_factor(Schedule.constant, 0.0, math.inf)(12345) == 1.0
    with pytest.raises(TrainingError, match=r"trainer\.max_epochs"):
        learning_rate_factor(Schedule.cosine, 0.0, math.inf)


def test_schedule_reaches_zero_at_the_end_of_the_run():
    fit = trainer(max_steps=-1, max_epochs=2, limit_train_batches=5, accumulate_grad_batches=2)
    fit.fit(task(), datamodule=data())
    assert fit.global_step == 6
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


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
    assert norm.momentum == 0.1 and quantized.measured_at is None
    with pytest.raises(TrainingError, match="batches=0"):
        BatchNormEstimate(0)


def test_fake_quantization_starts_at_its_step_and_ends_on():
    recorder, quantized = Recorder(), task(W4A4)
    trainer(Calibration(1), FakeQuantStart(4), recorder).fit(quantized, datamodule=data())
    assert recorder.enabled == [{False}] * 4 + [{True}] * 2
    plain = Recorder()
    trainer(plain).fit(task(), datamodule=data())
    assert recorder.losses[:4] == plain.losses[:4] and recorder.losses[4] != plain.losses[4]


def test_delayed_start_is_followed_by_a_resumed_run(tmp_path):
    trainer(Calibration(1), FakeQuantStart(4), Checkpoints(tmp_path), max_steps=3).fit(task(W4A4), datamodule=data())
    recorder = Recorder()
    resumed = trainer(Calibration(1), FakeQuantStart(4), recorder)
    resumed.fit(task(W4A4), datamodule=data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert recorder.enabled == [{False}, {True}, {True}]


def test_step_sizes_stay_positive():
    quantized = task(W4A4, optimizer=functools.partial(torch.optim.SGD, lr=1e4))
    trainer(Calibration(1), max_steps=2).fit(quantized, datamodule=data())
    values = torch.cat([step_size.detach().flatten() for step_size in step_sizes(quantized.model)])
    assert (values[values.isfinite()] >= MIN_SCALE).all() and (values == MIN_SCALE).any()


def test_diverging_run_stops_with_the_fix_and_keeps_its_checkpoint(tmp_path):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_index) -> None:
            if trainer.global_step == 3:
                batch[0].fill_(math.nan)

    checkpoints = Checkpoints(tmp_path, every_n_steps=1)
    with pytest.raises(TrainingError, match=r"at step 4 \(learning rate .*lower optim\.lr.*gradient_clip_val"):
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


def test_distillation_gives_teacher_and_labels_equal_weight():
    teacher = build({"builder": "cnn", "args": {"width": 2}}).eval()
    batch = next(iter(data().train_loader("cpu")))
    alone, taught = task(), task(teacher=teacher)
    logits = alone.eval()(batch[0])
    expected = (
        nn.functional.cross_entropy(logits, batch[1]) + soft_cross_entropy(logits, teacher(batch[0]), batch[1])
    ) / 2
    torch.testing.assert_close(taught.eval().training_step(batch, 0), expected)
    kl = nn.functional.kl_div(logits.log_softmax(-1), teacher(batch[0]).softmax(-1), reduction="batchmean")
    entropy = torch.distributions.Categorical(logits=teacher(batch[0])).entropy().mean()
    torch.testing.assert_close(soft_cross_entropy(logits, teacher(batch[0]), batch[1]), kl + entropy)
    assert not any("teacher" in name for name in taught.state_dict())


def test_several_teachers_count_as_the_mean_of_their_probabilities():
    teachers = [build({"builder": "cnn", "args": {"width": width}}).eval() for width in (2, 3)]
    inputs, targets = next(iter(data().train_loader("cpu")))
    taught = task(teacher=teachers, teacher_share=0.8).eval()
    probabilities = sum(teacher(inputs).double().softmax(-1) for teacher in teachers) / 2
    log_probabilities = taught(inputs).double().log_softmax(-1)
    labels = -log_probabilities[range(len(targets)), targets].mean()
    expected = 0.2 * labels - 0.8 * (probabilities * log_probabilities).sum(-1).mean()
    torch.testing.assert_close(taught.training_step((inputs, targets), 0).double(), expected)
    with pytest.raises(TrainingError, match=r"task.teacher_share=2: give a share from 0 to 1"):
        task(teacher_share=2)


def test_temperature_softens_network_and_teacher_and_keeps_small_gradients():
    """Far above the size of zero-mean logits, T^2 CE has the gradient (z - t) / classes (1503.02531, section 2.1)."""
    generator = torch.Generator().manual_seed(0)
    logits, taught = (torch.randn(1, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    logits, taught = (value - value.mean() for value in (logits, taught))
    logits.requires_grad_()
    soft_cross_entropy(logits, taught, torch.tensor([0]), 1e4).backward()
    torch.testing.assert_close(logits.grad, (logits.detach() - taught) / 5, rtol=1e-2, atol=1e-3)
    with pytest.raises(TrainingError, match=r"task.temperature=0: give a positive number"):
        task(temperature=0)


def test_mixup_mixes_inputs_and_losses_by_the_same_share():
    mixed = task(mixup=0.4).eval()
    inputs, targets = next(iter(data().train_loader("cpu")))
    torch.manual_seed(3)
    loss = mixed.training_step((inputs, targets), 0)
    torch.manual_seed(3)
    share = torch.distributions.Beta(0.4, 0.4).sample().item()
    logits = mixed(share * inputs + (1 - share) * inputs.flip(0))
    first, second = (nn.functional.cross_entropy(logits, labels) for labels in (targets, targets.flip(0)))
    torch.testing.assert_close(loss, share * first + (1 - share) * second)
    with pytest.raises(TrainingError, match=r"task.mixup=-1: give 0 for none"):
        task(mixup=-1)


def test_perplexity_is_that_of_the_tokens():
    torch.manual_seed(0)
    model = build({"builder": "gpt", "args": {"width": 16, "depth": 1, "heads": 2, "context": 8}})
    language = CausalLanguageModel(model, qat.QuantPolicy(), SGD).eval()
    batches = [(torch.randint(0, 256, (size, 8)), torch.randint(0, 256, (size, 8))) for size in (3, 1)]
    for batch in batches:
        language.validation_step(batch, 0)
    losses = [nn.functional.cross_entropy(model(x).transpose(1, 2), y, reduction="none").flatten() for x, y in batches]
    expected = torch.cat(losses).mean().exp()
    torch.testing.assert_close(language.metrics.compute()["perplexity"], expected)


def test_a_nan_shows_in_the_metrics():
    classification = task().eval()
    for value in (0.0, math.nan):
        classification.metrics.update(torch.full((2, 10), value), torch.zeros(2, dtype=torch.int64))
    assert classification.metrics.compute()["loss"].isnan()


def test_outputs_of_transformers_models_are_read():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    language = CausalLanguageModel(transformers.LlamaForCausalLM(config), qat.QuantPolicy(), SGD)
    tokens = torch.randint(0, 64, (2, 9))
    assert language.training_step((tokens[:, :-1], tokens[:, 1:]), 0).isfinite()


@pytest.mark.slow
def test_compiled_training_takes_the_same_steps():
    losses = []
    for mode in (None, "default"):
        recorder = Recorder()
        trainer(Calibration(1), recorder).fit(task(W4A4, compile_mode=mode), datamodule=data())
        losses.append(recorder.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def language_task(**options) -> CausalLanguageModel:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**shape, num_hidden_layers=4)
    torch.manual_seed(0)
    model, teacher = (transformers.LlamaForCausalLM(config).train() for _ in range(2))
    policy = {"weight": {"bits": 4, "group_size": 32}, "rules": [{"match": "lm_head", "weight": None}]}
    return CausalLanguageModel(model, qat.QuantPolicy.from_dict(policy), SGD, teacher=teacher, **options)


def test_blocks_are_compiled_once_and_validated_eagerly():
    """One graph for all blocks, one for the teacher's and one for the loss; the steps are those of an eager run."""
    losses, metrics = [], []
    for mode in (None, "blocks"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        recorder, text = Recorder(), TextData("topics", 32, 4)
        run = trainer(recorder, limit_train_batches=3, limit_val_batches=2, max_epochs=-1)
        task = language_task(compile_mode=mode)
        with mock.patch("torch.compile", functools.partial(torch.compile, backend="eager")):
            run.fit(task, datamodule=text)
        losses.append(recorder.losses)
        metrics.append(run.callback_metrics["val/loss"].item())
    assert losses[0] == losses[1] and metrics[0] == metrics[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert all(block._compiled_call_impl is None for block in task.model.model.layers)


def test_a_model_that_repeats_no_block_is_one():
    network = build({"builder": "cnn", "args": {"width": 2}})
    assert repeated(network) == [network]


def test_language_models_train_without_a_key_value_cache():
    task = language_task()
    with mock.patch.object(type(task.model), "forward", autospec=True, side_effect=type(task.model).forward) as forward:
        task(torch.zeros(1, 4, dtype=torch.int64))
    assert forward.call_args.kwargs["use_cache"] is False and task.model.config.use_cache
