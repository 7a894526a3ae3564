"""The chunked cross-entropy against the plain one, and where it may not be used."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch import nn

import qat
from qat.errors import TrainingError
from qat.memory import LiveBytes
from qat.models import build
from qat.training.chunked_loss import check_head, chunked_loss, head_of, linear_cross_entropy
from qat.training.metrics import IGNORED, cross_entropy
from qat.training.tasks import CausalLanguageModel
from qat.training.text_data import TextData

transformers = pytest.importorskip("transformers")
SHAPE = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).train()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(2, 40), st.integers(1, 12), st.booleans(), st.integers(0, 2**31))
def test_value_and_gradients_are_those_of_the_whole(count, vocabulary, rows, with_bias, seed):
    """Against torch's cross-entropy in float64, with targets that do not count, for chunks that do not divide."""
    torch.manual_seed(seed)
    x, weight = torch.randn(2, count, 5, dtype=torch.float64), torch.randn(vocabulary, 5, dtype=torch.float64)
    leaves = [x, weight, torch.randn(vocabulary, dtype=torch.float64)] if with_bias else [x, weight]
    targets = torch.randint(0, vocabulary, (2, count))
    targets[torch.rand(2, count) < 0.3] = IGNORED
    targets[0, 0] = 0
    leaves = [leaf.requires_grad_() for leaf in leaves]
    bias = leaves[2] if with_bias else None
    plain = F.cross_entropy(F.linear(x, weight, bias).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    found = linear_cross_entropy(x, weight, bias, targets, rows)
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-12)
    expected = torch.autograd.grad(3 * plain, leaves)
    for one, other in zip(torch.autograd.grad(3 * found, leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_in_bf16_it_is_as_near_to_float64_as_the_plain_loss():
    torch.manual_seed(0)
    x, weight = torch.randn(300, 64), torch.randn(1000, 64) / 8
    targets = torch.randint(0, 1000, (300,))
    exact = [leaf.double().requires_grad_() for leaf in (x, weight)]
    expected = torch.autograd.grad(cross_entropy(F.linear(*exact).double(), targets), exact)
    errors = []
    for function in (
        lambda x, weight: cross_entropy(F.linear(x, weight), targets),
        lambda x, weight: linear_cross_entropy(x, weight, None, targets, 128),
    ):
        leaves = [leaf.bfloat16().requires_grad_() for leaf in (x, weight)]
        grads = torch.autograd.grad(function(*leaves), leaves)
        errors.append([(g.double() - e).norm() / e.norm() for g, e in zip(grads, expected, strict=True)])
    assert all(chunked <= 1.25 * plain for plain, chunked in zip(*errors, strict=True))  # a sum of rounded chunks


def test_the_logits_are_never_all_there():
    x, weight, targets = torch.randn(256, 4, requires_grad=True), torch.randn(512, 4), torch.randint(0, 512, (256,))
    peaks = []
    for rows in (256, 8):
        live = LiveBytes()
        with live:
            linear_cross_entropy(x, weight, None, targets, rows).backward()
        peaks.append(live.most)
    logits = 4 * 256 * 512
    assert peaks[0] > logits and peaks[1] < logits / 4


@pytest.mark.parametrize("autocast", [False, True])
def test_training_takes_the_same_steps(autocast):
    losses = []
    for rows in (None, 50):
        model = llama()
        policy = qat.QuantPolicy.from_dict({"weight": {"bits": 4}, "rules": [{"match": "lm_head", "weight": None}]})
        task = CausalLanguageModel(model, policy, functools.partial(torch.optim.SGD, lr=0.1), loss_rows=rows)
        kept, step = [], task.training_step
        task.training_step = lambda *a, step=step, kept=kept: kept.append(step(*a)) or kept[-1]
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "limit_val_batches": 0}
        precision = "bf16-mixed" if autocast else "32-true"
        Trainer(max_steps=4, precision=precision, **quiet).fit(task, datamodule=TextData("topics", 32, 4))
        losses.append(torch.stack(kept).detach())
    torch.testing.assert_close(*losses, rtol=1e-2 if autocast else 1e-5, atol=0)


def test_adapters_of_peft_take_it():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules="all-linear"))
    tokens = torch.randint(0, 256, (2, 9))
    check_head(model, tokens)
    loss = chunked_loss(model, tokens[:, :-1], tokens[:, 1:], 3)
    torch.testing.assert_close(loss, cross_entropy(model(tokens[:, :-1]).logits, tokens[:, 1:]))
    loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_a_model_that_caps_its_logits_is_refused():
    config = transformers.Gemma2Config(**SHAPE, final_logit_softcapping=0.05)
    tokens = torch.randint(0, 256, (2, 9))
    with pytest.raises(TrainingError, match="Gemma2ForCausalLM does more than its head"):
        check_head(transformers.Gemma2ForCausalLM(config), tokens)
    check_head(llama(), tokens)


def test_what_it_does_not_go_with_is_refused():
    with pytest.raises(TrainingError, match="this one has none"):
        head_of(
            build({"builder": "gpt", "args": {"vocabulary": 16, "width": 16, "depth": 1, "heads": 2, "context": 8}})
        )
    quantized = qat.prepare(llama(), qat.QuantPolicy(weight=qat.QuantSpec(bits=4)), verbose=False)
    with pytest.raises(TrainingError, match="this one has a QuantLinear"):
        head_of(quantized)
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(TrainingError, match="loss_rows=0: give a positive number"):
        CausalLanguageModel(llama(), qat.QuantPolicy(), sgd, loss_rows=0)
    with pytest.raises(TrainingError, match="neither a teacher nor"):
        CausalLanguageModel(llama(), qat.QuantPolicy(), sgd, loss_rows=8, teacher=llama())
