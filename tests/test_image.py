"""Step sizes of an image that needs no gradient: float64's closed form, and no gradient of the image on the way."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from qat.kernels.convolution_sum import convolution_sum
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qat
from qat import QuantPolicy, backend, traced
from qat.errors import StateError
from qat.layers import product as products
from qat.numerics import stored_scale
from qat.quantizers import lsq_plus

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEARNED = "step_size", "offset"
INPUTS = {
    "lsq": {"bits": 8},
    "unsigned lsq": {"bits": 4, "signed": False},
    "lsq+": {"bits": 4, "symmetric": False},
    "pact": {"bits": 4},
}
LAYERS = {
    "stem": lambda: nn.Conv2d(3, 16, 7, stride=2, padding=3),
    "grey": lambda: nn.Conv2d(1, 8, 3, dilation=2),
    "four": lambda: nn.Conv2d(4, 8, (3, 1), padding=(0, 2), bias=False),
    "sound": lambda: nn.Conv1d(2, 8, 5, stride=3, padding=1),
    "volume": lambda: nn.Conv3d(3, 4, 2, padding=1),
}
RANGES = (1, 4), (1, 3), (0, 3), (1, 2), (0, 9)  # of taps, stride, padding, dilation, and what an image has more
SIZES = {"Conv1d": (90,), "Conv2d": (24, 18), "Conv3d": (6, 5, 7)}


class MadeGradients(TorchDispatchMode):
    """Keeps which gradients each backward of a convolution is asked for: of x, weight and bias; counts forwards."""

    def __enter__(self):
        self.masks, self.forwards = [], 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1]))
        self.forwards += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def prepared(name, kind, channels_last=False, weight_bits=8):
    """Return a layer whose step size clips and lies off the stored grid, and an image."""
    torch.manual_seed(0)
    plain = LAYERS[name]().to(DEVICE)
    x = torch.randn(2, plain.in_channels, *SIZES[type(plain).__name__], device=DEVICE)
    if channels_last:
        plain, x = plain.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    learned = {"activation_quantizer": "pact"} if kind == "pact" else {}
    rules = [{"match": "*", "weight": {"bits": weight_bits}, "activation": INPUTS[kind]}]
    layer = qat.prepare(plain, QuantPolicy(rules=rules, **learned), verbose=False)
    qat.calibrate(layer, [x])
    with torch.no_grad():
        for parameter in layer.activation_quantizer.parameters():
            parameter.mul_(0.6123)
    return layer, x


def learned_gradients(layer, x, grad, autocast=None):
    """Return the gradients of the input's step size and offset, as one tensor, and of the other parameters."""
    layer.zero_grad()
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = layer(x)
    y.backward(grad.to(y.dtype))
    learned = [parameter.grad for parameter in layer.activation_quantizer.parameters()]
    others = [parameter.grad for name, parameter in layer.named_parameters() if "activation" not in name]
    return torch.cat(learned).flatten(), others


def in_float64(layer, x, grad, dtype=torch.float32):
    """Return the terms of those gradients, (1 or 2, elements), by the papers; the weight is rounded to ``dtype``."""
    quantizer = layer.activation_quantizer
    rounding = quantizer.rounding(x)
    spec = rounding.grid
    scale = stored_scale(quantizer.step_size, spec).double()
    zero = 0
    if hasattr(quantizer, "offset"):
        zero = lsq_plus.zero_point(scale, quantizer.offset, spec).double()
    ratio, low, high = x.double() / scale.item(), -spec.q_n - zero, spec.q_p - zero
    inside, end = (ratio > low) & (ratio < high), ratio.clamp(low, high)
    slopes = [torch.where(inside, ratio.round() - ratio, end)]
    if type(quantizer).__name__ == "ActivationPACT":
        slopes = [torch.where(inside, 0.0, end)]
    elif hasattr(quantizer, "offset"):  # codes count from the lowest, which lies at the offset
        slopes = [torch.where(inside, ratio.round() - ratio, end - low), (~inside).double()]
    x = x.double().requires_grad_()
    weight = layer.weight_quantizer(layer.weight).detach().to(dtype).double()
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.dim() - 2]
    convolve(x, weight, None, layer.stride, layer.padding, layer.dilation).backward(grad.double())
    return torch.stack([(x.grad * slope).flatten() for slope in slopes]) * rounding.grad_scale


def gradient_of_the_output(layer, x):
    y = layer(x)
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_closed_form(monkeypatch, name, channels_last, kind):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if channels_last and LAYERS[name]().weight.dim() != 4:
        return
    layer, x = prepared(name, kind, channels_last)
    grad = gradient_of_the_output(layer, x)
    terms = in_float64(layer, x, grad)
    with MadeGradients() as made:
        found, others = learned_gradients(layer, x, grad)
    assert made.masks and not any(mask[0] for mask in made.masks)
    assert ((found - terms.sum(1)).abs() <= 1e-5 * terms.square().sum(1).sqrt()).all()
    with MadeGradients() as made:
        through, same = learned_gradients(layer, x.clone().requires_grad_(), grad)
    assert any(mask[0] for mask in made.masks)
    assert ((found - through).abs() <= 1e-5 * terms.square().sum(1).sqrt()).all()
    assert all(map(torch.equal, others, same))
    assert torch.equal(learned_gradients(layer, x, grad)[0], found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_under_autocast_it_is_no_further_from_float64_than_through_the_image(kind, dtype):
    """Root mean squares over gradients, against that of all terms together."""
    layer, x = prepared("stem", kind, channels_last=True)
    errors = []
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        x = torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator))
        grad = torch.randn(2, 16, 12, 9, generator=generator).to(x.device, dtype)
        terms = in_float64(layer, x, grad, dtype)
        images = x, x.clone().requires_grad_()
        found = [learned_gradients(layer, image, grad, dtype)[0] for image in images]
        errors.append((torch.stack(found) - terms.sum(1)) / terms.square().sum(1).sqrt())
    mine, through = torch.stack(errors).square().mean(0).sqrt()
    assert (mine <= 1.2 * through).all() and (mine < torch.finfo(dtype).eps / 3).all()


def test_float16_keeps_what_float16_gradients_keep():
    """Slopes of many bits times a large weight, which the network multiplies with small numbers, do not overflow."""
    layer, x = prepared("stem", "lsq")
    with torch.no_grad():
        for tensor, factor in ((layer.activation_quantizer.step_size, 2.0**-12), (layer.weight, 2.0**14)):
            tensor.mul_(factor)
        layer.weight_quantizer.step_size.mul_(2.0**14)
    x = x * 2.0**-8
    grad = gradient_of_the_output(layer, x).half() * 2.0**-3
    terms = in_float64(layer, x, grad, torch.float16)
    found, _ = learned_gradients(layer, x, grad, torch.float16)
    assert (found - terms.sum(1)).abs() <= 2e-3 * terms.square().sum(1).sqrt()


def test_a_backward_inside_autocast_stays_in_float32():
    layer, x = prepared("stem", "lsq")
    grad = gradient_of_the_output(layer, x)
    y = layer(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        y.backward(grad)
    found = layer.activation_quantizer.step_size.grad.clone().flatten()
    assert torch.equal(found, learned_gradients(layer, x, grad)[0])


@pytest.mark.parametrize("frozen", ["weight", "offset", "step_size", "activation", ""])
def test_what_is_frozen(frozen):
    layer, x = prepared("stem", "lsq+")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    grad = gradient_of_the_output(layer, x)
    expected = in_float64(layer, x, grad)
    y = layer(x)
    with MadeGradients() as made:
        y.backward(grad)
    learned = [parameter for parameter in layer.activation_quantizer.parameters() if parameter.requires_grad]
    assert not any(mask[0] for mask in made.masks) and made.forwards == len(learned)
    for parameter, terms in zip(layer.activation_quantizer.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (not parameter.requires_grad)
        if parameter.grad is not None:
            assert (parameter.grad - terms.sum()).abs() <= 1e-5 * terms.square().sum().sqrt()
    assert (layer.weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("kind", INPUTS)
def test_no_images_leave_a_gradient_of_0(kind):
    layer, x = prepared("stem", kind)
    learned, others = learned_gradients(layer, x[:0], layer(x[:0]))
    assert not any(grad.any() for grad in (learned, *others))


def test_the_meta_device_gives_shapes():
    layer, x = prepared("stem", "lsq")
    layer.to("meta")(x.to("meta")).sum().backward()
    assert layer.activation_quantizer.step_size.grad.shape == (1, 1)


def test_other_layers_are_left_alone():
    """More channels than an image has, and groups."""
    for layer in (nn.Conv2d(5, 6, 3), nn.Conv2d(4, 6, 3, groups=2)):
        x = torch.randn(2, layer.in_channels, 8, 8)
        qat.calibrate(qat.prepare(layer, QuantPolicy(weight={"bits": 4}, activation={"bits": 4}), verbose=False), [x])
        with MadeGradients() as made:
            layer(x).sum().backward()
        assert made.masks[0][0] and layer.activation_quantizer.step_size.grad is not None


@pytest.mark.parametrize("on_a_gpu", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_compiled(monkeypatch, kind, autocast, on_a_gpu):
    """One graph, the bits of eager, and no gradient of the image."""
    monkeypatch.setattr(products, "_input_gradient", None)
    if on_a_gpu:
        monkeypatch.setattr(traced, "takes", lambda x, rounding: False)
    layer, x = prepared("stem", kind, channels_last=True)
    grad = gradient_of_the_output(layer, x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    run = mock.Mock(wraps=compiled, zero_grad=layer.zero_grad, activation_quantizer=layer.activation_quantizer)
    run.named_parameters = layer.named_parameters
    found, others = learned_gradients(run, x, grad, autocast)
    expected, same = learned_gradients(layer, x, grad, autocast)
    assert torch.equal(found, expected) and all(map(torch.equal, others, same))


def test_no_second_derivatives():
    layer, x = prepared("stem", "lsq")
    step_size = layer.activation_quantizer.step_size
    (grad,) = torch.autograd.grad(layer(x).square().sum(), step_size, create_graph=True)
    with pytest.raises(StateError, match="no second derivatives"):
        grad.backward()


@pytest.mark.parametrize("kind", ["lsq", "unsigned lsq", "lsq+"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_make_the_slopes_of_the_reference(kind, dtype):
    """Every bit, in the layout of x."""
    layer, x = prepared("stem", kind, channels_last=True)
    rounding = layer.activation_quantizer.rounding(x)._replace(grad_scale=0.25)
    for image in (x.to(dtype), x.to(dtype).contiguous(), x.to(dtype)[:, :, 1:, ::2]):
        with mock.patch.object(backend, "fused", lambda *tensors: False):
            expected = rounding.slopes(image, (True, True))
        with mock.patch.object(backend, "fused", lambda *tensors: True):
            found = rounding.slopes(image, (True, True))
        assert len(found) == 2 and (found[1] is None) == (kind != "lsq+")
        for one, other in zip(found, expected, strict=True):
            if one is not None:
                assert one.dtype == torch.float32 and torch.equal(one, other) and one.shape == image.shape
        if image.numel() == x.numel():
            assert found[0].stride() == image.stride()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_kernels_give_the_gradient(autocast):
    """The whole way in them: with weights of 16 bits too, as near to float64 as in float32."""
    layer, x = prepared("stem", "lsq+", channels_last=True)
    grad = gradient_of_the_output(layer, x).to(autocast)
    terms = in_float64(layer, x, grad, autocast or torch.float32)
    with mock.patch.object(backend, "fused", lambda *tensors: True):
        found, _ = learned_gradients(layer, x, grad, autocast)
    assert ((found - terms.sum(1)).abs() <= 1e-5 * terms.square().sum(1).sqrt()).all()


@settings(max_examples=30)
@given(st.data())
def test_convolution_sum(data):
    """Any shape of one to three dimensions, in any layout, within float32's rounding of float64's sum."""
    dimensions = data.draw(st.integers(1, 3))
    sizes = [data.draw(st.lists(st.integers(*ends), min_size=dimensions, max_size=dimensions)) for ends in RANGES]
    taps, stride, padding, dilation, more = sizes
    images, channels, outputs = (data.draw(st.integers(1, most)) for most in (3, 4, 70))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    spans = [each * (count - 1) + 1 for each, count in zip(dilation, taps, strict=True)]
    shape = [max(1, span - 2 * room) + extra for span, room, extra in zip(spans, padding, more, strict=True)]
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x, weight = torch.randn(images, channels, *shape, device=DEVICE), torch.randn(outputs, channels, *taps)
    weight = weight.to(DEVICE, dtype)
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    y = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dimensions](x.double(), weight.double(), **how)
    grad = torch.randn(y.shape).to(DEVICE, dtype)
    if data.draw(st.booleans()):
        x, grad = (tensor.movedim(1, -1).contiguous().movedim(-1, 1) for tensor in (x, grad))
    terms = y * grad.double()
    bound = 2e-5 if dtype == torch.bfloat16 else 2e-6  # what two parts of 8 bits leave of x
    assert (convolution_sum(x, weight, grad, **how) - terms.sum()).abs() <= bound * x.abs().max() * terms.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype):
    """A ResNet's first layer: near float64, and the same bits on every run, eager and compiled."""
    layer, _ = prepared("stem", "lsq", channels_last=True)
    x = torch.randn(16, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    grad = torch.randn(16, 16, 112, 112, device="cuda").to(dtype, memory_format=torch.channels_last)
    terms = in_float64(layer, x, grad, dtype)
    found, _ = learned_gradients(layer, x, grad, dtype)
    assert (found - terms.sum(1)).abs() <= torch.finfo(dtype).eps * terms.square().sum(1).sqrt()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for run in (layer, layer, compiled, compiled):
        layer.zero_grad()
        with torch.autocast("cuda", dtype):
            y = run(x)
        y.backward(grad)
        assert torch.equal(layer.activation_quantizer.step_size.grad.flatten(), found)
