"""calibrate: step sizes of inputs from several batches, the same on every rank, once.

``check_*`` takes the module under test, so that the mutants' tests can show that it fails on a wrong one.
"""

import math

import pytest
import torch
from ranks import answers
from torch import nn

import qat.calibration
from qat import QuantPolicy, QuantSpec
from qat.errors import StateError

POLICY = QuantPolicy(weight=QuantSpec(bits=2), activation={"bits": 4})


class Net(nn.Module):
    """Two linears, the second behind a ReLU, and one that only some batches reach."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 4)
        self.rare = nn.Linear(4, 4)

    def forward(self, x, rare=True):
        x = self.second(torch.relu(self.norm(self.first(x))))
        return self.rare(x) if rare else x


def prepared(policy=POLICY):
    return qat.prepare(Net(), policy, verbose=False)


def batches():
    return [torch.randn(size, 6) + 0.3 for size in (2, 5, 3)]


def step_sizes(model):
    return {name: p.item() for name, p in model.named_parameters() if "activation_quantizer" in name}


def check_closed_form(calibration):
    """2 <|x|> / sqrt(Q_P) over all elements of all batches, of inputs that only weights were quantized for."""
    model, data = prepared(), batches()
    plain = {name: tensor.dequantize() for name, tensor in qat.quantized_tensors(model).items()}
    calibration.calibrate(model, data)
    hidden = [x @ plain["first"].T + model.first.bias for x in data]
    hidden = [torch.relu(h / math.sqrt(1 + 1e-5)) for h in hidden]  # a fresh BatchNorm in eval mode
    third = [h @ plain["second"].T + model.second.bias for h in hidden]
    for layer, inputs, highest in ((model.first, data, 7), (model.second, hidden, 15), (model.rare, third, 7)):
        values = torch.cat([x.detach().flatten() for x in inputs]).double()
        expected = 2 * values.abs().mean().item() / math.sqrt(highest)
        assert layer.activation_quantizer.step_size.item() == pytest.approx(expected, rel=1e-5)
        assert layer.activation_quantizer.spec.signed is (highest == 7)


def check_only_once(calibration):
    """A calibrated model, or one loaded from a checkpoint, keeps its scales."""
    model = prepared()
    calibration.calibrate(model, batches())
    resumed = prepared()
    resumed.load_state_dict(model.state_dict())
    for kept in (model, resumed):
        before = step_sizes(kept)
        with torch.no_grad():
            kept.first.activation_quantizer.step_size.mul_(3)
        calibration.calibrate(kept, [100 * batch for batch in batches()])
        assert step_sizes(kept) == {
            **before,
            "first.activation_quantizer.step_size": pytest.approx(3 * before["first.activation_quantizer.step_size"]),
        }


def check_model_is_left_as_it_was(calibration):
    """Modes, running statistics, gradients and parameters' identities."""
    model = prepared().train()
    model.second.eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: b.clone() for name, b in model.named_buffers() if "norm" in name}
    identities = [id(parameter) for parameter in model.parameters()]
    seen = []
    model.norm.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    assert calibration.calibrate(model, batches()) is model
    assert seen == [(False, False)] * 3
    assert [module.training for module in model.modules()] == modes
    assert [id(parameter) for parameter in model.parameters()] == identities
    for name, buffer in buffers.items():
        assert torch.equal(model.get_buffer(name), buffer)
    assert all(parameter.grad is None for parameter in model.parameters())


def check_never_reached(calibration):
    model = prepared()
    with pytest.raises(StateError, match="'rare' was never reached"):
        calibration.calibrate(model, batches(), lambda module, batch: module(batch, rare=False))
    assert not any(each.is_initialised for each in calibration.activation_quantizers(model))  # it starts anew, whole


def check_nan(calibration):
    data = batches()
    data[1][0, 0] = math.nan
    with pytest.raises(StateError, match="'first' saw NaN or infinity"):
        calibration.calibrate(prepared(), data)


def check_after_an_error(calibration):
    """Nothing goes on observing, and modes are back."""
    model = prepared().train()
    with pytest.raises(RuntimeError):
        calibration.calibrate(model, [torch.randn(2, 6), torch.randn(2, 5)])
    assert all(module.training for module in model.modules())
    with pytest.raises(StateError, match="never initialised"):
        model(torch.randn(2, 6))
    calibration.calibrate(model, batches())
    assert model(torch.randn(2, 6)).isfinite().all()


def test_closed_form():
    check_closed_form(qat.calibration)


def test_only_once():
    check_only_once(qat.calibration)


def test_the_model_is_left_as_it_was():
    check_model_is_left_as_it_was(qat.calibration)


def test_a_layer_that_no_batch_reaches():
    check_never_reached(qat.calibration)


def test_nan():
    check_nan(qat.calibration)


def test_after_an_error():
    check_after_an_error(qat.calibration)


@pytest.mark.parametrize("none", [[], iter(())])
def test_no_batches(none):
    with pytest.raises(StateError, match="got no batch"):
        qat.calibrate(prepared(), none)


def test_what_a_batch_may_be():
    """A tensor, a tuple whose first member is the input, or anything with a forward of one's own."""
    data, expected = batches(), prepared()
    state = expected.state_dict()
    qat.calibrate(expected, data)
    ways = [
        ([(batch, "label") for batch in data], None),
        ([[batch, "label"] for batch in data], None),
        ((batch for batch in data), None),
        ([{"x": batch} for batch in data], lambda model, batch: model(**batch)),
    ]
    for given, forward in ways:
        model = prepared()
        model.load_state_dict(state)
        qat.calibrate(model, given, forward)
        assert step_sizes(model) == step_sizes(expected)


def test_a_layer_reached_by_some_batches():
    model = prepared()
    calls = iter([False, True, False])
    qat.calibrate(model, batches(), lambda module, batch: module(batch, rare=next(calls)))
    assert model.rare.activation_quantizer.is_initialised


def test_nothing_to_calibrate_runs_no_batch():
    def batches_nobody_reads():
        raise AssertionError("read")
        yield

    model = prepared(QuantPolicy(weight=QuantSpec()))
    assert qat.calibrate(model, batches_nobody_reads()) is model


def test_delayed_quantizers_are_calibrated_too():
    model = prepared()
    model.first.activation_quantizer.enabled = False
    qat.calibrate(model, batches())
    assert model.first.activation_quantizer.is_initialised


def test_bf16_models():
    model = prepared().bfloat16()
    data = [batch.bfloat16() for batch in batches()]
    qat.calibrate(model, data)
    values = torch.cat(data).double()
    quantizer = model.first.activation_quantizer
    assert quantizer.step_size.dtype == torch.float32
    assert quantizer.step_size.item() == pytest.approx(2 * values.abs().mean().item() / math.sqrt(7), rel=1e-6)


RANK = """
def run(data):
    torch.manual_seed(0)
    model = qat.prepare(torch.nn.Linear(4, 4), qat.QuantPolicy(activation={"bits": 4}), verbose=False)
    try:
        qat.calibrate(model, [torch.tensor(batch) for batch in data])
    except qat.QATError as error:
        return str(error)
    quantizer = model.activation_quantizer
    return quantizer.step_size.item(), quantizer.spec.signed, bool(quantizer.signed)
nan = float("nan")
answer = [
    run([[[1., 2., 3., 4.]], [[0., 0., 5., 6.]]] if rank == 0 else [[[-0.5, 0., 0., 0.5]]]),
    run([[[1., 2., 3., 4.]]] if rank == 0 else []),
    run([[[1., 2., 3., 4.]]] if rank == 0 else [[[nan, 2., 3., 4.]]]),
    run([]),
]
"""


def test_ranks_start_from_the_same_scale(tmp_path):
    """Batches, signs, and an absent or bad batch on one rank: both ranks come to the same answer, and none waits."""
    one, other = answers(RANK, tmp_path)
    assert one == other
    assert one[0] == [pytest.approx(2 * (22 / 12) / math.sqrt(7)), True, True]
    assert one[1] == [pytest.approx(2 * (10 / 4) / math.sqrt(15)), False, False]
    assert "saw NaN" in one[2] and "got no batch" in one[3]


def test_a_model_that_is_not_prepared_is_said():
    with pytest.raises(StateError, match="nothing to calibrate"):
        qat.calibrate(torch.nn.Linear(4, 4), [torch.randn(2, 4)])


@pytest.mark.parametrize("wrong", [torch.randn(4, 8), {"input": torch.randn(4, 8)}, None], ids=type)
def test_what_are_no_batches(wrong):
    """A tensor would be taken apart into its rows, a dict into its keys."""
    model = qat.prepare(nn.Linear(8, 4), qat.QuantPolicy(activation={"bits": 8}), verbose=False)
    with pytest.raises(StateError, match="give a list or a loader"):
        qat.calibrate(model, wrong)


def test_a_dict_that_the_model_does_not_take_is_said_with_how_to_give_it():
    model = qat.prepare(nn.Linear(8, 4), qat.QuantPolicy(activation={"bits": 8}), verbose=False)
    with pytest.raises(StateError, match=r"does not take a dict .*forward=lambda model, batch: model\(\*\*batch\)"):
        qat.calibrate(model, [{"input": torch.randn(4, 8)}])
    qat.calibrate(model, [{"input": torch.randn(4, 8)}], forward=lambda model, batch: model(**batch))


def test_a_model_of_several_inputs_is_told_how_to_run_a_batch():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, a, b):
            return self.linear(a + b)

    class Named(Two):
        def forward(self, *, a, b):
            return self.linear(a + b)

    a, b = torch.randn(2, 4, 8)
    policy = qat.QuantPolicy(weight=qat.QuantSpec(bits=4), activation=qat.QuantSpec(bits=8, granularity="tensor"))
    for build, batch, what, how in (
        (Two, (a, b), "the first of 2 tensors alone", "*batch"),
        (Two, ((a, b), torch.zeros(4)), "a tuple", "*batch[0]"),
        (Two, {"a": a, "b": b}, "a dict", "**batch"),
        (Two, ({"a": a, "b": b}, torch.zeros(4)), "a dict", "**batch[0]"),
        (Two, [a, b, torch.zeros(4)], "the first of 3 tensors alone", "*batch[:-1]"),
        (Named, (a, b), "the first of 2 tensors alone", "a=batch[0], b=batch[1]"),
    ):
        model = qat.prepare(build(), policy, verbose=False)
        with pytest.raises(StateError) as error:
            qat.calibrate(model, [batch])
        assert f"the model does not take {what} (" in str(error.value)
        said = str(error.value).split("such as forward=")[1]
        assert said == f"lambda model, batch: model({how})"
        qat.calibrate(model, [batch], forward=eval(said))
        assert not qat.check(model, batch, eval(said))


@pytest.mark.parametrize("quantizer", ["lsq", "minmax"])
def test_a_half_precision_model_under_autocast_of_another_dtype(quantizer):
    """As an fp16 checkpoint in a bf16-mixed run: torch.stack takes no fp16 under bf16 autocast on a CPU."""
    policy = QuantPolicy(weight=QuantSpec(), activation={"bits": 4}, activation_quantizer=quantizer)
    model, x = qat.prepare(nn.Sequential(nn.Linear(6, 4).half()), policy, verbose=False), torch.randn(8, 6).half()
    with torch.autocast("cpu", torch.bfloat16):
        qat.calibrate(model, [x])
        y = model.train()(x)
    y.sum().backward()
    largest = x.abs().max().float() / 7
    expected = largest if quantizer == "minmax" else 2 * x.double().abs().mean() / math.sqrt(7)
    torch.testing.assert_close(model[0].activation_quantizer.step_size.item(), expected.item(), rtol=1e-6, atol=0)
    assert y.dtype == torch.bfloat16 and model[0].weight.grad.isfinite().all()


def test_every_layer_that_is_not_reached_is_named():
    """Only the first was: one more run over the data for each."""
    policy = QuantPolicy(activation=QuantSpec(bits=8, granularity="tensor"))
    model = qat.prepare(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), policy, verbose=False)
    with pytest.raises(StateError, match="'0', '2' were never reached during calibration: use batches that run them"):
        qat.calibrate(model, [torch.randn(2, 4)], lambda layers, x: layers[1](x))
    assert not any(each.is_initialised for each in qat.calibration.activation_quantizers(model))
