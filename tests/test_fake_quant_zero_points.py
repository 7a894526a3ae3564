"""Fused fake quantization on grids with zero points, fixed or made from LSQ+'s offset, as test_fake_quant.py has it."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qat.kernels import fake_quant, launching
from test_fake_quant import DEVICE, DTYPES, GPU_GRIDS, GRIDS, SCALE_DTYPES, edge_ratios, same_bits

import qat
from qat import QuantSpec, backend, numerics
from qat.numerics import scale_shape, stored_scale
from qat.quantizers import ActivationLSQPlus, AsymmetricLSQ, lsq_plus

REAL = ["float16", "bfloat16", "float32"]
WANTED = True, True, True
CPU = torch.device("cpu")


def asymmetric(real=None, **grid):
    return QuantSpec(**grid, signed=True, symmetric=False, zero_point_dtype=real)


def steps(shape, spec):
    """Return step sizes off the stored grid, and some below the smallest scale."""
    step_size = torch.rand(scale_shape(shape, spec)) * 0.2 + 0.01
    step_size.view(-1)[3::7] *= 1e-7
    return step_size


def zero_points(shape, spec):
    """Return zero points of any code; real ones between codes, halfway, beyond them and far away."""
    size = scale_shape(shape, spec)
    if spec.zero_point_dtype is None:
        return torch.randint(-spec.q_n, spec.q_p + 1, size, dtype=torch.int8)
    real = (torch.rand(size) * 1.2 - 0.1) * (spec.q_n + spec.q_p) - spec.q_n
    real.view(-1)[1::4] = real.view(-1)[1::4].round() + 0.5
    real.view(-1)[2::9] *= 700
    return numerics.stored_zero_point(real, spec)


def offsets(shape, spec):
    """Return an offset in the units of x: inside the grid or beyond it, on a step, between two or at the middle."""
    shift = torch.rand(scale_shape(shape, spec)) * 1.4 - 0.2
    return (shift * (spec.q_n + spec.q_p) * 2).round() / -2


def inputs(shape, spec, dtype, step_size, zero_point, finite=False):
    """Return x whose codes lie half at random, half on ties and bounds and beside them; and a gradient."""
    ratio = torch.randn(shape, dtype=torch.float64) * spec.q_p - 0.5
    edges = edge_ratios(spec)
    if finite:
        edges = edges[edges.abs() < 1e6]
    picked = edges[torch.randint(len(edges), shape)]
    ratio = torch.where(torch.rand(shape) < 0.5, picked, ratio).view(*step_size.shape, -1)
    x = (ratio - zero_point.double()[..., None]) * stored_scale(step_size, spec).double()[..., None]
    return x.view(shape).to(dtype), torch.randn(shape).to(dtype)


def reference(grad, x, step_size, spec, grad_scale, zero_point=None, offset=None):
    """Return (y, gradient of x) of the torch reference, on any device."""
    if offset is not None:
        with mock.patch.object(backend, "fused", lambda *tensors: False):
            y = lsq_plus.fake_quantized(x, step_size, offset, spec)
            return y, lsq_plus.gradients(grad, x, step_size, offset, spec, grad_scale)[0]
    y = numerics.fake_quantized(x, step_size, spec, zero_point=zero_point)
    return y, numerics.fake_quantize_gradients(grad, x, step_size, spec, grad_scale, zero_point=zero_point)[0]


def exact_sums(grad, x, step_size, spec, grad_scale, zero_point=None, offset=None):
    """Return the gradients of step size and offset from float64 sums, each with the sum of its terms' magnitudes."""
    scale = stored_scale(step_size, spec).float()[..., None]
    zero = lsq_plus.zero_point(scale, offset[..., None], spec) if zero_point is None else zero_point.float()[..., None]
    ratio, low, high = x.float().reshape(*step_size.shape, -1) / scale, -spec.q_n - zero, spec.q_p - zero
    inside = (ratio > low) & (ratio < high)
    if spec.zero_point_dtype is None:
        codes = ratio.round().double().clamp(low.double(), high.double())
    else:
        codes = (ratio + zero).double().round().clamp(-spec.q_n, spec.q_p) - zero.double()
    end = codes if offset is None else codes - low.double()
    slope, sums = torch.where(inside, codes - ratio.double(), end), []
    for terms in (slope, (~inside).double()):
        terms = grad.double().reshape(terms.shape) * terms * grad_scale
        sums.append((terms.sum(-1), terms.abs().sum(-1)))
    return sums


def assert_sums(grads, expected):
    """Compare with float64 sums within 1e-5 of their terms' magnitudes, and be NaN where they are."""
    for grad, (exact, magnitude) in zip(grads, expected, strict=False):
        assert grad.dtype == torch.float32 and grad.shape == exact.shape
        assert torch.equal(grad.isnan(), exact.isnan())
        error = (grad.double() - exact).abs()
        assert (error <= 1e-5 * magnitude)[~exact.isnan()].all()


def assert_like_the_reference(grad, x, step_size, spec, grad_scale=0.37, **zero):
    """Compare values and masks bit for bit, and the sums with float64; ``zero`` is a zero point or an offset."""
    grad, x, step_size = (tensor.to(DEVICE) for tensor in (grad, x, step_size))
    zero = {name: tensor.to(DEVICE) for name, tensor in zero.items()}
    y, grad_x = reference(grad, x, step_size, spec, grad_scale, **zero)
    wide = reference(grad, x.float(), step_size, spec, grad_scale, **zero)[0]
    sums = exact_sums(grad, x, step_size, spec, grad_scale, **zero)
    assert same_bits(fake_quant.fake_quantized(x, step_size, spec, **zero), y)
    how = spec, grad_scale, WANTED
    got_x, *got = fake_quant.fake_quantize_gradients(grad, x, step_size, *how, **zero)
    assert same_bits(got_x.contiguous(), grad_x.contiguous()) and len(got) == (2 if "offset" in zero else 1)
    assert_sums(got, sums)
    if DEVICE == "cuda":
        again = fake_quant.fake_quantize_gradients(grad, x, step_size, *how, **zero)[1:]
        assert all(map(same_bits, got, again))
    for dtype in (None, torch.bfloat16, torch.float32):
        owned = torch.empty_like(x).copy_(grad)
        made, got_x, *got = fake_quant.requantize_(owned, x, step_size, *how, dtype, **zero)
        assert made is None if dtype is None else same_bits(made, wide.to(dtype))
        assert same_bits(got_x.contiguous(), grad_x.contiguous())
        assert_sums(got, sums)


def assert_fixed(shape, spec, dtype, finite=False):
    with torch.device(DEVICE):
        step_size, zero_point = steps(shape, spec), zero_points(shape, spec)
        x, grad = inputs(shape, spec, dtype, step_size, zero_point, finite)
    assert_like_the_reference(grad, x, step_size, spec, zero_point=zero_point)


def assert_learned(shape, spec, dtype, finite=True):
    with torch.device(DEVICE):
        step_size = torch.rand(1, 1) * 0.2 + 0.01
        scale = stored_scale(step_size, spec).float()
        offset = offsets(shape, spec) * scale
        x, grad = inputs(shape, spec, dtype, step_size, lsq_plus.zero_point(scale, offset, spec), finite)
    assert_like_the_reference(grad, x, step_size, spec, offset=offset)


@pytest.mark.parametrize("real", [None, *REAL])
@pytest.mark.parametrize(("shape", "grid"), GRIDS, ids=str)
def test_grid(shape, grid, real):
    """Each shape with each kind of zero point and each dtype, but not with each pair of them: test_grid_on_gpu."""
    dtype = DTYPES[(GRIDS.index((shape, grid)) + [None, *REAL].index(real)) % 3]
    assert_fixed(shape, asymmetric(real, **grid), dtype)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_bits(bits, scale_dtype):
    turn = bits + SCALE_DTYPES.index(scale_dtype)
    for real, dtype in ((None, DTYPES[turn % 3]), (REAL[turn % 3], DTYPES[bits % 3])):
        finite = dtype == torch.float32
        assert_fixed((6, 50), asymmetric(real, bits=bits, scale_dtype=scale_dtype), dtype, finite)


@settings(max_examples=12)
@given(
    st.integers(0, 2**31),
    st.integers(2, 8),
    st.sampled_from(["tensor", "channel", "group"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.sampled_from([None, *REAL]),
)
def test_any_shape(seed, bits, granularity, lead, last, dtype, real):
    torch.manual_seed(seed)
    grid = {"bits": bits, "granularity": granularity, "group_size": last if granularity == "group" else None}
    assert_fixed((*lead, last), asymmetric(real, **grid), dtype)
    assert_learned((*lead, last), asymmetric(bits=bits, granularity="tensor"), dtype)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_learned_offsets(bits, scale_dtype):
    spec = asymmetric(bits=bits, granularity="tensor", scale_dtype=scale_dtype)
    assert_learned((3, 5, 27), spec, DTYPES[(bits + SCALE_DTYPES.index(scale_dtype)) % 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_no_number(dtype):
    """An offset's grid has the reference's values and masks for them, too; sums over them mean nothing."""
    spec, step_size = asymmetric(granularity="tensor"), torch.tensor([[0.3]])
    for offset in (torch.tensor([[value]]) for value in (-1.0, 0.0, 5.0, math.inf, -math.inf, math.nan)):
        x, grad = inputs((4, 50), spec, dtype, step_size, torch.zeros(1, 1))
        tensors = [tensor.to(DEVICE) for tensor in (grad, x, step_size)]
        offset = offset.to(DEVICE)
        y, grad_x = reference(*tensors, spec, 1.0, offset=offset)
        assert same_bits(fake_quant.fake_quantized(*tensors[1:], spec, offset=offset), y)
        assert same_bits(fake_quant.fake_quantize_gradients(*tensors, spec, 1.0, WANTED, offset=offset)[0], grad_x)


def test_a_ratio_far_away_meets_a_zero_point_there():
    """Codes of ratios up to 1e5, where a quotient that is one bit off is another code."""
    spec = asymmetric("float32", granularity="tensor", scale_dtype="float32")
    step_size, zero_point = torch.tensor([[0.0137]]), torch.tensor([[-99999.5]])
    x = torch.linspace(99990, 100010, 4001).view(1, -1) * step_size
    assert_like_the_reference(torch.randn(1, 4001), x, step_size, spec, zero_point=zero_point)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_layouts(granularity):
    """Any layout of x, with a gradient of another one."""
    spec = asymmetric(granularity=granularity, group_size=9 if granularity == "group" else None)
    shape = (4, 6, 3, 3)
    step_size, zero_point = steps(shape, spec), zero_points(shape, spec)
    x, grad = inputs(shape, spec, torch.bfloat16, step_size, zero_point)
    for laid_out in (x.to(memory_format=torch.channels_last), torch.cat([x, x], -1)[..., :3], x.transpose(2, 3)):
        for laid_out_grad in (grad, grad.to(memory_format=torch.channels_last)):
            assert_like_the_reference(laid_out_grad, laid_out, step_size, spec, zero_point=zero_point)
            if granularity == "tensor":
                offset = torch.tensor([[-0.4]])
                finite = laid_out.nan_to_num(0.0, 1.0, -1.0)
                assert_like_the_reference(laid_out_grad, finite, step_size, spec, offset=offset)


def test_partial_sums(monkeypatch):
    """More tiles than programs: each walks several, and a second kernel adds up what they found."""
    monkeypatch.setattr(fake_quant, "PARTIAL_SUMS", 3)
    uncached = fake_quant._backward_launches.__wrapped__  # launches of another limit are kept, and outlive the test
    monkeypatch.setattr(fake_quant, "_backward_launches", uncached)
    for shape, grid in (((2, 9000), {"granularity": "tensor"}), ((3, 9000), {"granularity": "channel"})):
        for real in (None, "float16"):
            assert_fixed(shape, asymmetric(real, **grid), torch.bfloat16, finite=True)
    assert_learned((2, 9001), asymmetric(granularity="tensor"), torch.float32)


def test_only_the_gradients_asked_for():
    spec = asymmetric(granularity="tensor")
    step_size, offset = torch.tensor([[0.1]], device=DEVICE), torch.tensor([[-0.4]], device=DEVICE)
    x, grad = torch.randn(7, 9, device=DEVICE), torch.randn(7, 9, device=DEVICE)
    every = fake_quant.fake_quantize_gradients(grad, x, step_size, spec, 0.5, WANTED, offset=offset)
    for mask in range(8):
        wanted = tuple(bool(mask >> place & 1) for place in range(3))
        some = fake_quant.fake_quantize_gradients(grad, x, step_size, spec, 0.5, wanted, offset=offset)
        for one, other, is_wanted in zip(some, every, wanted, strict=True):
            assert same_bits(one, other) if is_wanted else one is None
    empty = fake_quant.fake_quantize_gradients(grad[:0], x[:0], step_size, spec, 0.5, WANTED, offset=offset)
    assert empty[0].shape == (0, 9) and [part.tolist() for part in empty[1:]] == [[[0.0]]] * 2


def weight_quantizer(real):
    made = AsymmetricLSQ(asymmetric(real, group_size=8), torch.randn(6, 32), "w")
    return made, torch.randn(6, 32) * 2


def activation_quantizer():
    made = ActivationLSQPlus(asymmetric(granularity="tensor"), CPU, "x")
    made.set_range(torch.tensor([[-0.6]]), torch.tensor([[1.7]]))
    return made, torch.randn(3, 5, 8)


def layer(activation, weight):
    made = torch.nn.Linear(32, 6)
    x = torch.randn(3, 5, 32)
    policy = qat.QuantPolicy(weight=weight, activation=activation)
    return qat.calibrate(qat.prepare(made, policy, verbose=False), [x]), x


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: weight_quantizer(None),
        lambda: weight_quantizer("float16"),
        activation_quantizer,
        lambda: layer({"bits": 4, "symmetric": False}, {"group_size": 8, "symmetric": False}),
        lambda: layer(None, {"granularity": "channel", "symmetric": False, "zero_point_dtype": "bfloat16"}),
    ],
    ids=["weight", "real", "activation", "layer", "layer with real zero points"],
)
def test_quantizers_run_in_the_kernels(monkeypatch, make, compiled):
    """Eager or compiled, quantizers and layers give the values and gradients of the reference."""
    made, x = make()
    made, x = made.to(DEVICE), x.to(DEVICE)
    results, calls = [], []
    launch = launching.Launch.__call__
    monkeypatch.setattr(launching.Launch, "__call__", lambda self, *args: calls.append(self) or launch(self, *args))
    for kernels in (False, True):
        monkeypatch.setattr(backend, "fused", lambda *tensors, kernels=kernels: kernels)
        torch._dynamo.reset()
        run = torch.compile(made, backend="aot_eager", fullgraph=True) if compiled and kernels else made
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        results.append((y.detach(), *torch.autograd.grad(y, [leaf, *made.parameters()], upstream)))
        assert bool(calls) is kernels
    (y, grad_x, *expected), (other_y, other_grad_x, *others) = results
    assert torch.equal(y, other_y) and torch.equal(grad_x, other_grad_x)
    for one, other in zip(expected, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "grid"), GPU_GRIDS, ids=str)
def test_grid_on_gpu(shape, grid, dtype):
    for real in (None, *REAL):
        assert_fixed(shape, asymmetric(real, **grid), dtype)
    assert_fixed(shape, asymmetric(bits=8, **grid), dtype)
    assert_learned(shape, asymmetric(granularity="tensor"), dtype)


@pytest.mark.gpu
def test_a_gpu_has_the_bits_of_a_cpu():
    for real in (None, *REAL):
        spec, shape = asymmetric(real, group_size=32), (512, 1024)
        step_size, zero_point = steps(shape, spec), zero_points(shape, spec)
        for dtype in DTYPES:
            x, _ = inputs(shape, spec, dtype, step_size, zero_point)
            y = fake_quant.fake_quantized(x.cuda(), step_size.cuda(), spec, zero_point=zero_point.cuda())
            assert same_bits(y, numerics.fake_quantized(x, step_size, spec, zero_point=zero_point))
    spec, step_size, offset = asymmetric(granularity="tensor"), torch.tensor([[0.3]]), torch.tensor([[-1.0]])
    for dtype in DTYPES:
        x, grad = inputs((512, 1024), spec, dtype, step_size, torch.tensor([[-5.0]]))
        y, grad_x = reference(grad, x, step_size, spec, 1.0, offset=offset)
        tensors = grad.cuda(), x.cuda(), step_size.cuda()
        assert same_bits(lsq_plus.fake_quantized(*tensors[1:], offset.cuda(), spec), y)
        assert same_bits(lsq_plus.gradients(*tensors, offset.cuda(), spec, 1.0)[0], grad_x)
