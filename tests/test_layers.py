"""Fake-quant layers and their frozen twins: one set of integers, one dequantized weight, one output.

``check_*`` takes the modules under test, so that the mutants' tests can show that it fails on a wrong one.
"""

import pytest
import torch
import torch.nn.functional as F
from frozen_linears import DTYPES, frozen_linear, random_tensor, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qat.layers.conv
import qat.layers.linear
import qat.layers.packed
import qat.numerics
from qat import QuantPolicy, QuantSpec
from qat.errors import LayerError, QATError

WEIGHT_DTYPES = st.sampled_from(DTYPES)


GRANULARITY = st.sampled_from(["tensor", "channel", "group"])


def prepare(layer, spec, activation=None):
    return qat.prepare(layer, QuantPolicy(weight=spec, activation=activation), verbose=False)


def move_off_the_grid(layer):
    """Scale the step sizes as training would, so that rounding them to bf16 matters."""
    with torch.no_grad():
        layer.weight_quantizer.step_size.mul_(torch.rand_like(layer.weight_quantizer.step_size) * 0.5 + 0.75)


def assert_frozen_is_trained(layer, x):
    """Codes, dequantized weights in three dtypes and, on a CPU in fp32, outputs: all bit for bit."""
    move_off_the_grid(layer)
    trained = layer.weight_quantizer(layer.weight)
    assert trained.dtype == layer.weight.dtype
    tensor, spec = layer.weight_quantizer.quantize(layer.weight), layer.weight_quantizer.spec
    expected = layer(x) if x.dtype == layer.weight.dtype == torch.float32 else None
    weights = {}
    for dtype in DTYPES:  # a weight cast to dtype trains with the codes it is cast to
        cast = layer.weight.detach().to(dtype)
        weights[dtype] = qat.numerics.fake_quantize(cast, layer.weight_quantizer.step_size, spec)
        assert same_bits(weights[dtype], layer.weight_quantizer.quantize(cast).dequantize(dtype))
    qat.freeze(layer)
    assert torch.equal(layer.packed_weight.codes(), tensor.codes)
    assert same_bits(layer.packed_weight.dequantize(trained.dtype), trained)
    for dtype in DTYPES:
        assert same_bits(layer.packed_weight.dequantize(dtype), tensor.dequantize(dtype))
    row_bytes = -(-tensor.codes[0].numel() * spec.bits // 8)
    assert layer.packed_weight.packed.shape == (tensor.codes.shape[0], row_bytes)
    if expected is not None:
        assert torch.equal(layer(x), expected)


@given(
    bits=st.integers(2, 8),
    granularity=GRANULARITY,
    group=st.sampled_from([1, 2, 5, 16, 32]),
    groups=st.integers(1, 4),
    rows=st.integers(1, 33),
    bias=st.booleans(),
    dtype=WEIGHT_DTYPES,
    batch=st.sampled_from([(3,), (2, 3), ()]),
    seed=st.integers(0, 2**31),
)
def test_linear(bits, granularity, group, groups, rows, bias, dtype, batch, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(group * groups, rows, bias=bias, dtype=dtype)
    spec = QuantSpec(bits=bits, granularity=granularity, group_size=group if granularity == "group" else None)
    assert_frozen_is_trained(prepare(layer, spec), torch.randn(*batch, group * groups, dtype=dtype))


@given(
    bits=st.integers(2, 8),
    granularity=GRANULARITY,
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.sampled_from([1, 3, (3, 2)]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, (2, 1), "same"]),
    padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    dtype=WEIGHT_DTYPES,
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_conv(
    bits, granularity, groups, kernel, stride, dilation, padding, padding_mode, bias, dtype, channels_last, seed
):
    torch.manual_seed(seed)
    layer = nn.Conv2d(
        8,
        4,
        kernel,
        stride=1 if padding == "same" else stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        padding_mode=padding_mode,
        dtype=dtype,
    )
    x = torch.randn(2, 8, 9, 8, dtype=dtype)
    if channels_last:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    size = 8 // groups if granularity == "group" else None  # one input channel's weights, or several positions
    assert_frozen_is_trained(prepare(layer, QuantSpec(bits=bits, granularity=granularity, group_size=size)), x)


def check_linear_forward(linear):
    """Input, weight and bias through the plain operator; without quantizers, the plain layer."""
    layer = prepare(nn.Linear(12, 5), QuantSpec(bits=3), {"bits": 4})
    x = torch.randn(4, 12)
    qat.calibrate(layer, [x])
    layer.__class__ = linear.QuantLinear
    inputs, weight = layer.activation_quantizer(x), layer.weight_quantizer(layer.weight)
    assert not torch.equal(inputs, x)
    assert torch.equal(layer(x), F.linear(inputs, weight, layer.bias))
    layer.weight_quantizer = layer.activation_quantizer = None
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def check_conv_forward(conv):
    layer = prepare(nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), QuantSpec(bits=3), {"bits": 4})
    x = torch.randn(2, 4, 8, 8)
    qat.calibrate(layer, [x])
    layer.__class__ = conv.QuantConv2d
    inputs, weight = layer.activation_quantizer(x), layer.weight_quantizer(layer.weight)
    assert torch.equal(layer(x), F.conv2d(inputs, weight, layer.bias, 2, 1, 2, 2))
    layer.weight_quantizer = layer.activation_quantizer = None
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, 2, 1, 2, 2))


def check_frozen_forward(linear, conv):
    """The frozen input quantizer runs too, and the bias is added."""
    for plain, frozen, x in (
        (nn.Linear(12, 5), linear.FrozenLinear, torch.randn(4, 12)),
        (nn.Conv2d(12, 5, 3), conv.FrozenConv2d, torch.randn(2, 12, 5, 5)),
    ):
        layer = qat.calibrate(prepare(plain, QuantSpec(bits=3), {"bits": 3}), [x])
        with torch.no_grad():
            layer.bias.add_(1)
        expected = layer(x)
        qat.freeze(layer)
        layer.__class__ = frozen
        assert torch.equal(layer(x), expected)


def check_identity(linear, packed):
    """x = I gives the dequantized weight in the compute dtype; bf16 runs in torch's own int4 operator."""
    for bits, group in ((4, 32), (4, 64), (4, 16), (3, 32), (8, 32)):
        tensor = random_tensor(bits=bits, group=group)
        layer = frozen_linear(tensor, bias=False, linear=linear, packed=packed)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            product = layer(torch.eye(64, dtype=dtype))
            assert product.dtype == dtype
            assert torch.equal(product, tensor.dequantize(dtype).T)
        assert (layer.packed_weight.cpu_operands is not None) == (bits == 4 and group >= 32)


def check_autocast(linear, conv):
    """Under bf16 autocast the frozen weight is the one that training multiplied by, and so are output and dtype."""
    for plain, frozen, x in (
        (nn.Linear(48, 24), linear.FrozenLinear, torch.randn(3, 48)),
        (nn.Conv2d(4, 6, 3), conv.FrozenConv2d, torch.randn(2, 4, 5, 5)),
    ):
        layer = prepare(plain, QuantSpec(bits=4))
        move_off_the_grid(layer)
        with torch.autocast("cpu", torch.bfloat16):
            trained = layer.weight_quantizer(layer.weight).to(torch.bfloat16)
            expected = layer(x)
            qat.freeze(layer)
            layer.__class__ = frozen
            assert torch.equal(layer.packed_weight.dequantize(torch.bfloat16), trained)
            out = layer(x)
        assert out.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(out, expected)


def test_linear_forward():
    check_linear_forward(qat.layers.linear)


def test_conv_forward():
    check_conv_forward(qat.layers.conv)


def test_frozen_forward():
    check_frozen_forward(qat.layers.linear, qat.layers.conv)


def test_identity_gives_the_dequantized_weight():
    check_identity(qat.layers.linear, qat.layers.packed)


def test_autocast():
    check_autocast(qat.layers.linear, qat.layers.conv)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_frozen_linear_takes_any_compute_dtype(dtype):
    """A frozen model has no dtype of its own: it computes in that of its input; an int4 layer passes gradients."""
    layer = frozen_linear(random_tensor())
    x = torch.randn(2, 64, dtype=dtype, requires_grad=True)
    out = layer(x)
    assert out.dtype == dtype
    out.sum().backward()
    expected = layer.packed_weight.dequantize(dtype).sum(0)
    torch.testing.assert_close(x.grad, expected.expand(2, 64), rtol=0.02, atol=0.05)


def test_empty_batches():
    for layer in (frozen_linear(random_tensor()), frozen_linear(random_tensor(bits=3))):
        for dtype in DTYPES:
            assert layer(torch.zeros(0, 64, dtype=dtype)).shape == (0, 32)
            assert layer(torch.zeros(0, 7, 64, dtype=dtype)).shape == (0, 7, 32)


def test_autocast_trains_in_fp32():
    """Scale and weight get fp32 gradients under autocast, close to those without it."""
    layer = prepare(nn.Linear(64, 32), QuantSpec(bits=4))
    x = torch.randn(8, 64)
    grads = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layer(x).float().square().mean().backward()
        grads.append((layer.weight.grad.clone(), layer.weight_quantizer.step_size.grad.clone()))
    for plain, mixed in zip(*grads, strict=True):
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed, plain, rtol=0.05, atol=0.02 * plain.abs().max().item())


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_has_no_graph_break(autocast):
    """The compiled training step: one graph, the eager output, the eager gradients."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4))
    policy = QuantPolicy(
        weight=QuantSpec(group_size=1), activation={"bits": 8}, rules=[{"match": "Conv2d", "weight": {}}]
    )
    x = torch.randn(2, 3, 4, 4)
    qat.calibrate(qat.prepare(model, policy, verbose=False), [x])
    torch._dynamo.reset()
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(x)
        out.float().square().sum().backward()
        results.append([out.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def compiled_weights(device):
    """Return (compiled, eager) fake-quantized weights for step sizes off the bf16 grid, per granularity and dtype."""
    pairs = []
    for spec in (QuantSpec(group_size=32), QuantSpec(), QuantSpec(granularity="tensor")):
        for dtype in DTYPES:
            torch._dynamo.reset()
            layer = prepare(nn.Linear(256, 512, dtype=dtype, device=device), spec)
            move_off_the_grid(layer)
            compiled = torch.compile(layer.weight_quantizer, fullgraph=True)(layer.weight)
            pairs.append((compiled.detach(), layer.weight_quantizer(layer.weight).detach()))
    return pairs


@pytest.mark.slow
def test_inductor_trains_with_the_shipped_weight():
    for compiled, eager in compiled_weights("cpu"):
        assert torch.equal(compiled, eager)


@pytest.mark.gpu
def test_inductor_trains_with_the_shipped_weight_on_a_gpu():
    """Inductor's own Triton code would divide approximately and drop fp32 -> bf16 -> fp32 casts."""
    for compiled, eager in compiled_weights("cuda"):
        assert torch.equal(compiled, eager)


def halve_slice(weight):
    weight[2:4] /= 2


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.data[0].zero_(),
        lambda weight: weight.copy_(torch.zeros(8, 32)),
        lambda weight: weight.__setitem__(0, 1.0),
        nn.init.normal_,
        halve_slice,
    ],
)
def test_a_change_in_place_of_a_frozen_weight_is_refused(change):
    """It would change a copy, and the codes would stay as they are."""
    layer = qat.freeze(prepare(nn.Sequential(nn.Linear(32, 8)), QuantSpec()))[0]
    with torch.no_grad(), pytest.raises(QATError, match="a change of it would be lost"):
        change(layer.weight)
    for copy in (layer.weight.clone(), layer.weight.detach(), layer.weight[torch.tensor([0, 1])]):
        assert type(copy.mul_(2)) is torch.Tensor
    assert not layer.weight.requires_grad_(False).requires_grad


@pytest.mark.parametrize("layer", [nn.Linear(32, 8), nn.Conv2d(4, 8, 3)])
def test_a_frozen_weight_can_be_looked_at_and_not_assigned(layer):
    """As peft does: what it added would be lost."""
    model = prepare(nn.Sequential(layer), QuantSpec())
    expected = model[0].weight_quantizer(model[0].weight).detach()
    weight = qat.freeze(model)[0].weight
    assert torch.equal(weight, expected) and weight.dtype == torch.float32
    assert type(weight + 0) is torch.Tensor
    with pytest.raises(QATError, match="frozen"):
        model[0].weight.data += 1
    assert torch.equal(model[0].weight, expected) and "0.weight" not in model.state_dict()


def test_a_frozen_layer_without_codes_keeps_its_parameter():
    layer = nn.Linear(32, 8)
    weight = layer.weight
    model = prepare(nn.Sequential(layer), None, QuantSpec(granularity="tensor"))
    qat.freeze(qat.calibrate(model, [torch.randn(4, 32)]))
    assert model[0].weight is weight and "0.weight" in model.state_dict()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_frozen_linear_on_gpu(dtype):
    layer = frozen_linear(random_tensor((256, 512), group=128))
    state = layer.state_dict()
    dense = layer.packed_weight.dequantize(dtype)
    layer.cuda()
    assert layer.packed_weight.packed.numel() == 0  # the codes lie in the kernels' order now
    assert same_bits(layer.packed_weight.dequantize(dtype).cpu(), dense)
    assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in layer.state_dict().items())
    x = torch.randn(5, 512, device="cuda", dtype=dtype)
    expected = F.linear(x.double(), dense.cuda().double(), layer.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-2, atol=1e-2)
    assert layer.cpu().packed_weight.packed.numel() == 256 * 256


def test_an_input_of_another_dtype_is_refused_with_both_shapes():
    layer = qat.prepare(nn.Sequential(nn.Linear(8, 4)), qat.QuantPolicy(weight=qat.QuantSpec(4)), verbose=False)
    said = r"input, \[3, 8\], is torch.uint8, and its weight, \[4, 8\], torch.float32: cast one of them"
    with pytest.raises(LayerError, match=said):
        layer(torch.ones(3, 8, dtype=torch.uint8))


class Named(nn.Module):
    """Calls its layers as torch names their inputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.linear = nn.Linear(8, 16)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.up = nn.ConvTranspose2d(3, 1, 2, stride=2)

    def forward(self, tokens):
        x = self.linear(input=self.embed(input=tokens)).view(-1, 1, 4, 4)
        return self.up(input=self.conv(input=x), output_size=(9, 9))


@pytest.mark.parametrize("init", ["lsq", "gptq"])
def test_inputs_may_be_given_by_their_name(init):
    rules = [{"match": "Embedding", "weight": {"bits": 8}}, {"match": "up", "weight": None}]
    policy = qat.QuantPolicy(weight={"bits": 4}, activation={"bits": 8}, rules=rules, init=init)
    model = qat.prepare(Named(), policy, verbose=False)
    tokens = torch.arange(8)
    qat.calibrate(model, [tokens], verbose=False)
    assert not qat.check(model, tokens)
    expected = model.eval()(tokens)
    assert expected.shape == (8, 1, 9, 9)
    assert torch.equal(qat.freeze(model)(tokens), expected)
