"""Frozen layers whose products are of integers: what was trained, when they are, and what the summary says."""

import copy

import pytest
import torch
from int4_problems import DEVICE
from int8_problems import integers_of
from torch import nn

import qat
from qat.backend import set_batch_invariant, set_int8_products
from qat.spec import QuantSpec


@pytest.fixture(autouse=True)
def restored():
    """Leave the rules as they were."""
    yield
    set_int8_products(None)
    set_batch_invariant(False)


def frozen(activation, group_size=64, dtype=torch.float32, **weight):
    """Return a fake-quant layer that has seen data, its frozen twin, and inputs."""
    layer = nn.Sequential(nn.Linear(128, 48)).to(dtype)
    spec = QuantSpec(group_size=group_size, **weight)
    model = qat.prepare(layer, qat.QuantPolicy(weight=spec, activation=activation), verbose=False)
    x = torch.randn(5, 128).to(dtype)
    if isinstance(activation, dict) and activation.get("signed") is False:
        x = x.abs()
    qat.calibrate(model, [x])
    shipped = qat.freeze(copy.deepcopy(model))
    if DEVICE == "cpu":
        shipped[0].packed_weight.prepack()
    return model.to(DEVICE), shipped.to(DEVICE) if DEVICE != "cpu" else shipped, x.to(DEVICE)


def runs_in_integers(monkeypatch):
    """Return a list that grows with each product of integers."""
    calls, run = [], torch.ops.qat.int8_linear
    monkeypatch.setattr(torch.ops.qat, "int8_linear", lambda *arguments: calls.append(arguments) or run(*arguments))
    return calls


ACTIVATIONS = {
    "int8 a token": "int8_token",
    "int8": {"bits": 8, "granularity": "tensor"},
    "uint8": {"bits": 8, "granularity": "tensor", "signed": False},
    "int4": {"bits": 4, "granularity": "tensor"},
    "uint4": {"bits": 4, "granularity": "tensor", "signed": False},
    "int8 with an offset": {"bits": 8, "granularity": "tensor", "symmetric": False},
}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_frozen_layer_computes_what_was_trained(activation, symmetric, monkeypatch):
    """The integers of the training forward: in float32, where it rounds nothing else, its outputs too."""
    trained, shipped, x = frozen(ACTIVATIONS[activation], symmetric=symmetric)
    expected = trained(x)
    with torch.no_grad():
        before = shipped(x)
        calls = runs_in_integers(monkeypatch)
        set_int8_products(5)
        after = shipped(x)
        assert len(calls) == 1 and shipped(x[:4]).shape == (4, 48) and len(calls) == 1
    largest = expected.abs().max()
    assert (before - expected).abs().max() <= 1e-5 * largest and (after - expected).abs().max() <= 1e-5 * largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_integers_are_nearer_to_what_was_trained(dtype):
    _, shipped, x = frozen("int8_token", dtype=dtype)
    layer = shipped[0]
    tensor = layer.packed_weight.quantized_tensor()
    weight = tensor.codes.double() * tensor.scale.double().repeat_interleave(64, 1)
    integers, step = integers_of(x, "token")
    exact = integers @ weight.to(x.device).T * step + layer.bias.double()
    with torch.no_grad():
        rounded = (shipped(x).double() - exact).square().mean()
        set_int8_products(1)
        in_integers = (shipped(x).double() - exact).square().mean()
    assert in_integers < rounded < 2.0**-10 * exact.square().mean()


def test_where_layers_keep_their_present_path(monkeypatch):
    calls = runs_in_integers(monkeypatch)
    _, shipped, x = frozen("int8_token")
    with torch.no_grad():
        shipped(x)
        set_int8_products(6)
        shipped(x)
        set_int8_products(1)
        set_batch_invariant(True)
        shipped(x)
        set_batch_invariant(False)
        shipped[0].activation_quantizer.enabled = False
        shipped(x)
        for other in (frozen("q8_0"), frozen("int8_token", group_size=32), frozen(None)):
            other[1](other[2])
        shipped[0].activation_quantizer.enabled = True
    shipped(x.clone().requires_grad_()).sum().backward()
    assert not calls
    shipped[0].bias.requires_grad_(False)
    shipped(x)
    assert len(calls) == 1


@pytest.mark.parametrize("activation", ["int8_token", {"bits": 8, "granularity": "tensor", "signed": False}], ids=str)
def test_a_compiled_model_is_one_graph(activation):
    """For each choice, and another when it changes."""
    torch._dynamo.reset()
    _, shipped, x = frozen(activation, dtype=torch.bfloat16)
    compiled = torch.compile(shipped, fullgraph=True, backend="aot_eager")
    outputs = []
    with torch.no_grad():
        for tokens in (5, None):
            set_int8_products(tokens)
            outputs.append(shipped(x))
            assert torch.equal(compiled(x), outputs[-1])
    assert not torch.equal(*outputs)


def test_the_summary_says_which_layers_multiply_integers():
    def lines(model):
        return [
            line for line in qat.summary(model).splitlines() if "multiply integers" in line or line.startswith("  not")
        ]

    fits, halves, blocks, wide = (
        frozen(*arguments, **options)[1]
        for arguments, options in (
            (("int8_token",), {}),
            (("int8_token", 32), {}),
            (("q8_0",), {}),
            (("int8_token",), {"bits": 8}),
        )
    )
    model = nn.Sequential(fits[0], nn.ReLU(), halves[0], blocks[0], wide[0])
    assert not lines(model)
    set_int8_products(64)
    assert lines(model) == [
        "from 64 tokens on, 1 of 4 layers with int8 inputs multiply integers",
        "  not 2: groups of 32: a multiple of 64 would",
        "  not 3: q8_0 has a scale for each 32 inputs",
        "  not 4: its weight is int8 g64",
    ]
    assert not lines(frozen(None)[1])


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU it is laid out by itself")
def test_the_summary_of_a_model_that_is_on_a_cpu():
    set_int8_products(64)
    model = qat.freeze(
        qat.prepare(
            nn.Sequential(nn.Linear(64, 32)), qat.QuantPolicy(weight=QuantSpec(), activation="int8_token"), False
        )
    )
    text = qat.summary(model)
    assert "0 of 1 layers" in text and "not 0: its weight is not on a GPU with Triton" in text


def test_autocast_and_moves(monkeypatch):
    """Codes come from x as it arrives; the result has autocast's dtype; sums follow the weight to another state."""
    _, shipped, x = frozen("int8_token")
    _, other, _ = frozen("int8_token")
    shipped[0].bias.data = shipped[0].bias.data.bfloat16().float()  # as autocast rounds it
    set_int8_products(1)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        y = shipped(x)
    with torch.no_grad():
        assert y.dtype == torch.bfloat16 and torch.equal(y, shipped(x).bfloat16())
        other.load_state_dict(shipped.state_dict())
        if DEVICE == "cpu":
            assert other[0].packed_weight.row_sums is None  # as the kernels' order is undone
            other[0].packed_weight.prepack()
        calls = runs_in_integers(monkeypatch)
        assert torch.equal(other(x), shipped(x)) and len(calls) == 2
