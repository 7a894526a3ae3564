"""Rounded weights kept across micro-batches: the same gradients, rounded once, and never a stale one."""

import pytest
import torch
from torch import nn

import qat
from qat import QuantPolicy
from qat.numerics import fake_quantized
from qat.quantizers import rounding

BATCHES = [torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def prepared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    rules = [{"match": "2", "weight": {"symmetric": False}, "activation": {"bits": 8}}]
    policy = QuantPolicy(weight={"bits": 4, "group_size": 8}, rules=rules)
    return qat.calibrate(qat.prepare(model, policy, verbose=False), BATCHES)


def gradients(model):
    model.zero_grad()
    for batch in BATCHES:
        model(batch).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.fixture
def rounded(monkeypatch):
    """The shapes of what was rounded, in turn."""
    shapes = []

    def counting(x, *args):
        shapes.append(tuple(x.shape))
        return fake_quantized(x, *args)

    monkeypatch.setattr(rounding.numerics, "fake_quantized", counting)
    return shapes


def test_each_weight_is_rounded_once(rounded):
    model = prepared()
    expected = gradients(model)
    rounded.clear()
    with qat.kept_weights(model):
        found = gradients(model)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert rounded.count((16, 32)) == 1 and rounded.count((8, 16)) == 1
    gradients(model)
    assert rounded.count((16, 32)) > 2


@pytest.mark.parametrize(
    "changed", ["0.weight", "0.weight_quantizer.step_size", "2.weight", "2.weight_quantizer.zero_point"]
)
def test_what_changes_in_place_is_rounded_again(changed):
    model = prepared()
    with qat.kept_weights(model), torch.no_grad():
        before = model(BATCHES[0])
        dict(model.named_parameters(), **dict(model.named_buffers()))[changed].mul_(2)
        after = model(BATCHES[0])
    assert not torch.equal(before, after)
    assert torch.equal(after, model(BATCHES[0]))


def test_other_weights_get_none_that_is_kept():
    """As an ensemble's, which are parts of one tensor that never changed."""
    model = prepared()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    members = {name: torch.stack([parameter, parameter.flip(0)]) for name, parameter in parameters.items()}
    members["2.weight_quantizer.step_size"] = torch.stack([parameters["2.weight_quantizer.step_size"]] * 2)
    ensemble = [{name: member[i] for name, member in members.items()} for i in range(2)]

    def outputs():
        return [torch.func.functional_call(model, member, BATCHES[0]) for member in (parameters, *ensemble)]

    expected = outputs()
    with qat.kept_weights(model):
        found = outputs()
    assert not torch.equal(expected[1], expected[2])
    assert all(map(torch.equal, found, expected))


def test_an_error_ends_the_keeping():
    model = prepared()
    with pytest.raises(ZeroDivisionError), qat.kept_weights(model):
        _ = 1 / 0
    assert model[0].weight_quantizer.kept is None
