"""A model without its values: nothing takes memory, ties and names hold, and filling it gives what was saved."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import qat
from qat.errors import ArtifactError
from qat.frozen_model import from_model, outline, to_model
from qat.models import build
from qat.outline import fake_, parameters_on_meta, to_meta_


class Net(nn.Module):
    """Normed, tied, and with a buffer that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm, self.head = nn.Embedding(9, 32), nn.BatchNorm1d(32), nn.Linear(32, 9, bias=False)
        self.inner = nn.Linear(32, 32)
        self.head.weight = self.tokens.weight
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.inner(self.tokens(x)).mean(1))) + self.frequencies.sum()


def quantized(**rules):
    policy = qat.QuantPolicy(weight=qat.QuantSpec(group_size=32), rules=[{"match": "head", "weight": None, **rules}])
    return from_model(qat.freeze(qat.prepare(Net(), policy, False)))


def test_parameters_made_on_the_meta_device_keep_their_ties_and_buffers_their_values():
    register = nn.Module.register_parameter
    with parameters_on_meta():
        network = Net()
    assert nn.Module.register_parameter is register
    assert all(parameter.is_meta for parameter in network.parameters())
    assert network.head.weight is network.tokens.weight and network.frequencies.tolist() == [0, 1, 2, 3]


def test_values_are_drawn_for_what_is_not_on_the_meta_device_alone():
    normal = nn.init.normal_
    with parameters_on_meta():
        inside = nn.init.constant_(tensor=torch.empty(3), val=2.0)
        meta = nn.init.kaiming_uniform_(torch.empty(3, 3, device="meta"))
    assert nn.init.normal_ is normal
    assert inside.tolist() == [2, 2, 2] and meta.is_meta
    assert nn.Embedding(9, 4).weight.std() > 0.5


def test_reading_imports_no_compiler(tmp_path):
    """A torch operator on the meta device that draws numbers imports torch._dynamo, which takes seconds."""
    network = build({"builder": "gpt", "args": {"vocabulary": 8, "width": 16, "depth": 1, "heads": 2, "context": 8}})
    policy = qat.QuantPolicy(weight=qat.QuantSpec(group_size=16))
    qat.save(qat.freeze(qat.prepare(network, policy, verbose=False)), tmp_path / "out")
    code = f"import sys, qat; qat.load({str(tmp_path / 'out')!r}); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_an_outline_holds_no_values():
    model = quantized()
    network = outline(model, Net())
    assert network.head.weight is network.tokens.weight
    held = {*network.state_dict(keep_vars=True).values(), *network.parameters()}
    assert held and all(value.is_meta for value in held)
    assert network.frequencies.tolist() == [0, 1, 2, 3]
    assert network.inner.packed_weight.spec == model.layers["inner"].weight
    fake_(network)
    assert isinstance(network.head.weight, torch._subclasses.FakeTensor)
    assert network.head.weight is network.tokens.weight and network.head.weight.device.type == "cpu"
    assert type(network.frequencies) is torch.Tensor


def test_an_outline_asks_for_no_tensor_and_names_what_does_not_fit():
    model = quantized()
    model.quantized = model.dense = dict.fromkeys(model.dense).keys()  # names only
    outline(model, Net())
    model.dense = ["norm.weight", "other"]
    with pytest.raises(ArtifactError, match=r"missing inner.bias.*; unexpected other"):
        outline(model, Net())


def test_moving_to_the_meta_device_is_by_name():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    to_meta_(network, {"0.weight"})
    assert [p.is_meta for p in network.parameters()] == [True, False, False, False]


def test_moving_a_module_that_stands_twice_keeps_what_is_tied_to_it():
    shared, tied = nn.Linear(2, 2), nn.Linear(2, 2)
    tied.weight = shared.weight
    network = nn.Sequential(shared, tied, shared)
    to_meta_(network, set(network.state_dict()))
    assert shared.weight.is_meta and tied.weight is shared.weight


@pytest.mark.parametrize("builder", ["gpt", "resnet20"])
def test_a_model_that_is_built_to_be_filled_is_the_one_that_was_saved(builder):
    """The last layer has only its input quantized; a resnet's statistics are buffers."""
    activation = {"bits": 8, "granularity": "tensor"}
    policy = {"weight": {"bits": 4}, "rules": [{"match": "@last", "weight": None, "activation": activation}]}
    x = torch.randint(0, 9, (2, 8)) if builder == "gpt" else torch.randn(2, 3, 16, 16)
    network = qat.prepare(build({"builder": builder}), qat.QuantPolicy.from_dict(policy), False)
    qat.calibrate(network, [x])
    frozen = qat.freeze(network).eval()
    filled = to_model(from_model(frozen))
    assert not any(value.is_meta for value in [*filled.parameters(), *filled.buffers()])
    assert torch.equal(filled(x), frozen(x))
