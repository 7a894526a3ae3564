"""The one arithmetic, against scalar Python: codes, dequantized weights, LSQ's gradients, and the scale's rounding.

Each ``check_*`` takes the module under test, so that the mutants' tests can show that it fails on a wrong one.

The straight-through gradients are the exact derivative of a surrogate. Round the ratio at the point (x0, s0) and keep
what rounding added as a constant c = round(clip(x0 / s0)) - clip(x0 / s0). The surrogate

    f(x, s) = s * (clip(x / s, -q_n, q_p) + c)

equals the fake-quantized value at (x0, s0), is smooth inside the clipping range, and there has df/dx = 1 and
df/ds = round(x0 / s0) - x0 / s0; outside, df/dx = 0 and df/ds = -q_n or q_p: eq. 3 and 5 of arXiv:1902.08153. On a
bound it has a kink, and LSQ takes the derivative of the clipped side. Rounding the step size to its stored dtype is
one more constant: f(x, s + d) with d = stored(s0) - s0.
"""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qat.numerics
from qat import QuantSpec
from qat.errors import LayerError

SIGNS = [True, False]
GRIDS = [{"granularity": "tensor"}, {"granularity": "channel"}, {"group_size": 4}]
ROWS, COLUMNS = 3, 12
float32 = np.float32


def bounds(bits, signed):
    """Return the lowest and highest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def to_bfloat16(value):
    """Round a float32 to bf16, ties to even, by its bits."""
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    word = (word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", word))[0]


def same_bits(one, other):
    """Return whether two tensors without NaN are the same, signs of zeros included."""
    return one.dtype == other.dtype and torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


def round_to(value, dtype):
    """Round a number that float32 holds exactly, once, to a dtype."""
    if dtype == torch.bfloat16:
        return to_bfloat16(value)
    return float(np.float16(value)) if dtype == torch.float16 else float(float32(value))


def code_of(x, scale, low, high):
    """One float32 division, round half to even (what Python's round does), then the clamp."""
    return min(max(round(float(float32(x) / float32(scale))), low), high)


def scale_index(row, column, spec, columns=COLUMNS):
    """Return where element (row, column) finds its scale in (rows, groups)."""
    if spec.granularity == "tensor":
        return 0, 0
    return (row, 0) if spec.granularity == "channel" else (row, column // spec.group_size)


def interesting_ratios(bits, signed):
    """Return ratios x / s that float32 holds exactly: inside, on ties, on both bounds and beyond them."""
    low, high = bounds(bits, signed)
    ties = [low - 0.5, low + 0.5, -0.5, 0.5, 1.5, 2.5, high - 0.5, high + 0.5]
    edges = [low, high, low - 1, high + 1, low - 100, high + 100, 0.0, -0.0]
    inside = [low + 0.25, low + 0.75, 0.125, -0.125, high - 0.25, 0.53125 * high]
    near = [low * (1 - 2**-10), low * (1 + 2**-10), high * (1 - 2**-10), high * (1 + 2**-10)]
    return ties + edges + inside + near


def lsq_gradients(x, scale, low, high, upstream, spec, grad_scale):
    """LSQ by the paper, one element at a time, in Python floats: (gradient of x, gradient of the scale)."""
    grad_x, grad_scale_sum = torch.zeros_like(x), torch.zeros_like(scale)
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            place = scale_index(row, column, spec, x.shape[1])
            ratio = x[row, column].item() / scale[place].item()
            incoming = upstream[row, column].item()
            if ratio <= low:
                slope = low
            elif ratio >= high:
                slope = high
            else:
                slope = round(ratio) - ratio
                grad_x[row, column] = incoming
            grad_scale_sum[place] += incoming * slope
    return grad_x, grad_scale_sum * grad_scale


def surrogate_gradients(x, s, stored, low, high):
    """Finite differences of f above at one element, in fractions; on a bound, from the clipped side."""
    x, s, stored = Fraction(x), Fraction(s), Fraction(stored)
    ratio = x / stored

    def clip(u):
        return min(max(u, Fraction(low)), Fraction(high))

    constant, offset = round(clip(ratio)) - clip(ratio), stored - s

    def f(x, s):
        return (s + offset) * (clip(x / (s + offset)) + constant)

    step = Fraction(1, 2**40)
    if low < ratio < high:
        in_x = (f(x + step, s) - f(x - step, s)) / (2 * step)
        in_s = (f(x, s + step) - f(x, s - step)) / (2 * step)
    else:
        outwards = step if ratio >= high else -step
        in_x = (f(x + outwards, s) - f(x, s)) / outwards
        in_s = (f(x, s) - f(x, s - step)) / step  # a smaller step size clips more
    return float(in_x), float(in_s)


def laid_out(ratios, scale, spec, rows=ROWS, columns=COLUMNS):
    """Return x (rows, columns) whose elements have the given ratios, over and over."""
    x = torch.zeros(rows, columns, dtype=torch.float64)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        x[row, column] = ratios[index % len(ratios)] * scale[scale_index(row, column, spec, columns)].item()
    return x


def scales_for(spec, seed=0):
    """Return different scales on the bf16 grid, not powers of two, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"tensor": (1, 1), "channel": (ROWS, 1)}.get(spec.granularity, (ROWS, COLUMNS // 4))
    return (torch.rand(shape, generator=generator) + 0.55).bfloat16().double()


def check_codes(numerics):
    """Codes equal scalar Python's for every grid, sign and width."""
    for bits in range(2, 9):
        for signed in SIGNS:
            low, high = bounds(bits, signed)
            for grid in GRIDS:
                spec = QuantSpec(bits=bits, signed=signed, **grid)
                scale = scales_for(spec)
                x = laid_out(interesting_ratios(bits, signed), scale, spec).float()
                codes = numerics.quantize(x, scale.bfloat16(), spec)
                for row in range(ROWS):
                    for column in range(COLUMNS):
                        s = scale[scale_index(row, column, spec)].item()
                        expected = code_of(x[row, column].item(), s, low, high)
                        assert codes[row, column].item() == expected, (spec, x[row, column].item() / s)


def check_codes_of_bf16(numerics):
    """A bf16 weight is divided in float32."""
    spec = QuantSpec(bits=8, granularity="tensor", signed=True)
    x = (40 * torch.randn(1, 500, generator=torch.Generator().manual_seed(0))).bfloat16()
    codes = numerics.quantize(x, torch.full((1, 1), 0.703125).bfloat16(), spec)
    assert codes.flatten().tolist() == [code_of(value, 0.703125, -128, 127) for value in x.flatten().tolist()]


def check_ties(numerics):
    """Half goes to the even neighbour, up and down."""
    spec = QuantSpec(bits=4, granularity="tensor", signed=True)
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]])
    assert numerics.quantize(x, torch.ones(1, 1), spec).tolist() == [[-2, -2, 0, 0, 2, 2, 4]]


def check_division(numerics):
    """x / s in one float32 division: multiplying by 1 / s moves values that lie on a tie."""
    spec = QuantSpec(bits=8, granularity="tensor", signed=True)
    for numerator in range(129, 256, 2):  # odd scales: 1 / s is never exact
        scale = torch.full((1, 1), numerator / 256)
        x = (torch.arange(-100, 100) + 0.5)[None] * scale
        ratios = torch.tensor([[round(k + 0.5) for k in range(-100, 100)]])
        assert torch.equal(numerics.quantize(x, scale, spec), ratios.float())


def check_dequantize(numerics):
    """Every code times every scale, rounded once to the dtype asked for."""
    spec = QuantSpec(bits=8)
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat(4, 1)
    scale = torch.tensor([[0.7], [3.1e-3], [1.9], [1.7e-5]]).bfloat16()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = numerics.QuantizedTensor(codes, scale, spec).dequantize(dtype)
        assert weight.dtype == dtype and weight.shape == codes.shape
        for row in range(4):
            for column in range(256):
                exact = codes[row, column].item() * scale[row, 0].item()
                assert weight[row, column].item() == round_to(exact, dtype)


def check_zero_point(numerics):
    """Codes are clamped after the zero point is added; dequantizing subtracts it."""
    spec = QuantSpec(bits=4, granularity="channel", signed=True, symmetric=False)
    scale, zero = torch.tensor([[0.5], [0.25]]), torch.tensor([[3], [-8]], dtype=torch.int8)
    x = torch.tensor([[-10.0, -5.5, 0.0, 1.25, 2.0, 9.0], [0.0, 0.125, 0.375, 1.0, 3.75, 4.0]])
    expected = torch.tensor([[-8, -8, 3, 5, 7, 7], [-8, -8, -6, -4, 7, 7]])
    tensor = numerics.quantize_tensor(x, scale, spec, zero)
    assert torch.equal(tensor.codes.long(), expected)
    assert torch.equal(tensor.dequantize(), (expected - zero) * scale)


def check_zero_has_no_sign(numerics):
    """Integers have one zero: what is fake-quantized from below zero is +0.0, as what was packed and read back is."""
    x, scale = torch.tensor([[-0.1, -0.0, 0.1]]), torch.ones(1, 1)
    spec = QuantSpec(bits=4, granularity="tensor", signed=True)
    assert not numerics.fake_quantize(x, scale, spec).signbit().any()
    assert not numerics.quantize_tensor(x, scale, spec).dequantize().signbit().any()


def check_stored_scale(numerics):
    """A step size is rounded to bf16, ties to even, and never below 2^-17."""
    steps = [0.1, 0.3, 1 / 3, 1 + 2**-8, 1 + 3 * 2**-8, 1 - 2**-10, 123.456, 2.0**-17, 2.0**-18, 0.0, -1.0, -1e9]
    stored = numerics.stored_scale(torch.tensor([steps]), QuantSpec())
    assert stored.dtype == torch.bfloat16
    assert stored.flatten().tolist() == [max(to_bfloat16(step), 2.0**-17) for step in steps]


def check_forward_uses_stored_scale(numerics):
    """The forward with a step size between two bf16 numbers is the forward of the rounded one."""
    spec = QuantSpec(bits=4, granularity="tensor", signed=True)
    for step in (0.1, 0.3, 0.7, 1.3e-2):
        x = torch.linspace(-8 * step, 8 * step, 97)[None]
        out = numerics.fake_quantize(x, torch.full((1, 1), step), spec)
        scale = to_bfloat16(step)
        expected = [code_of(value, scale, -8, 7) * scale for value in x.flatten().tolist()]
        assert out.flatten().tolist() == expected


def check_gradients(numerics):
    """Both gradients equal the paper's in float64: inside, on ties, on the bounds, beyond; every grid, sign, width."""
    for bits in range(2, 9):
        for signed in SIGNS:
            for grid in GRIDS:
                spec = QuantSpec(bits=bits, signed=signed, **grid)
                scale = scales_for(spec, seed=bits)
                x = laid_out(interesting_ratios(bits, signed), scale, spec).requires_grad_()
                step = scale.clone().requires_grad_()
                upstream = torch.randn(x.shape, dtype=torch.float64)
                numerics.fake_quantize(x, step, spec, 0.37).backward(upstream)
                grad_x, grad_step = lsq_gradients(x, scale, *bounds(bits, signed), upstream, spec, 0.37)
                assert torch.equal(x.grad, grad_x), spec
                torch.testing.assert_close(step.grad, grad_step, rtol=1e-12, atol=1e-12)


def check_surrogate(numerics):
    """Both gradients equal finite differences of the surrogate, also where the step size is not a bf16 number."""
    for signed in SIGNS:
        spec = QuantSpec(bits=3, granularity="tensor", signed=signed)
        low, high = bounds(3, signed)
        for step_size in (0.75, 0.7):  # on the bf16 grid and off it
            stored = to_bfloat16(step_size)
            for ratio in interesting_ratios(3, signed):
                x = torch.tensor([[ratio * stored]], dtype=torch.float64, requires_grad=True)
                step = torch.tensor([[step_size]], dtype=torch.float64, requires_grad=True)
                numerics.fake_quantize(x, step, spec).backward()
                in_x, in_s = surrogate_gradients(x.item(), step_size, stored, low, high)
                assert x.grad.item() == pytest.approx(in_x, abs=1e-9), ratio
                assert step.grad.item() == pytest.approx(in_s, abs=1e-9), ratio


def check_saved_tensors(numerics):
    """The backward keeps the two inputs and nothing else."""
    saved = []
    x, step = torch.randn(4, 8, requires_grad=True), torch.full((4, 2), 0.3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        numerics.fake_quantize(x, step, QuantSpec(group_size=4, signed=True)).sum().backward()
    assert sorted(t.data_ptr() for t in saved) == sorted([x.data_ptr(), step.data_ptr()])


def check_bf16_gradients(numerics):
    """bf16 weights and incoming gradients: the scale's gradient is summed in fp32, within 1e-5 of float64."""
    generator = torch.Generator().manual_seed(0)
    for grid in ({"granularity": "tensor"}, {"granularity": "channel"}, {"group_size": 128}):
        spec = QuantSpec(bits=4, signed=True, **grid)
        x = torch.randn(32, 256, generator=generator).bfloat16()
        upstream = torch.rand(32, 256, generator=generator).bfloat16()
        step = torch.full(numerics.scale_shape(x.shape, spec), 0.3125, requires_grad=True)
        numerics.fake_quantize(x, step, spec).backward(upstream)
        assert step.grad.dtype == torch.float32
        blocks = x.double().reshape(step.numel(), -1) / 0.3125
        slopes = torch.where(blocks <= -8, -8, torch.where(blocks >= 7, 7, blocks.round() - blocks))
        terms = upstream.double().reshape(blocks.shape) * slopes
        error = (step.grad.double().flatten() - terms.sum(1)).abs()
        assert (error <= 1e-5 * terms.abs().sum(1)).all()


def check_refuses_nan(numerics):
    """NaN has no code."""
    for x, scale in [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]:
        with pytest.raises(LayerError, match="NaN or infinity"):
            numerics.quantize_tensor(torch.full((2, 2), x), torch.full((2, 1), scale), QuantSpec())


def test_codes():
    check_codes(qat.numerics)


def test_bf16_weights_are_divided_in_fp32():
    check_codes_of_bf16(qat.numerics)


def test_ties_go_to_even():
    check_ties(qat.numerics)


def test_division_is_a_division():
    check_division(qat.numerics)


def test_dequantize_rounds_once():
    check_dequantize(qat.numerics)


def test_zero_point():
    check_zero_point(qat.numerics)


def test_zero_has_no_sign():
    check_zero_has_no_sign(qat.numerics)


def test_stored_scale():
    check_stored_scale(qat.numerics)


def test_forward_uses_the_stored_scale():
    check_forward_uses_stored_scale(qat.numerics)


def test_gradients_are_the_papers():
    check_gradients(qat.numerics)


def test_gradients_are_the_surrogates():
    check_surrogate(qat.numerics)


def test_backward_saves_only_its_inputs():
    check_saved_tensors(qat.numerics)


def test_bf16_gradients_are_summed_in_fp32():
    check_bf16_gradients(qat.numerics)


def test_nan_is_refused():
    check_refuses_nan(qat.numerics)


def test_step_size_rounding_is_straight_through():
    """Step sizes that round to the same scale get the same gradient, and it does not vanish at the lower limit."""
    spec = QuantSpec(bits=4, granularity="tensor", signed=True)
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)[None]
    grads = []
    for step_size in (0.5, 0.5 + 2**-11, 0.5 - 2**-12):
        step = torch.tensor([[step_size]], dtype=torch.float64, requires_grad=True)
        qat.numerics.fake_quantize(x, step, spec).sum().backward()
        grads.append(step.grad.item())
    assert grads[0] == grads[1] == grads[2] != 0


@pytest.mark.parametrize("step_size", [0.0, -0.25, -1e6])
def test_a_step_size_below_zero_is_finite_and_can_recover(step_size):
    """All of x is clipped then: widening the grid (gradient q_p or -q_n an element) is what lowers a fitting loss."""
    x = torch.tensor([[1.0, -2.0, 3.0]])
    step = torch.full((1, 1), step_size, requires_grad=True)
    out = qat.numerics.fake_quantize(x, step, QuantSpec(bits=4, granularity="tensor", signed=True))
    assert out.isfinite().all()
    (out - x).square().sum().backward()
    assert step.grad.isfinite().all() and step.grad.item() < 0  # a descent step makes it larger


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_output_and_gradients(dtype):
    x = torch.randn(4, 8).to(dtype).requires_grad_()
    step = torch.full((4, 1), 0.3, requires_grad=True)
    out = qat.numerics.fake_quantize(x, step, QuantSpec(signed=True))
    out.sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert step.grad.dtype == torch.float32 and step.grad.shape == step.shape


def test_infinite_inputs_are_clipped_and_nan_stays_visible():
    x = torch.tensor([[math.inf, -math.inf, 1.0]], requires_grad=True)
    step = torch.ones(1, 1, requires_grad=True)
    out = qat.numerics.fake_quantize(x, step, QuantSpec(bits=4, granularity="tensor", signed=True))
    out.sum().backward()
    assert out.tolist() == [[7, -8, 1]]
    assert x.grad.tolist() == [[0, 0, 1]] and step.grad.item() == 7 - 8
    nan = torch.tensor([[math.nan, 1.0]])
    assert qat.numerics.fake_quantize(nan, torch.ones(1, 1), QuantSpec(signed=True)).isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_memory_layout_does_not_matter(grid):
    """Transposed, sliced and channels-last inputs, and expanded incoming gradients, give what contiguous ones give."""
    spec = QuantSpec(bits=4, signed=True, **grid)
    plain = torch.randn(3, 4, 2, 6)
    views = [
        plain.contiguous(memory_format=torch.channels_last),
        plain.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ]
    step = torch.rand(qat.numerics.scale_shape(plain.shape, spec)) + 0.2

    def run(x, upstream):
        x, s = x.detach().requires_grad_(), step.clone().requires_grad_()
        out = qat.numerics.fake_quantize(x, s, spec)
        return out.detach(), *torch.autograd.grad(out, (x, s), upstream)

    upstream = torch.randn(6).expand(3, 4, 2, 6)
    expected = run(plain, upstream.contiguous())
    for view in views:
        for one, other in zip(run(view, upstream), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert torch.equal(run(view, upstream)[0], expected[0])


def test_only_the_gradients_asked_for():
    x, step = torch.randn(2, 4), torch.full((2, 1), 0.3)
    spec = QuantSpec(signed=True)
    qat.numerics.fake_quantize(x.requires_grad_(), step, spec).sum().backward()
    assert x.grad is not None and step.grad is None
    qat.numerics.fake_quantize(x.detach(), step.requires_grad_(), spec).sum().backward()
    assert step.grad is not None


@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([1, 2, 3, 8, 32]),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale_dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    seed=st.integers(0, 2**31),
)
def test_training_forward_is_the_quantized_tensor(
    bits, rows, groups, group_size, granularity, dtype, scale_dtype, seed
):
    """Bit for bit, and each code is scalar Python's."""
    generator = torch.Generator().manual_seed(seed)
    size = group_size if granularity == "group" else None
    spec = QuantSpec(bits=bits, granularity=granularity, group_size=size, signed=True, scale_dtype=scale_dtype)
    x = torch.randn(rows, groups * group_size, generator=generator).to(dtype)
    step = torch.rand(qat.numerics.scale_shape(x.shape, spec), generator=generator) + 0.01
    tensor = qat.numerics.quantize_tensor(x, qat.numerics.stored_scale(step, spec), spec)
    assert same_bits(qat.numerics.fake_quantize(x, step, spec), tensor.dequantize(dtype))
    low, high = bounds(bits, True)
    for row in range(rows):
        for column in range(x.shape[1]):
            scale = tensor.scale[scale_index(row, column, spec)].item()
            assert tensor.codes[row, column].item() == code_of(x[row, column].item(), scale, low, high)


@given(bits=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_quantizing_again_changes_nothing(bits, seed):
    """Every code times a bf16 scale is exact in float32, so a fake-quantized weight has the same codes."""
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    spec = QuantSpec(bits=bits, group_size=8)
    scale = qat.numerics.stored_scale(x.reshape(4, 2, 8).abs().mean(-1), spec)
    tensor = qat.numerics.quantize_tensor(x, scale, spec)
    assert torch.equal(qat.numerics.quantize_tensor(tensor.dequantize(), scale, spec).codes, tensor.codes)


def test_quantized_tensor_is_detached_int8_and_signed():
    weight = torch.randn(4, 8, requires_grad=True)
    tensor = qat.numerics.quantize_tensor(weight, torch.full((4, 1), 0.3).bfloat16(), QuantSpec(bits=8))
    assert tensor.codes.dtype == torch.int8 and tensor.spec.signed is True
    assert not tensor.codes.requires_grad and not tensor.scale.requires_grad


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (QuantSpec(bits=4, group_size=128), 4 + 16 / 128),
        (QuantSpec(bits=3, group_size=32, scale_dtype="float32"), 3 + 32 / 32),
        (QuantSpec(bits=4), 4 + 16 / 256),
        (QuantSpec(bits=8, granularity="tensor"), 8 + 16 / (2 * 256)),
        (QuantSpec(bits=4, group_size=64, symmetric=False), 4 + (16 + 4) / 64),
    ],
    ids=str,
)
def test_bits_per_weight(spec, expected):
    scale = torch.ones(qat.numerics.scale_shape((2, 256), spec), dtype=qat.numerics.scale_dtype(spec))
    tensor = qat.numerics.QuantizedTensor(torch.zeros(2, 256, dtype=torch.int8), scale, spec)
    assert tensor.bits_per_weight == expected


def test_scale_shape():
    conv = torch.Size([6, 8, 3, 3])
    assert qat.numerics.scale_shape(conv, QuantSpec(granularity="tensor")) == (1, 1)
    assert qat.numerics.scale_shape(conv, QuantSpec()) == (6, 1)
    assert qat.numerics.scale_shape(conv, QuantSpec(group_size=24)) == (6, 3)


def test_a_group_size_that_does_not_divide_lists_those_that_do():
    with pytest.raises(LayerError) as caught:
        qat.numerics.scale_shape((4, 96), QuantSpec(group_size=64))
    assert "group_size=64 does not divide its 96 inputs" in str(caught.value)
    assert "8, 16, 24, 32, 48, 96;" in str(caught.value)
    with pytest.raises(LayerError, match="use granularity='channel'"):
        qat.numerics.scale_shape((4, 27), QuantSpec(group_size=8))
