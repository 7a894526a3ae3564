"""How training calls a network: compiled, whole or by its repeated block, and language models without a cache."""

import functools
from unittest import mock

import pytest
import torch
from small_training import SGD, W4A4, Recorder, data, task, trainer

import qat
from qat.models import build
from qat.ptq.units import repeated
from qat.training import metrics
from qat.training.callbacks import (
    Calibration,
)
from qat.training.tasks import CausalLanguageModel
from qat.training.text_data import TextData


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


def test_blocks_are_compiled_once_and_validated_eagerly(capsys):
    """One graph for all blocks, one for the teacher's and one for the loss; the steps are those of an eager run."""
    losses, validated = [], []
    for mode in (None, "blocks"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        recorder, text = Recorder(), TextData("topics", 32, 4)
        run = trainer(recorder, limit_train_batches=3, limit_val_batches=2, max_epochs=-1)
        task = language_task(compile_mode=mode)
        with mock.patch("torch.compile", functools.partial(torch.compile, backend="eager")):
            run.fit(task, datamodule=text)
        losses.append(recorder.losses)
        validated.append(run.callback_metrics["val/loss"].item())
        assert ("compiling   the repeated block" in capsys.readouterr().out) == (mode is not None)
    assert losses[0] == losses[1] and validated[0] == validated[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert all(block._compiled_call_impl is None for block in task.model.model.layers)


def test_a_model_that_repeats_no_block_is_one():
    network = build({"builder": "cnn", "args": {"width": 2}})
    assert repeated(network) == [network]


@pytest.mark.parametrize("mode", [None, "blocks", "default"])
def test_what_is_estimated_as_compiled_are_the_blocks_of_what_will_be(mode):
    task = language_task(compile_mode=mode)
    assert task.compilation.blocks(task.model) == ([] if mode is None else list(task.model.model.layers))


def test_language_models_train_without_a_key_value_cache():
    task = language_task()
    with mock.patch.object(type(task.model), "forward", autospec=True, side_effect=type(task.model).forward) as forward:
        task(torch.zeros(1, 4, dtype=torch.int64))
    assert forward.call_args.kwargs["use_cache"] is False and task.model.config.use_cache


def test_adapters_of_peft_train_without_it_too():
    peft = pytest.importorskip("peft")
    base = language_task().model
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    with mock.patch.object(type(base), "forward", autospec=True, side_effect=type(base).forward) as forward:
        metrics.run(model, torch.zeros(1, 4, dtype=torch.int64))
    assert forward.call_args.kwargs["use_cache"] is False
