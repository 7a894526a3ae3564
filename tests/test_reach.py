"""check: weights that a forward takes past their layers, and layers that it does not reach."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qat
from qat.errors import StateError
from qat.layers import quant_layers
from qat.qa_lora import qa_lora
from qat.reach import _Watch

WEIGHTS = qat.QuantPolicy(weight={"bits": 4})
INT8 = {"bits": 8, "granularity": "tensor"}
EMBEDDING = {"match": "Embedding", "weight": {"bits": 8}}


class Uses(nn.Module):
    """A linear layer a, used by one of several ways, and one b that is called."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.way = nn.Linear(8, 8, bias=False), nn.Linear(8, 8), way

    def forward(self, x):
        return self.b(self.way(self, x))


PAST = {
    "F.linear": lambda net, x: F.linear(x, net.a.weight),
    "matmul": lambda net, x: x @ net.a.weight.t(),
    "the weight first": lambda net, x: (net.a.weight @ x.t()).t(),
    "a scaled copy": lambda net, x: F.linear(x, net.a.weight * 2),
    "called, and used again": lambda net, x: net.a(x) + F.linear(x, net.a.weight),
    "a vector made of it": lambda net, x: net.a(x) * net.a.weight.abs().sum(0),
}
FINE = {
    "called": lambda net, x: net.a(x),
    "its norm": lambda net, x: net.a(x) * net.a.weight.norm(),
    "its shape and dtype": lambda net, x: net.a(x.to(net.a.weight.dtype)).view(-1, net.a.weight.shape[0]),
    "called twice": lambda net, x: net.a(net.a(x)),
    "checkpointed": lambda net, x: torch.utils.checkpoint.checkpoint(net.a, x, use_reentrant=False),
}


def prepared(model, policy=WEIGHTS, batch=None):
    qat.prepare(model, policy, verbose=False)
    return model if batch is None else qat.calibrate(model, [batch])


@pytest.mark.parametrize("way", PAST, ids=str)
@pytest.mark.parametrize(
    "kind", [{}, {"weight_quantizer": "minmax"}, {"activation": {"bits": 8, "granularity": "tensor"}}]
)
def test_a_weight_used_past_its_layer_is_named(way, kind):
    x = torch.randn(3, 8)
    net = prepared(Uses(FINE["called"]), qat.QuantPolicy(weight={"bits": 4}, **kind), x)
    net.way = PAST[way]
    before = net(x)
    (line,) = qat.check(net.train(), x)
    assert line.startswith("'a': its weight is used past its fake quantization, in aten.") and "'b'" not in line
    assert net.training and torch.equal(net(x), before)
    assert not net.a._forward_hooks and not net.a._forward_pre_hooks


@pytest.mark.parametrize("way", FINE, ids=str)
def test_what_does_not_take_the_weight_is_not(way):
    assert qat.check(prepared(Uses(FINE[way])), torch.randn(3, 8)) == []


def test_a_head_that_borrows_the_embeddings_weight():
    """Without a layer of its own the head multiplies by the unrounded weight; with one that is tied, by the rounded."""

    class Tied(nn.Module):
        def __init__(self, own_head):
            super().__init__()
            self.tokens, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False) if own_head else None
            self.inner = nn.Linear(8, 8)
            if own_head:
                self.head.weight = self.tokens.weight

        def forward(self, tokens):
            x = self.inner(self.tokens(tokens))
            return F.linear(x, self.tokens.weight) if self.head is None else self.head(x)

    tokens = torch.tensor([[1, 2, 3]])
    policy = qat.QuantPolicy(weight={"bits": 8}, rules=[EMBEDDING])
    assert qat.check(prepared(Tied(own_head=True), policy), tokens) == []
    assert qat.check(prepared(Tied(own_head=True)), tokens) == []  # the embedding ships the weight that it trains with
    (line,) = qat.check(prepared(Tied(own_head=False), policy), tokens)
    assert line.startswith("'tokens': its weight is used past its fake quantization")


def test_layers_that_are_not_reached_are_listed():
    net = prepared(Uses(lambda net, x: x))
    assert qat.check(net, torch.randn(3, 8)) == [
        "not reached by the batch: a; they learn from other batches, if at all"
    ]
    net.way = lambda net, x: x / 0 + missing  # noqa: F821
    with pytest.raises(NameError):
        qat.check(net, torch.randn(3, 8))
    assert not net.a._forward_hooks and not net.b._forward_pre_hooks
    with pytest.raises(StateError, match="nothing to check"):
        qat.check(nn.Linear(2, 2), torch.randn(1, 2))


def test_a_batch_is_run_as_calibrate_runs_it():
    net, x = prepared(Uses(lambda net, x: x)), torch.randn(3, 8)
    assert qat.check(net, (x, torch.arange(3))) == qat.check(net, x)
    with pytest.raises(StateError, match=r"does not take a dict .*: say how to run a batch, such as forward=lambda"):
        qat.check(net, {"x": x})
    assert qat.check(net, {"x": x}, forward=lambda model, batch: model(**batch)) == qat.check(net, x)


def test_a_model_of_transformers_has_nothing_to_say():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes))
    prepared(model, qat.QuantPolicy(weight={"bits": 8}, rules=[EMBEDDING]))
    assert qat.check(model, torch.tensor([[1, 2, 3]])) == []


def test_only_weights_that_stay_are_watched():
    """An adapter's layer makes its weight of codes at each look: later another tensor may lie where one has been."""
    net = qa_lora(nn.Sequential(nn.Linear(32, 32)), qat.QuantPolicy(weight={"bits": 4, "group_size": 16}), rank=4)
    assert _Watch(dict(quant_layers(net)))._owners == {}
    assert qat.check(net, torch.randn(3, 32)) == []


@pytest.mark.parametrize("policy", ["conv_w4a4", "conv_w4a4 policy.activation=null policy.rules=[]"])
def test_the_training_command_warns(train, tmp_path, monkeypatch, capsys, policy):
    (tmp_path / "borrowing.py").write_text(
        "import torch.nn.functional as F\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        x = self.first(x.flatten(1)).relu()\n"
        "        return self.last(F.linear(x, self.first.weight))\n"
    )
    folder = tmp_path / "configs" / "model"
    folder.mkdir(parents=True)
    (folder / "borrowing.yaml").write_text("_target_: borrowing.Net\n")
    monkeypatch.syspath_prepend(tmp_path)
    short = "data=digits trainer.accelerator=cpu trainer.max_steps=1 trainer.limit_val_batches=1"
    train(f"--config-dir {tmp_path / 'configs'} model=borrowing {short} policy={policy}")
    assert "warning     'first': its weight is used past its fake quantization" in capsys.readouterr().out
    train(f"{short} name=ours policy={policy}")
    assert "warning" not in capsys.readouterr().out
