"""PACT and min-max against closed forms; and what every quantizer has to keep: the same bits in training and after.

``check_*`` takes the module under test, so that the mutants' tests can show that it fails on a wrong one.
"""

import copy

import pytest
import torch
from torch import nn

import qat
from qat.errors import LayerError, PolicyError
from qat.quantizers import minmax
from qat.quantizers import pact as pact_module
from qat.spec import Init, QuantSpec
from qat.training.optimization import parameter_groups

CPU = torch.device("cpu")
GRIDS = [
    {"activation_quantizer": "lsq", "activation": {"symmetric": False}},
    {"activation_quantizer": "pact"},
    {"activation_quantizer": "minmax"},
    {"activation_quantizer": "minmax", "activation": {"symmetric": False}},
    {"weight_quantizer": "minmax", "activation": None},
    {"weight_quantizer": "minmax", "weight": {"symmetric": False}, "activation": None},
    {"weight_quantizer": "minmax", "activation_quantizer": "pact"},
]


def policy(weight=None, activation=(), bits=4, **rest):
    inputs = None if activation is None else {"bits": bits, "granularity": "tensor", **dict(activation)}
    return qat.QuantPolicy(weight={"bits": bits, **(weight or {})}, activation=inputs, **rest)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.Linear(16, 4)
    )


def pact(bits, step_size, signed=False, module=pact_module):
    quantizer = module.ActivationPACT(
        QuantSpec(bits=bits, granularity="tensor", signed=signed), CPU, "layer", Init.minmax
    )
    quantizer.set_step_size(torch.tensor(step_size))
    return quantizer


def check_pact(module, bits=4):
    """y = clip(x, 0, a) rounded to a / (2^bits - 1); dy/dx = 1 below a and above 0; dy/da = 1 from a on."""
    levels = 2**bits - 1
    step = 0.0625
    bound = levels * step
    x = torch.linspace(-bound, 2 * bound, 97, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(97, dtype=torch.float64)
    quantizer = pact(bits, step, module=module)
    y = quantizer(x)
    (y * upstream).sum().backward()
    clipped = x.detach().clamp(0, bound)
    torch.testing.assert_close(y.detach(), (clipped / step).round() * step, rtol=0, atol=0)
    assert torch.equal(x.grad, upstream * ((x > 0) & (x < bound)))
    grad_bound = upstream[x.detach() >= bound].sum().item()
    assert quantizer.step_size.grad.item() == pytest.approx(grad_bound / levels, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pact_is_the_papers(bits):
    check_pact(pact_module, bits)


def check_signed_pact(module):
    """Clipped at both ends, which both move the step size: dy/ds = -q_n below, q_p above, over q_p^2."""
    quantizer = pact(4, 0.5, signed=True, module=module)
    x = torch.tensor([-9.0, -4.0, -1.3, 0.0, 2.2, 3.5, 8.0], requires_grad=True)
    y = quantizer(x)
    assert y.tolist() == [-4.0, -4.0, -1.5, 0.0, 2.0, 3.5, 3.5]
    y.backward(torch.tensor([1.0, 2, 4, 8, 16, 32, 64]))
    assert x.grad.tolist() == [0, 0, 4, 8, 16, 0, 0]
    assert quantizer.step_size.grad.item() == pytest.approx((-8 * 3 + 7 * 96) / 49)


def check_pacts_stored_scale(module):
    """A step size between two bf16 numbers: values and gradients are those of the one it is stored as."""
    results = []
    for step in (0.3515625, 0.3515625 * 1.001):
        quantizer, x = pact(4, 0.3515625, module=module), torch.linspace(-1, 7, 81).requires_grad_()
        with torch.no_grad():
            quantizer.step_size.fill_(step)
        x.data[0] = 15 * 0.3515625
        y = quantizer(x)
        y.sum().backward()
        results.append((y.detach(), x.grad, quantizer.step_size.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def check_pact_in_bf16(module):
    x, upstream = (torch.randn(64, 64) * 8).bfloat16(), torch.randn(64, 64).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        quantizer = pact(4, 0.5, module=module)
        quantizer(x.to(dtype)).backward(upstream.to(dtype))
        results.append(quantizer.step_size.grad)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def check_pact_of_nan(module):
    """What is no number lies on no side of the bound: it gets no gradient, and the bound is seen to learn nonsense."""
    quantizer, x = pact(4, 0.5, module=module), torch.tensor([float("nan"), 1.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0, 1] and quantizer.step_size.grad.isnan()


def check_pact_waits(module):
    quantizer = pact(4, 0.5, module=module)
    quantizer.enabled = False
    assert quantizer(x := torch.randn(5)) is x


@pytest.mark.parametrize(
    "check", [check_signed_pact, check_pacts_stored_scale, check_pact_in_bf16, check_pact_of_nan, check_pact_waits]
)
def test_pact_beyond_the_paper(check):
    check(pact_module)


def test_sgd_moves_pacts_bound_as_if_it_were_the_parameter():
    quantizer, rate, decay = pact(4, 0.25), 0.01, 0.1
    x = torch.tensor([1.0, 5.0, 7.0])  # the bound is 3.75: two are clipped
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=rate, weight_decay=decay)
    quantizer(x).sum().backward()
    optimizer.step()
    assert 15 * quantizer.step_size.item() == pytest.approx(3.75 - rate * (2 + decay * 3.75), rel=1e-5)


def test_only_pacts_bounds_decay():
    for kind, expected in (("pact", {"clipping_bounds"}), ("lsq", {"step_sizes"})):
        model = qat.prepare(network(), policy(activation_quantizer=kind), verbose=False)
        groups = {group["name"]: group for group in parameter_groups(model, 1.0, 0.1)}
        inputs = {id(layer.activation_quantizer.step_size) for layer in model if hasattr(layer, "activation_quantizer")}
        holders = {name for name, group in groups.items() if inputs & set(map(id, group["params"]))}
        assert holders == expected
        assert ("weight_decay" in groups[holders.pop()]) == (kind == "lsq")
        assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))


def check_minmax_weight(module, spec):
    weight = torch.randn(6, 16, requires_grad=True)
    quantizer = module.WeightMinMax(QuantSpec(bits=3, **spec), "layer")
    blocks = weight.detach().reshape(
        {"tensor": (1, 1, -1)}.get(spec.get("granularity"), (6, -1, spec.get("group_size", 16)))
    )
    step = (blocks.abs().amax(-1, keepdim=True) / 3).bfloat16().float()
    expected = ((blocks / step).round().clamp(-4, 3) * step).reshape(6, 16)
    y = quantizer(weight)
    assert torch.equal(y, expected + 0.0)
    y.backward(upstream := torch.randn(6, 16))
    assert torch.equal(weight.grad, upstream)
    assert torch.equal(quantizer.quantize(weight.detach()).dequantize(), y.detach())
    with pytest.raises(LayerError, match="NaN"):
        quantizer.quantize(torch.full((6, 16), torch.nan))
    quantizer.enabled = False
    assert quantizer(weight) is weight


def check_minmax_weights(module):
    for spec in ({}, {"group_size": 8}, {"granularity": "tensor"}):
        check_minmax_weight(module, spec)


def check_asymmetric_minmax_weight(module):
    """Codes 0 to 15 span the values and 0, shifted by 8, in steps of bf16; what is frozen is what is trained."""
    weight = torch.tensor([[0.5, 2.0, 3.75, 1.0], [-1.0, 2.0, 2.75, 0.25]])
    quantizer = module.WeightMinMax(QuantSpec(bits=4, symmetric=False, signed=None), "layer")
    tensor = quantizer.quantize(weight)
    assert tensor.scale.flatten().tolist() == [0.25, 0.25] and tensor.zero_point.flatten().tolist() == [-8, -4]
    assert tensor.codes.tolist() == [[-6, 0, 7, -4], [-8, 4, 7, -3]]
    assert torch.equal(quantizer(weight), weight) and torch.equal(tensor.dequantize(), weight)


def check_signed_minmax_weight(module):
    """A weight's grid is signed, whatever the spec says."""
    weight = torch.tensor([[-3.0, 1.0]])
    quantizer = module.WeightMinMax(QuantSpec(bits=3, signed=False), "layer")
    assert torch.equal(quantizer(weight), weight) and quantizer.spec.signed is True


@pytest.mark.parametrize("check", [check_minmax_weights, check_asymmetric_minmax_weight, check_signed_minmax_weight])
def test_a_minmax_weight_follows_its_range_and_passes_gradients(check):
    check(minmax)


def check_minmax_input(module):
    quantizer = module.ActivationMinMax(QuantSpec(bits=8, granularity="tensor", signed=True), CPU, "layer")
    quantizer.set_step_size(torch.tensor(1.0))
    assert not list(quantizer.parameters()) and "step_size" in quantizer.state_dict()
    quantizer.eval()(torch.tensor([254.0]))
    assert quantizer.step_size.item() == 1
    quantizer.train()(torch.tensor([-254.0, 3.0]))
    assert quantizer.step_size.item() == pytest.approx(0.99 + 0.01 * 2)
    quantizer(torch.zeros(0))
    assert quantizer.step_size.item() == pytest.approx(0.99 * 1.01)
    quantizer.enabled = False
    assert quantizer(x := torch.tensor([254.0])) is x
    assert quantizer.step_size.item() == pytest.approx(0.99 * 1.01)


def check_unsigned_minmax_input(module):
    """Its range is that of the positive values alone, and a batch is rounded with the step size that it has moved."""
    quantizer = module.ActivationMinMax(QuantSpec(bits=8, granularity="tensor", signed=False), CPU, "layer")
    quantizer.set_step_size(torch.tensor(1.0))
    y = quantizer.train()(torch.tensor([-5100.0, 510.0]))
    assert quantizer.step_size.item() == pytest.approx(0.99 + 0.01 * 2)
    scale = torch.tensor(1.01).bfloat16().item()
    assert y.tolist() == [0.0, pytest.approx(255 * scale)]


def check_minmax_input_with_an_offset(module):
    quantizer = module.ActivationRange(QuantSpec(bits=8, granularity="tensor", symmetric=False), CPU, "layer")
    quantizer.set_range(torch.tensor([[-1.0]]), torch.tensor([[3.0]]))
    quantizer.train()(torch.tensor([1.0, 7.0]))
    assert quantizer.offset.item() == pytest.approx(-0.99)
    assert quantizer.step_size.item() == pytest.approx((0.99 * 4 + 0.01 * 7) / 255)
    assert not list(quantizer.parameters()) and {"step_size", "offset"} <= quantizer.state_dict().keys()


@pytest.mark.parametrize(
    "check",
    [check_minmax_input, check_unsigned_minmax_input, check_minmax_input_with_an_offset],
    ids=lambda f: f.__name__,
)
def test_a_minmax_input_follows_the_average_range_in_training_only(check):
    check(minmax)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_that_runs_twice_before_its_backward_has_each_time_s_gradient(symmetric):
    """As one that stands twice in a model does, or one that sees both inputs of a comparison."""
    torch.manual_seed(0)
    inputs = {"bits": 4, "granularity": "tensor", "symmetric": symmetric}
    net = nn.Sequential(nn.Linear(8, 4))
    qat.prepare(net, qat.QuantPolicy(activation=inputs, activation_quantizer="minmax"), verbose=False)
    first, second = torch.randn(5, 8, requires_grad=True), (2 * torch.randn(5, 8)).requires_grad_()
    qat.calibrate(net, [first])
    total, rounded = 0, 0
    for x in (first, second):
        total = total + net.train()(x).sum()
        rounded = rounded + copy.deepcopy(net[0].activation_quantizer).eval()(x).sum(0)
    total.backward()
    torch.testing.assert_close(net[0].weight.grad, rounded.detach().expand(4, 8), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", GRIDS, ids=str)
def test_training_frozen_and_loaded_agree_to_the_bit(kind, bits, tmp_path):
    """After steps of training, in float32 and bf16, and through a checkpoint."""
    model = qat.prepare(network(), policy(bits=bits, **kind), verbose=False)
    batch = torch.randn(8, 3, 6, 6)
    qat.calibrate(model, [batch])
    optimizer = torch.optim.SGD(parameter_groups(model, 0.05, 0.1), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(batch).square().mean().backward()
        optimizer.step()
    again = qat.prepare(network(), policy(bits=bits, **kind), verbose=False)
    again.load_state_dict(model.state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        trained, x = copy.deepcopy(model).to(dtype).eval(), batch.to(dtype)
        weights = {
            name: layer.weight_quantizer(layer.weight)
            for name, layer in trained.named_children()
            if hasattr(layer, "weight_quantizer")
        }
        expected = trained(x)
        assert torch.equal(copy.deepcopy(again).to(dtype).eval()(x), expected)
        codes = qat.quantized_tensors(trained)
        for name, weight in weights.items():
            assert torch.equal(codes[name].dequantize(dtype), weight)
        frozen = qat.freeze(trained)
        found = {name: tensor.codes for name, tensor in qat.quantized_tensors(frozen).items()}
        assert all(torch.equal(found[name], codes[name].codes) for name in codes)
        if dtype == torch.float32:  # in bf16 a CPU's int4 operator sums in another order
            assert torch.equal(frozen(x), expected)
            qat.save(frozen, tmp_path / "out")
            assert torch.equal(qat.load(tmp_path / "out", model=network())(x), expected)


@pytest.mark.parametrize("kind", GRIDS, ids=str)
def test_compiled_training_has_the_same_bits(kind):
    batch = torch.randn(4, 3, 6, 6)
    eager = qat.prepare(network(), policy(**kind), verbose=False)
    qat.calibrate(eager, [batch])
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    run = torch.compile(compiled.train(), fullgraph=True, backend="aot_eager")
    results = [run(batch), eager.train()(batch)]
    assert torch.equal(*results)
    for result in results:
        result.square().mean().backward()
    for (name, mine), other in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert torch.equal(mine, other), name
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_a_delayed_start_passes_tensors_through():
    model = qat.prepare(network(), policy(weight_quantizer="minmax", activation_quantizer="pact"), verbose=False)
    for layer in (model[0], model[3]):
        layer.weight_quantizer.enabled = layer.activation_quantizer.enabled = False
    model[4].weight_quantizer.enabled = model[4].activation_quantizer.enabled = False
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(model(x), network()(x))


def test_the_summary_names_them(capsys):
    qat.prepare(network(), policy(weight_quantizer="minmax", activation_quantizer="pact"))
    assert "with ActivationPACT, WeightMinMax, in torch's operators" in capsys.readouterr().out


def test_embeddings_follow_the_range_of_all_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8))
    rule = {"match": "Embedding", "weight": {"bits": 4, "granularity": "tensor"}}
    qat.prepare(model, qat.QuantPolicy(rules=[rule], weight_quantizer="minmax"), verbose=False)
    expected = model(torch.tensor([[1, 2], [3, 1]]))
    assert torch.equal(expected, model[0].weight_quantizer(model[0].weight)[torch.tensor([[1, 2], [3, 1]])])
    assert torch.equal(qat.freeze(model)(torch.tensor([[1, 2], [3, 1]])), expected)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(PolicyError, match="PACT learns no offset"):
        policy(activation={"symmetric": False}, activation_quantizer="pact")
    with pytest.raises(PolicyError, match="init=gptq sets step sizes, which weight_quantizer=minmax"):
        policy(weight_quantizer="minmax", init="gptq")
    with pytest.raises(qat.QATError, match=r"weight_quantizer='lsqq'.*did you mean 'lsq'"):
        policy(weight_quantizer="lsqq")


def test_a_policy_survives_json_and_older_ones_are_read():
    made = policy(weight_quantizer="minmax", activation_quantizer="pact")
    assert qat.QuantPolicy.from_dict(made.to_dict()) == made
    older = {key: value for key, value in made.to_dict().items() if not key.endswith("_quantizer")}
    assert qat.QuantPolicy.from_dict(older) == policy()
