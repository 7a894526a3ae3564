"""Fused fake quantization against qat.numerics: on CPU through Triton's interpreter; ``-m gpu`` compiles for CUDA."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qat.kernels import fake_quant

import qat.numerics
from qat import QuantSpec, backend
from qat.numerics import fake_quantize_gradients, fake_quantized, scale_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALE_DTYPES = ["bfloat16", "float16", "float32"]
GPU_GRIDS = [
    ((4096, 4096), {"group_size": 128}),
    ((2112, 704), {"group_size": 32}),
    ((4097, 1001), {"granularity": "channel"}),
    ((64, 30000), {"granularity": "channel"}),
    ((2048, 8192), {"granularity": "tensor"}),
    ((32, 64, 56, 56), {"granularity": "tensor"}),
]


def same_bits(one, other):
    """Return whether two tensors have the same dtype, strides and bits; one NaN is like another."""
    one, other = one.cpu(), other.cpu()
    integers = {2: torch.int16, 4: torch.int32}[one.element_size()]
    differ = (one.view(integers) != other.view(integers)) & ~(one.isnan() & other.isnan())
    return one.dtype == other.dtype and one.stride() == other.stride() and not differ.any()


def edge_ratios(spec):
    """Return ratios x / s on ties, on the bounds and beside them, and values that are no number."""
    low, high = -spec.q_n, spec.q_p
    near = [
        value * (1 + sign * 2.0**-e) for value in (low, high, 0.5, 1.5, 2.5) for sign in (1, -1) for e in (8, 11, 24)
    ]
    ties = [value + 0.5 for value in range(low - 1, high + 1)]
    far = [low - 1, high + 1, -1e30, 1e30, math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, -1e-40, low, high]
    return torch.tensor(near + ties + far, dtype=torch.float64)


def inputs(shape, spec, dtype, finite=False, device=DEVICE):
    """Return x (half random, half edge cases), a step size off the stored grid, and a gradient."""
    step_size = torch.rand(scale_shape(shape, spec), device=device) * 0.2 + 0.01
    step_size.view(-1)[::7] *= 1e-7  # below the smallest scale
    stored = qat.numerics.stored_scale(step_size, spec).double()
    ratio = torch.randn(shape, device=device, dtype=torch.float64) * spec.q_p / 1.5
    edges = edge_ratios(spec).to(device)
    if finite:
        edges = edges[edges.abs() < 1e6]
    picked = edges[torch.randint(len(edges), shape, device=device)]
    ratio = torch.where(torch.rand(shape, device=device) < 0.5, picked, ratio)
    x = (ratio.view(*stored.shape, -1) * stored[..., None]).view(shape).to(dtype)
    return x, step_size, torch.randn(shape, device=device).to(dtype)


def assert_like_the_reference(x, step_size, grad, spec, grad_scale=0.37, wanted=(True, True)):
    """Compare values and masks bit for bit, and the step size's gradient with float64 within 1e-5."""
    y = fake_quant.fake_quantized(x, step_size, spec)
    assert same_bits(y, fake_quantized(x, step_size, spec))
    got = fake_quant.fake_quantize_gradients(grad, x, step_size, spec, grad_scale, wanted)
    expected = fake_quantize_gradients(grad, x, step_size, spec, grad_scale, wanted)
    assert [g is None for g in got] == [e is None for e in expected]
    if wanted[0]:
        assert same_bits(got[0].contiguous(), expected[0].contiguous())
        assert got[0].stride() == y.stride()
    if wanted[1]:
        assert got[1].dtype == step_size.dtype and got[1].shape == step_size.shape
        assert_close_to_float64(got[1], grad, x, step_size, spec, grad_scale)
        if DEVICE == "cuda":
            again = fake_quant.fake_quantize_gradients(grad, x, step_size, spec, grad_scale, wanted)[1]
            assert same_bits(got[1], again)
    for dtype in (None, torch.bfloat16, torch.float32):
        owned = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        y, grad_x, grad_step = fake_quant.requantize_(owned, x, step_size, spec, grad_scale, wanted, dtype)
        assert y is None if dtype is None else same_bits(y, fake_quantized(x, step_size, spec, dtype))
        assert grad_x is got[0] is None or same_bits(grad_x.contiguous(), got[0].contiguous())
        if wanted[1]:  # another kernel, whose sum may have another order
            assert_close_to_float64(grad_step, grad, x, step_size, spec, grad_scale)


def assert_close_to_float64(grad_step, grad, x, step_size, spec, grad_scale):
    """Compare with float64 sums, within 1e-5 of the sum of the terms' magnitudes, and be NaN where it is NaN."""
    stored = qat.numerics.stored_scale(step_size, spec).double().to(step_size.dtype)
    sums = []
    for values in (grad.double(), grad.double().abs()):
        ratio = (x.float().reshape(*step_size.shape, -1) / stored.float()[..., None]).double()
        inside = (ratio > -spec.q_n) & (ratio < spec.q_p)
        slope = ratio.clamp(-spec.q_n, spec.q_p).round() - ratio.masked_fill(~inside, 0)
        terms = values.reshape(slope.shape) * (slope if not sums else slope.abs())
        sums.append(terms.sum(-1) * grad_scale)
    exact, magnitude = sums
    assert torch.equal(grad_step.isnan(), exact.isnan())
    error = (grad_step.double() - exact).abs()
    assert (error <= 1e-5 * magnitude)[~exact.isnan()].all()


def test_the_reference_runs_on_a_cpu_and_in_float64():
    x = torch.zeros(2, 2)
    assert not backend.fused(x)
    assert qat.numerics.arithmetic(x, x) is qat.numerics
    assert not backend.fused(torch.zeros(2, device=DEVICE, dtype=torch.float64))
    assert backend.path(torch.device("cpu")).startswith("the torch reference on cpu")
    assert backend.path(torch.device("cuda", 0)) == "fused Triton kernels on cuda:0"


def test_without_triton_everything_is_the_reference(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert "without Triton" in backend.path(torch.device("cuda", 0))
    assert not backend.fused(torch.zeros(2, device=DEVICE))


GRIDS = [
    ((4, 32), {"granularity": "tensor"}),
    ((3, 5, 7), {"granularity": "tensor"}),
    ((1, 8193), {"granularity": "tensor"}),
    ((6, 40), {"granularity": "channel"}),
    ((1, 33), {"granularity": "channel"}),
    ((5, 3, 3, 3), {"granularity": "channel"}),
    ((3, 4100), {"granularity": "channel"}),
    ((4, 64), {"group_size": 32}),
    ((37, 96), {"group_size": 8}),
    ((5, 21), {"group_size": 7}),
    ((2, 8, 3, 3), {"group_size": 24}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "grid"), GRIDS, ids=str)
def test_grid(shape, grid, dtype):
    spec = QuantSpec(bits=4, **grid)
    for finite in (True, False):
        assert_like_the_reference(*inputs(shape, spec, dtype, finite), spec)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_bits_and_signs(bits, signed, scale_dtype):
    """Each of them with each dtype, but not each pair of them."""
    dtype = DTYPES[(bits + signed + SCALE_DTYPES.index(scale_dtype)) % 3]
    spec = QuantSpec(bits=bits, granularity="tensor", signed=signed, scale_dtype=scale_dtype)
    assert_like_the_reference(*inputs((3, 400), spec, dtype), spec)


@settings(max_examples=25)
@given(
    st.integers(0, 2**31),
    st.integers(2, 8),
    st.sampled_from(["tensor", "channel", "group"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.sampled_from(SCALE_DTYPES),
)
def test_any_shape(seed, bits, granularity, lead, last, dtype, scale_dtype):
    torch.manual_seed(seed)
    spec = QuantSpec(bits, granularity, last if granularity == "group" else None, scale_dtype=scale_dtype)
    assert_like_the_reference(*inputs((*lead, last), spec, dtype), spec)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_asked_for(wanted):
    for grid in ({"granularity": "tensor"}, {"group_size": 8}):
        spec = QuantSpec(**grid)
        assert_like_the_reference(*inputs((4, 16), spec, torch.float32), spec, wanted=wanted)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_layouts(granularity):
    """Any layout, with a gradient of another one."""
    spec = QuantSpec(granularity=granularity, group_size=9 if granularity == "group" else None)
    x, step_size, grad = inputs((4, 6, 3, 3), spec, torch.bfloat16)
    wide = torch.cat([x, x], -1)
    for laid_out in (x.to(memory_format=torch.channels_last), wide[..., :3], x.transpose(2, 3), x.transpose(0, 1)):
        if laid_out.shape == x.shape:
            grads = grad, grad.to(memory_format=torch.channels_last), grad.transpose(2, 3)
            for laid_out_grad in grads:
                assert_like_the_reference(laid_out, step_size, laid_out_grad, spec)


def test_partial_sums_of_one_step_size(monkeypatch):
    """More tiles than programs: each walks several, and a second kernel adds up what they found."""
    monkeypatch.setattr(fake_quant, "PARTIAL_SUMS", 6)
    uncached = fake_quant._backward_launches.__wrapped__  # launches of another limit are kept, and outlive the test
    monkeypatch.setattr(fake_quant, "_backward_launches", uncached)
    for shape, granularity in (((5, 9000), "tensor"), ((2, 20000), "channel"), ((9, 9000), "channel")):
        spec = QuantSpec(granularity=granularity)
        assert_like_the_reference(*inputs(shape, spec, torch.bfloat16, finite=True), spec)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty(shape):
    x, step_size = torch.zeros(shape, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    spec = QuantSpec(granularity="tensor")
    assert fake_quant.fake_quantized(x, step_size, spec).shape == shape
    grad_x, grad_step = fake_quant.fake_quantize_gradients(x, x, step_size, spec, 1.0)
    assert grad_x.shape == shape and grad_step.item() == 0.0


@pytest.mark.parametrize("step", [math.nan, math.inf, -1.0, 0.0])
def test_broken_step_sizes(step):
    """As the reference: NaN stays visible, and anything below the smallest scale is that scale."""
    spec = QuantSpec(granularity="tensor")
    x, _, grad = inputs((4, 16), spec, torch.float32)
    step_size = torch.full((1, 1), step, device=DEVICE)
    assert same_bits(fake_quant.fake_quantized(x, step_size, spec), fake_quantized(x, step_size, spec))
    got, expected = (
        f(grad, x, step_size, spec, 1.0) for f in (fake_quant.fake_quantize_gradients, fake_quantize_gradients)
    )
    assert same_bits(got[0], expected[0])


def trained_weights(run, weight, step_size, spec, grad):
    """Return the fake-quantized weight and both gradients that ``run`` (plain or compiled) gives."""
    leaves = [weight.clone().requires_grad_(), step_size.clone().requires_grad_()]
    y = run(*leaves, spec, 0.25)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "grid"), GPU_GRIDS, ids=str)
def test_grid_on_gpu(shape, grid, dtype):
    for bits, signed in ((4, True), (8, True), (4, False)):
        spec = QuantSpec(bits=bits, signed=signed, **grid)
        for finite in (True, False):
            x, step_size, grad = inputs(shape, spec, dtype, finite)
            assert_like_the_reference(x, step_size, grad, spec)
            cpu = fake_quantized(x.cpu(), step_size.cpu(), spec)
            assert same_bits(fake_quant.fake_quantized(x, step_size, spec).cpu(), cpu)


@pytest.mark.gpu
def test_offsets_past_2_31_on_gpu():
    x = torch.randn(2**31 + 2**16, device=DEVICE, dtype=torch.bfloat16)
    step_size, spec = torch.full((1, 1), 0.3, device=DEVICE), QuantSpec(granularity="tensor")
    y = fake_quant.fake_quantized(x, step_size, spec)
    last = slice(2**31 - 100, None)
    assert torch.equal(y[last], fake_quantized(x[last], step_size, spec))
    grad_x, grad_step = fake_quant.fake_quantize_gradients(x, x, step_size, spec, 1.0)
    assert torch.equal(grad_x[last], fake_quantize_gradients(x[last], x[last], step_size, spec, 1.0)[0])
    parts = [fake_quantize_gradients(part, part, step_size.double(), spec, 1.0)[1] for part in x.double().chunk(64)]
    torch.testing.assert_close(grad_step.double(), sum(parts), rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_eager_compiled_and_captured_have_the_same_bits(mode):
    spec = QuantSpec(group_size=128)
    weight, step_size, grad = inputs((1024, 2048), spec, torch.bfloat16, finite=True)
    eager = trained_weights(qat.numerics.fake_quantize, weight, step_size, spec, grad)
    torch._dynamo.reset()
    compiled = torch.compile(qat.numerics.fake_quantize, fullgraph=True, mode=mode)
    for _ in range(3):  # recorded, then replayed
        for one, other in zip(eager, trained_weights(compiled, weight, step_size, spec, grad), strict=True):
            assert torch.equal(one, other)
