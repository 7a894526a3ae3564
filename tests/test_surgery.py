"""prepare: each layer becomes what the policy says, nothing else changes, and nothing is skipped in silence.

``check_*`` takes the modules under test, so that the mutants' tests can show that it fails on a wrong one.
"""

import copy

import pytest
import torch
from small_networks import POLICY, W4, Net, Tied, bits_of, prepare, row_of
from torch import nn

import qat.surgery
from qat import QuantPolicy, QuantSpec
from qat.errors import LayerError, PolicyError, StateError
from qat.layers import QuantLinear
from qat.quantizers import ActivationLSQ, WeightLSQ

WITH_INPUTS = QuantPolicy(weight=W4, activation={"bits": 8})


def check_rules(surgery):
    rules = [
        {"match": "Linear", "weight": {"bits": 3}, "activation": {"bits": 5}},
        {"match": "@first", "weight": {"bits": 8}, "activation": None},
        {"match": "head", "weight": None},
    ]
    model = surgery.prepare(Net(), QuantPolicy(weight=W4, activation={"bits": 6}, rules=rules), verbose=False)
    assert bits_of(model) == {"conv": (8, None), "fc": (3, 5), "head": (None, 6)}


def check_ties(surgery):
    """Tied weights stay one parameter with one quantizer, and stay tied to the embedding."""
    model = surgery.prepare(Tied(), POLICY, verbose=False)
    assert model.a.weight is model.b.weight and model.head.weight is model.embed.weight
    assert model.a.weight_quantizer is model.b.weight_quantizer
    assert model.head.weight_quantizer is not model.a.weight_quantizer
    assert len([m for m in model.modules() if isinstance(m, WeightLSQ)]) == 2
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len({id(p) for p in model.parameters()})
    model(torch.arange(5)).sum().backward()
    assert model.a.weight_quantizer.step_size.grad.abs().sum() > 0


def check_shapes_that_do_not_fit(surgery):
    """One error lists every layer, with the sizes that would do; the model is untouched."""
    model = nn.Sequential(nn.Linear(48, 8), nn.Linear(64, 8), nn.Linear(40, 8))
    with pytest.raises(LayerError) as caught:
        surgery.prepare(model, QuantPolicy(weight=QuantSpec(group_size=32)), verbose=False)
    message = str(caught.value)
    assert "'0': group_size=32 does not divide its 48 inputs; group sizes that do: 8, 16, 24, 48" in message
    assert "'2': group_size=32 does not divide its 40 inputs; group sizes that do: 8, 40" in message
    assert "'1'" not in message
    assert all(type(layer) is nn.Linear for layer in model)


def check_prepared_twice(surgery):
    model = surgery.prepare(Net(), POLICY, verbose=False)
    with pytest.raises(StateError, match="prepared already"):
        surgery.prepare(model, POLICY, verbose=False)


def test_rules():
    check_rules(qat.surgery)


def test_ties():
    check_ties(qat.surgery)


def test_shapes_that_do_not_fit():
    check_shapes_that_do_not_fit(qat.surgery)


def test_prepared_twice():
    check_prepared_twice(qat.surgery)


def test_frozen_models_cannot_be_prepared():
    with pytest.raises(StateError, match=r"this model is frozen: qat\.start_from"):
        prepare(qat.freeze(prepare(Net())))


def test_in_place_and_every_parameter_exists():
    model = Net()
    weights = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert prepare(model, WITH_INPUTS) is model
    parameters = dict(model.named_parameters())
    assert {name: id(parameters[name]) for name in weights} == weights
    assert set(parameters) - set(weights) == {
        f"{layer}.{kind}_quantizer.step_size" for layer in ("conv", "fc", "head") for kind in ("weight", "activation")
    }
    assert all(parameter.requires_grad for parameter in parameters.values())
    qat.calibrate(model, [torch.randn(2, 3, 5, 5)])
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == {"embed.weight"}


def test_the_state_dict_of_a_plain_model_keeps_its_names():
    plain = Net()
    prepared = prepare(copy.deepcopy(plain))
    assert plain.state_dict().keys() <= prepared.state_dict().keys()
    assert all("quantizer" in key for key in prepared.state_dict().keys() - plain.state_dict().keys())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("zero_points", [False, True])
def test_weights_without_step_sizes_are_refused(strict, zero_points):
    """Those of the weights that were there before would go on, which torch leaves to whoever asks what was missing."""
    policy = {"weight": {"bits": 4, "symmetric": not zero_points}}
    model, before = prepare(Net(), policy), prepare(nn.Linear(6, 4), policy)
    for other, name in ((model, "conv"), (before, "")):
        plain = {key: value + 1 for key, value in other.state_dict().items() if "quantizer" not in key}
        with pytest.raises(StateError, match=f"'{name}' has step sizes that fit .* before qat.prepare"):
            other.load_state_dict(plain, strict=strict)
    model.load_state_dict({"fc.bias": torch.zeros_like(model.fc.bias)}, strict=False)  # no weight: nothing is wrong
    assert not model.fc.bias.any()


def test_inputs_step_sizes_do_not_go_on_with_other_weights():
    model = prepare(Net(), {"activation": {"bits": 8}})
    plain = Net().state_dict()
    model.load_state_dict(plain, strict=False)  # waits for calibration
    qat.calibrate(model, [torch.randn(2, 3, 6, 6)], verbose=False)
    with pytest.raises(StateError, match="a weight without any"):
        model.load_state_dict(plain, strict=False)


def test_state_dict_round_trip_without_calibration():
    """A resumed run has the scales, the signs and the flag, in parameters that existed before."""
    trained = prepare(Net(), WITH_INPUTS)
    x = torch.randn(4, 3, 6, 6)
    qat.calibrate(trained, [x])
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.1)
    torch.manual_seed(1)
    resumed = prepare(Net(), WITH_INPUTS)
    identities = [id(parameter) for parameter in resumed.parameters()]
    resumed.load_state_dict(trained.state_dict())
    assert [id(parameter) for parameter in resumed.parameters()] == identities
    assert torch.equal(resumed.eval()(x), trained.eval()(x))
    assert torch.equal(qat.freeze(resumed)(x), qat.freeze(trained)(x))


def test_a_rule_that_matches_nothing():
    with pytest.raises(PolicyError, match=r"'haed' matched no layer.*did you mean 'head'"):
        prepare(Net(), QuantPolicy(weight=W4, rules=[{"match": "haed", "weight": None}]))
    deep = nn.Sequential(*(nn.Linear(8, 8) for _ in range(200)))
    with pytest.raises(PolicyError, match=r"\(known: 'Linear', '0', '1', .* and 171 more\)"):  # types first
        prepare(deep, QuantPolicy(weight=W4, rules=[{"match": "Embedding", "weight": W4}]))


@pytest.mark.parametrize("key", ["weight", "activation"])
def test_an_unsupported_layer_asked_for(key):
    model = nn.Sequential(nn.Linear(8, 8), nn.Bilinear(8, 8, 3))
    with pytest.raises(PolicyError, match=r"'1', a Bilinear: only Linear, Conv2d, Conv1D, Embedding, .* can be"):
        prepare(model, QuantPolicy(rules=[{"match": "1", key: {"bits": 8}}]))


def test_an_unsupported_layer_may_be_left_alone_by_a_rule():
    model = prepare(Net(), QuantPolicy(weight=W4, rules=[{"match": "embed", "weight": None}]))
    assert type(model.embed) is nn.Embedding


def test_tied_layers_with_different_specs():
    rules = [{"match": "b", "weight": {"bits": 8}}]
    with pytest.raises(LayerError, match=r"'b': its weight is tied to 'a', which gets another spec"):
        prepare(Tied(), QuantPolicy(weight=W4, rules=rules))


def test_a_weight_that_is_quantized_already():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(LayerError, match=r"'0': its weight is torch.uint8, not a float"):
        prepare(model)


def test_a_module_used_twice_is_one_layer():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    prepare(model, WITH_INPUTS)
    assert model[0] is model[2] and bits_of(model) == {"0": (4, 8)}
    qat.calibrate(model, [torch.randn(2, 8)])
    x = torch.randn(3, 8)
    expected = model(x)
    qat.freeze(model)
    assert model[0] is model[2] and torch.equal(model(x), expected)


def test_a_root_layer():
    layer = nn.Linear(8, 4)
    assert prepare(layer) is layer and type(layer) is QuantLinear
    x = torch.randn(2, 8)
    expected = layer(x)
    assert torch.equal(qat.freeze(layer)(x), expected)


def test_hooks_and_references_survive():
    model = Net()
    kept, calls = model.fc, []
    model.fc.register_forward_hook(lambda *_: calls.append("after"))
    model.fc.register_forward_pre_hook(lambda *_: calls.append("before"))
    prepare(model)
    assert model.fc is kept
    model(torch.randn(1, 3, 4, 4))
    qat.freeze(model)(torch.randn(1, 3, 4, 4))
    assert model.fc is kept and calls == ["before", "after"] * 2


def test_a_policy_of_nothing_changes_nothing(capsys):
    model = Net()
    names = list(model.state_dict())
    qat.prepare(model, QuantPolicy())
    assert list(model.state_dict()) == names and type(model.fc) is nn.Linear
    assert "0 of 4 layers" in capsys.readouterr().out


def test_meta_device():
    """A model without values can be prepared; it says so when it is used, and works once it is loaded."""
    trained = prepare(Net())
    with torch.device("meta"):
        model = Net()
    prepare(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(StateError, match="'conv' was never initialised"):
        model(torch.zeros(1, 3, 4, 4, device="meta"))
    model.load_state_dict(trained.state_dict(), assign=True)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model(x), trained(x))


def test_meta_device_then_to_empty():
    trained = prepare(Net(), WITH_INPUTS)
    qat.calibrate(trained, [torch.randn(2, 3, 4, 4)])
    with torch.device("meta"):
        model = Net()
    prepare(model, WITH_INPUTS).to_empty(device="cpu")
    for module in model.modules():
        if "initialised" in module._buffers:
            module.initialised = torch.tensor(True)  # as what to_empty finds in memory can be
    model.load_state_dict(Net().state_dict(), strict=False)
    with pytest.raises(StateError, match="never initialised"):
        model(torch.zeros(1, 3, 4, 4))
    model.load_state_dict(trained.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.eval()(x), trained.eval()(x))


def test_quantizers_live_where_the_weight_lives():
    with torch.device("meta"):
        layer = nn.Linear(8, 4)
    prepare(layer, WITH_INPUTS)
    assert isinstance(layer.activation_quantizer, ActivationLSQ)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


def test_weights_without_gradient_still_learn_their_step_size():
    model = Net()
    model.fc.weight.requires_grad_(False)
    prepare(model)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert model.fc.weight.grad is None and model.fc.weight_quantizer.step_size.grad is not None


@pytest.mark.parametrize("given", ["conv_w4a4", {"weight": {"bits": 4}, "activation": {"bits": 4}}])
def test_a_policy_as_a_name_or_fields(given):
    model = qat.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(2, 2)), given, verbose=False)
    assert model[1].weight_quantizer.spec.bits == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (qat.QuantSpec(bits=4), r"got QuantSpec: wrap it, QuantPolicy\(weight=spec\)"),
        (None, "expected a QuantPolicy, got NoneType"),
        ("conv_w4", "did you mean 'conv_w4a4'"),
        ({"wieght": {"bits": 4}}, "did you mean 'weight'"),
    ],
)
def test_what_is_no_policy(given, said):
    with pytest.raises(PolicyError, match=said):
        qat.prepare(nn.Linear(4, 2), given)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(value, dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(dtype)
    model[1].weight.data[1, 2] = value
    with pytest.raises(LayerError, match="'1': its weight holds NaN or infinity"):
        qat.prepare(model, {"weight": {"bits": 4}})


def test_a_model_without_a_layer_that_can_be_quantized():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3))
    with pytest.raises(
        LayerError, match=r"no layer that can be quantized .* with a rule .*Embedding, Conv1d\); .* are Conv1d"
    ):
        qat.prepare(model, {"weight": {"bits": 4}})
    qat.prepare(model, qat.QuantPolicy(), verbose=False)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("sizes", [(0, 8), (8, 0)], ids=str)
@pytest.mark.parametrize("spec", [{}, {"group_size": 8}, {"symmetric": False}, {"granularity": "tensor"}], ids=str)
def test_a_layer_without_a_single_weight_is_left_alone_and_said_to_be(sizes, spec, capsys, tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.ModuleDict({"full": nn.Linear(8, 8), "empty": nn.Linear(*sizes)})

    rules = [{"match": "@last", "weight": {"bits": 8}}]  # the last that can be quantized
    model = qat.prepare(net(), QuantPolicy(weight=spec, activation={"bits": 8}, rules=rules))
    assert row_of(capsys.readouterr().out, "empty")[-1] == "its weight is empty"
    assert model["full"].weight_quantizer.spec.bits == 8
    x, nothing = torch.randn(4, 8), torch.randn(4, sizes[0])
    qat.calibrate(model, [x], forward=lambda model, x: model["full"](x))
    expected = model["full"](x)
    qat.save(qat.freeze(model), tmp_path / "out")
    loaded = qat.load(tmp_path / "out", model=net())
    assert torch.equal(loaded["full"](x), expected)
    assert torch.equal(loaded["empty"](nothing), net()["empty"](nothing))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_is_left_alone_and_said_to_be_one(capsys):
    """Its forward may be its own; a policy with a rule for the first layer says so as well."""
    said = r"its layers with weights are Scaled \(a subclass of Linear\)"
    for policy in (POLICY, QuantPolicy(weight=W4, rules=[{"match": "@first", "weight": {"bits": 8}}])):
        with pytest.raises(LayerError, match=f"Sequential has no layer that can be quantized .*{said}"):
            prepare(nn.Sequential(Scaled(4, 4), nn.ReLU()), policy)
    with pytest.raises(PolicyError, match=r"'0', a Scaled \(a subclass of Linear\): only"):
        prepare(nn.Sequential(Scaled(4, 4), nn.Linear(4, 4)), {"rules": [{"match": "0", "weight": {"bits": 4}}]})
    qat.prepare(nn.Sequential(Scaled(4, 4), nn.Linear(4, 4)), {"weight": {"bits": 4}})
    assert row_of(capsys.readouterr().out, "0")[-1] == "Scaled (a subclass of Linear) stays in full precision"


def test_rules_that_leave_every_layer_out():
    """Training in full precision would look like training in 4 bits: what is left out, and why, is said at once."""

    class OwnLinear(nn.Linear):
        pass

    model = nn.Sequential(*(OwnLinear(4, 4) for _ in range(3)), nn.Linear(4, 2))
    policy = QuantPolicy(weight=QuantSpec(bits=4), rules=[{"match": "3", "weight": None}])
    said = r"'0', '1' and 1 more: OwnLinear \(a subclass of Linear\) stays in full precision; '3': rule match='3'\)"
    with pytest.raises(LayerError, match=f"quantizes no layer of Sequential .{said}: change its rules"):
        prepare(model, policy)
    assert prepare(model, QuantPolicy(rules=[{"match": "3", "weight": None}])) is model
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert prepare(plain, QuantPolicy(weight=QuantSpec(bits=4), rules=[{"match": "*", "weight": None}])) is plain
