"""Convolutions of 1, 2 and 3 dimensions, transposed ones too: codes, gradients, frozen twins, artifacts and ONNX."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qat
from qat import formats, starting
from qat.errors import ArtifactError, LayerError
from qat.frozen_model import from_model
from qat.layers import FAKE_QUANT, FROZEN, matrix
from qat.layers.conv_transpose import other_side_first
from qat.numerics import scale_shape

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NEW = tuple(kind for kind in KINDS if kind is not nn.Conv2d)
FUNCTIONS = dict(
    zip(KINDS, (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), strict=True)
)


def dimensions(kind):
    return int(kind.__name__[-2])


def image(kind, channels=4, batch=2, size=6):
    return torch.randn(batch, channels, *[size] * dimensions(kind))


def policy_of(spec, activation=None):
    """Rules, since Conv1d is quantized only by one."""
    rule = {"match": "*", "weight": spec} | ({} if activation is None else {"activation": activation})
    return qat.QuantPolicy(rules=[rule])


@given(groups=st.sampled_from([1, 2, 3]), outputs=st.integers(1, 4), inputs=st.integers(1, 4), seed=st.integers(0, 99))
def test_other_side_first_by_its_definition(groups, outputs, inputs, seed):
    """Output channel o of group g meets input channel i of that group."""
    weight = torch.randn(groups * inputs, outputs, 2, 3, generator=torch.Generator().manual_seed(seed))
    turned = other_side_first(weight, groups)
    assert turned.shape == (groups * outputs, inputs, 2, 3)
    for g in range(groups):
        for o in range(outputs):
            for i in range(inputs):
                assert torch.equal(turned[g * outputs + o, i], weight[g * inputs + i, o])
    assert torch.equal(other_side_first(turned, groups), weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("grid", [{}, {"group_size": 2}, {"granularity": "tensor"}])
def test_the_forward_is_that_of_the_rounded_weight_and_input(kind, groups, grid):
    """With LSQ's arithmetic written out: one scale an output channel, also where torch stores inputs first."""
    torch.manual_seed(0)
    plain = kind(4, 6, 2, stride=2, padding=1, dilation=2, groups=groups)
    layer = qat.prepare(copy.deepcopy(plain), policy_of({"bits": 3, **grid}, {"bits": 4}), verbose=False)
    assert type(layer) is FAKE_QUANT[kind]
    x = image(kind)
    qat.calibrate(layer, [x])
    weight = matrix(plain).detach()
    assert weight.shape[:2] == (6, 4 // groups)
    rows, columns = scale_shape(weight.shape, layer.weight_quantizer.spec)
    step = layer.weight_quantizer.step_size.detach().to(torch.bfloat16).float()
    assert step.shape == (rows, columns) and rows == (1 if grid.get("granularity") else 6)
    blocks = weight.reshape(rows, columns, -1)
    rounded = ((blocks / step[..., None]).round().clamp(-4, 3) * step[..., None]).reshape(weight.shape)
    x_step = layer.activation_quantizer.step_size.detach().to(torch.bfloat16).float()
    codes = (x / x_step).round().clamp(-8, 7) * x_step
    transposed = "Transpose" in kind.__name__
    rest = (0, groups, 2) if transposed else (2, groups)
    stored = other_side_first(rounded, groups) if transposed else rounded
    expected = FUNCTIONS[kind](codes, stored, plain.bias, 2, 1, *rest)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    tensors = qat.quantized_tensors(layer)[""]
    assert torch.equal(tensors.dequantize(torch.float32), rounded)


@pytest.mark.parametrize("kind", NEW)
def test_gradients_are_those_of_single_operators(kind):
    """Straight-through inside the range, and LSQ's for the step size, by autograd on LSQ's formula."""
    torch.manual_seed(0)
    layer = qat.prepare(kind(4, 6, 2, stride=2), policy_of({"bits": 3}), verbose=False)
    x = image(kind).requires_grad_()
    layer(x).square().sum().backward()
    found = x.grad, layer.weight.grad, layer.bias.grad, layer.weight_quantizer.step_size.grad
    weight, bias = (part.detach().clone().requires_grad_() for part in (layer.weight, layer.bias))
    other, step = x.detach().clone().requires_grad_(), layer.weight_quantizer.step_size.detach().clone()
    step.requires_grad_()
    stored = step + (step.to(torch.bfloat16).float() - step).detach()
    w = other_side_first(weight, 1) if "Transpose" in kind.__name__ else weight
    factor = 1 / (w[0].numel() * 3) ** 0.5
    scaled = (stored * factor + (stored - stored * factor).detach()).reshape(-1, *[1] * (w.dim() - 1))
    ratio = (w / scaled).clamp(-4, 3)
    rounded = (ratio + (ratio.round() - ratio).detach()) * scaled
    rounded = other_side_first(rounded, 1) if "Transpose" in kind.__name__ else rounded
    FUNCTIONS[kind](other, rounded, bias, 2).square().sum().backward()
    for mine, theirs in zip(found, (other.grad, weight.grad, bias.grad, step.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [{}, {"group_size": 2}])
def test_frozen_twins_give_the_same_bits(kind, dtype, grid, tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(kind(4, 6, 2, stride=2, groups=2), nn.ReLU(), kind(6, 4, 3, bias=False)).to(dtype)

    model = qat.prepare(build(), policy_of({"bits": 4, **grid}, {"bits": 8}), verbose=False)
    x = image(kind, size=9).to(dtype)
    qat.calibrate(model, [x])
    with torch.no_grad():
        expected = model.eval()(x)
        qat.freeze(model)
        assert type(model[0]) is FROZEN[kind] and torch.equal(model(x), expected)
        qat.save(model, tmp_path)
        loaded = qat.load(tmp_path, model=build())
        assert torch.equal(loaded(x), expected)
        started = build()
        starting.fill(started, formats.read(tmp_path))
    for name, tensor in qat.quantized_tensors(loaded).items():
        assert torch.equal(matrix(started.get_submodule(name)), tensor.dequantize(dtype))


@pytest.mark.parametrize("kind", NEW)
def test_autocast_and_compile(kind):
    model = qat.prepare(kind(4, 6, 3), policy_of({"bits": 4}, {"bits": 8}), verbose=False)
    x = image(kind)
    qat.calibrate(model, [x])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(x), model(x), rtol=0, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = model(x)
            assert expected.dtype == torch.bfloat16
            assert torch.equal(qat.freeze(model)(x), expected)


def test_an_output_size_can_be_asked_for():
    plain = nn.ConvTranspose2d(4, 6, 3, stride=2)
    layer = qat.prepare(copy.deepcopy(plain), policy_of({"bits": 8}), verbose=False)
    x = image(nn.Conv2d)
    assert layer(x, output_size=[14, 14]).shape == plain(x, output_size=[14, 14]).shape
    assert qat.freeze(layer)(x, output_size=[14, 14]).shape == (2, 6, 14, 14)


def test_what_gets_quantized_by_default(capsys):
    """A Conv1d by its own rule only: models with state spaces hold one whose weight they read without calling it."""
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3), nn.Flatten(), nn.Linear(4, 4))
    qat.prepare(copy.deepcopy(model), {"weight": {"bits": 4}})
    assert "Conv1d stays in full precision without a rule of its own" in capsys.readouterr().out
    for rules, quantized in (([], {"1", "3"}), ([{"match": "Conv1d", "weight": {"bits": 8}}], {"0", "1", "3"})):
        prepared = qat.prepare(copy.deepcopy(model), {"weight": {"bits": 4}, "rules": rules}, verbose=False)
        assert qat.quantized_tensors(prepared).keys() == quantized


@pytest.mark.parametrize("kind", NEW)
def test_what_such_layers_cannot_do_is_said(kind, tmp_path):
    rules = [{"match": "0", "weight": {"bits": 4}}]
    with pytest.raises(LayerError, match=rf"init=gptq does not know {kind.__name__} layers \('0'\): use init=mse"):
        qat.prepare(nn.Sequential(kind(4, 4, 3)), qat.QuantPolicy(rules=rules, init="gptq"))
    dynamic = [{"match": "0", "weight": {"bits": 4}, "activation": "int8_token"}]
    with pytest.raises(LayerError, match=rf"int8_token is for linear layers, not for a {kind.__name__}"):
        qat.prepare(nn.Sequential(kind(4, 4, 3)), qat.QuantPolicy(rules=dynamic))
    model = from_model(qat.freeze(qat.prepare(nn.Sequential(kind(4, 4, 3)), policy_of({"bits": 4}), verbose=False)))
    model.example = {"shape": [4, *[6] * dimensions(kind)], "dtype": "float32", "low": 0, "high": 1}
    with pytest.raises(ArtifactError, match=rf"'0' is a {kind.__name__}, .*--to onnx holds it"):
        formats.module("executorch").write(model, tmp_path)


class Decoder(nn.Module):
    """Down and up again, as a U-Net; groups and an output padding."""

    def __init__(self, kind, up):
        super().__init__()
        self.down = kind(3, 8, 3, stride=2, padding=1)
        self.up = up(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.out = up(6, 5, 2, bias=False)

    def forward(self, x):
        x = torch.relu(self.up(torch.relu(self.down(x))))
        x = self.out(x)
        return x.mean(tuple(range(2, x.dim())))


@pytest.mark.clients
@pytest.mark.parametrize(
    ("bits", "activation_bits", "grid"),
    [(4, 4, {}), (4, 8, {"granularity": "tensor"}), (8, 8, {"granularity": "tensor"}), (4, None, {"group_size": 3})],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_onnx_holds_them(place, bits, activation_bits, grid, tmp_path):
    for client in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(client)
    kind, up = KINDS[place], KINDS[place + 3]
    activation = None if activation_bits is None else {"bits": activation_bits}
    torch.manual_seed(0)
    model = qat.prepare(Decoder(kind, up), policy_of({"bits": bits, **grid}, activation), verbose=False)
    example = {"shape": [3, *[8] * (place + 1)], "dtype": "float32", "low": -1, "high": 1}
    onnx = formats.module("onnx")
    qat.calibrate(model, [onnx.random_input(example, 8)])
    model = from_model(qat.freeze(model))
    model.example = example
    onnx.write(model, tmp_path, Decoder(kind, up))
    rows = dict(onnx.verify(tmp_path, model, Decoder(kind, up)))
    assert rows["onnxruntime, weights"].startswith("3 layers equal q*s in every bit")
    assert rows["onnxruntime, outputs"].endswith("argmax equal in 100.00%")
