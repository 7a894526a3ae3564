"""freeze: the integers that training used, and nothing but them.

``check_*`` takes the module under test, so that the mutants' tests can show that it fails on a wrong one.
"""

import math
import warnings

import pytest
import torch
from torch import nn

import qat.freezing
from qat import QuantPolicy, QuantSpec
from qat.errors import LayerError, StateError
from qat.layers import FrozenConv2d, FrozenLinear, QuantLinear
from qat.numerics import quantize_tensor, stored_scale

POLICY = QuantPolicy(
    weight=QuantSpec(bits=3),
    activation={"bits": 4},
    rules=[
        {"match": "@first", "weight": {"bits": 8}, "activation": {"signed": True}},
        {"match": "plain", "weight": None, "activation": None},
        {"match": "inputs", "weight": None},
        {"match": "weights", "activation": None},
    ],
)


class Net(nn.Module):
    """A layer of each kind, and two that share a weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Linear(8, 8, bias=False)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.inputs = nn.Linear(8, 8)
        self.weights = nn.Linear(8, 8)
        self.plain = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.conv(x)).mean((2, 3))
        return self.plain(self.weights(self.inputs(self.b(self.a(x)))))


def images(size=4):
    return torch.randn(size, 3, 6, 6)


def trained():
    """Return a prepared model after a few steps, its step sizes off the bf16 grid."""
    model = qat.calibrate(qat.prepare(Net(), POLICY, verbose=False), [images(), images()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()
    assert any((p != p.bfloat16()).any() for name, p in model.named_parameters() if "step_size" in name)
    return model.eval()


def check_same_integers_and_output(freezing):
    model, x = trained(), images()
    before, expected = freezing.quantized_tensors(model), model(x)
    used = {name: model.get_submodule(name).weight_quantizer(model.get_submodule(name).weight) for name in before}
    assert freezing.freeze(model) is model
    after = freezing.quantized_tensors(model)
    assert before.keys() == after.keys() == {"conv", "a", "b", "weights"}
    for name in before:
        assert torch.equal(before[name].codes, after[name].codes)
        assert torch.equal(before[name].scale, after[name].scale)
        assert before[name].spec == after[name].spec
        assert torch.equal(after[name].dequantize(), used[name])
    assert torch.equal(model(x), expected)


def check_ties_share_their_codes(freezing):
    model = freezing.freeze(trained())
    assert model.a.packed_weight is model.b.packed_weight
    assert model.a.packed_weight is not model.weights.packed_weight


def check_uninitialised(freezing):
    model = qat.prepare(Net(), POLICY, verbose=False)
    with pytest.raises(StateError, match="'conv' was never initialised"):
        freezing.freeze(model)
    assert type(model.a) is QuantLinear


def check_all_or_nothing(freezing):
    """A weight or a scale that cannot be quantized is named, and no other layer is frozen meanwhile."""
    for layer, broken in (
        ("weights", "weight"),
        ("weights", "weight_quantizer.step_size"),
        ("inputs", "activation_quantizer.step_size"),
    ):
        model, x = trained(), images()
        with torch.no_grad():
            model.get_submodule(layer).get_parameter(broken)[0, 0] = math.nan
        types = [type(layer) for layer in model.modules()]
        with pytest.raises(LayerError, match=rf"'{layer}': .*NaN"):
            freezing.freeze(model)
        assert [type(layer) for layer in model.modules()] == types
        with torch.no_grad():
            model.get_submodule(layer).get_parameter(broken)[0, 0] = 0.25
        expected = model(x)
        assert torch.equal(freezing.freeze(model)(x), expected)


def check_nothing_to_freeze(freezing):
    with pytest.raises(StateError, match=r"nothing to freeze: call qat.prepare"):
        freezing.freeze(Net())
    with pytest.raises(StateError, match="frozen already"):
        freezing.freeze(freezing.freeze(trained()))


def test_same_integers_and_output():
    check_same_integers_and_output(qat.freezing)


def test_ties_share_their_codes():
    check_ties_share_their_codes(qat.freezing)


def test_uninitialised():
    check_uninitialised(qat.freezing)


def test_all_or_nothing():
    check_all_or_nothing(qat.freezing)


def test_nothing_to_freeze():
    check_nothing_to_freeze(qat.freezing)


def test_what_is_left():
    """Packed codes, 16-bit scales and biases; a layer with no quantized weight keeps its own; no scale learns."""
    model = trained().train()
    model = qat.freeze(model)
    assert not any(module.training for module in model.modules())
    assert {type(model.conv), type(model.a)} == {FrozenConv2d, FrozenLinear} and type(model.plain) is nn.Linear
    kept = {"conv.bias", "b.bias", "inputs.weight", "inputs.bias", "weights.bias", "plain.weight", "plain.bias"}
    assert {name for name, _ in model.named_parameters()} == kept
    state = model.state_dict()
    assert state["conv.packed_weight.packed"].shape == (8, 27)  # 8 bits
    assert state["weights.packed_weight.packed"].shape == (8, 3)  # 8 codes of 3 bits
    assert {value.dtype for key, value in state.items() if "scale" in key} == {torch.bfloat16}


def test_training_on_does_not_change_what_was_frozen():
    """Nothing frozen is a view of a parameter."""
    model = trained()
    parameters = [p for name, p in model.named_parameters() if "step_size" in name or name.endswith("a.weight")]
    qat.freeze(model)
    x = images()
    expected = model(x)
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(3)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scale_dtypes(dtype):
    layer = qat.prepare(nn.Linear(32, 8), QuantPolicy(weight=QuantSpec(bits=4, scale_dtype=dtype)), verbose=False)
    x = torch.randn(3, 32)
    expected = layer(x)
    qat.freeze(layer)
    assert layer.packed_weight.scale.dtype == getattr(torch, dtype)
    assert torch.equal(layer(x), expected)


def test_activations_keep_their_integers():
    """A frozen layer without a quantized weight: its output differs by nothing from training's."""
    model, x = trained(), torch.randn(5, 8)
    expected = model.inputs(x)
    assert torch.equal(qat.freeze(model).inputs(x), expected)
    assert (model.inputs.activation_quantizer(x) / model.inputs.activation_quantizer.scale).unique().numel() <= 16


def test_frozen_state_loads_into_another_frozen_model():
    one, other, x = qat.freeze(trained()), qat.freeze(trained()), images()
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_quantized_tensors_of_a_plain_model():
    with pytest.raises(StateError, match="no quantized weights"):
        qat.quantized_tensors(Net())


def test_quantized_tensors_are_the_promised_value():
    tensors = qat.quantized_tensors(trained())
    assert {name: tensor.codes.shape for name, tensor in tensors.items()}["conv"] == (8, 3, 3, 3)
    for tensor in tensors.values():
        assert tensor.codes.dtype == torch.int8 and tensor.zero_point is None
        assert -tensor.spec.q_n <= tensor.codes.min() and tensor.codes.max() <= tensor.spec.q_p


def test_gradients_flow_through_a_frozen_model():
    """To inputs and to biases, as adapters on a frozen model need."""
    model = qat.freeze(trained())
    x = images().requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert model.b.bias.grad is not None


class Own(nn.Module):
    """A weight quantizer from outside the package: a fifth of the range of each row."""

    def __init__(self, spec, way):
        super().__init__()
        self.spec, self.way = spec, way

    def step(self, weight):
        return weight.detach().float().abs().amax(1, keepdim=True) / (5 * self.spec.q_p)

    def quantize(self, weight):
        return quantize_tensor(weight, stored_scale(self.step(weight), self.spec), self.spec)

    def forward(self, weight):
        q = self.quantize(weight)
        rounded = q.dequantize(weight.dtype)
        if self.way == "straight":  # as straight-through estimators are often written
            return weight + (rounded - weight).detach()
        if self.way == "unrounded":  # the scale is not the one that is stored
            rounded = (q.codes * self.step(weight)).to(weight.dtype)
        return rounded + (weight - weight.detach())


@pytest.mark.parametrize(
    ("way", "dtype", "same"),
    [
        ("exact", torch.float32, True),
        ("exact", torch.bfloat16, True),
        ("straight", torch.bfloat16, False),
        ("unrounded", torch.float32, False),
    ],
)
def test_a_quantizer_of_the_users_own_ships_what_it_trains_with_or_is_refused(tmp_path, way, dtype, same):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)
    x = torch.randn(8, 64, dtype=dtype)
    qat.prepare(model, {"weight": {"bits": 3}}, verbose=False)
    model[0].weight_quantizer = Own(model[0].weight_quantizer.spec, way)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).square().mean().backward()
    assert model[0].weight.grad.any()
    optimizer.step()
    trained = model(x)
    if same:
        qat.save(qat.freeze(model), tmp_path)
        fresh = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
        assert torch.equal(qat.load(tmp_path, model=fresh)(x), trained)
        return
    with pytest.raises(LayerError, match=r"'0': Own would ship other weights than it trains with: \d+ of 2048 differ"):
        qat.freeze(model)
    assert torch.equal(model(x), trained)  # as it was


def test_what_is_switched_off_is_frozen_with_a_warning():
    def prepared():
        torch.manual_seed(0)
        return qat.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), QuantPolicy(weight=QuantSpec(bits=2)))

    model, x = prepared(), torch.randn(4, 8)
    wanted = model(x)
    model[1].weight_quantizer.enabled = False
    assert not torch.equal(model(x), wanted)
    with pytest.warns(UserWarning, match=r"enabled=False\) in 1 of 2 layers \('1'\)"):
        qat.freeze(model)
    assert torch.equal(model(x), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qat.freeze(prepared())
