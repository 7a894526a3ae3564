"""Tasks in one process: parameter groups, schedules, losses and metrics."""

import functools
import math

import pytest
import torch
from small_training import SGD, W4A4, data, task, trainer
from torch import nn

import qat
from qat.errors import TrainingError
from qat.models import build
from qat.numerics import MIN_SCALE
from qat.training.callbacks import Calibration
from qat.training.losses import soft_cross_entropy
from qat.training.optimization import Schedule, learning_rate_factor, parameter_groups, step_sizes
from qat.training.tasks import CausalLanguageModel


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


def test_step_sizes_stay_positive():
    quantized = task(W4A4, optimizer=functools.partial(torch.optim.SGD, lr=1e4))
    trainer(Calibration(1), max_steps=2).fit(quantized, datamodule=data())
    values = torch.cat([step_size.detach().flatten() for step_size in step_sizes(quantized.model)])
    assert (values[values.isfinite()] >= MIN_SCALE).all() and (values == MIN_SCALE).any()


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
