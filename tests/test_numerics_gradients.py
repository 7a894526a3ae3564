"""LSQ's gradients, against the paper's in scalar Python and finite differences, in every dtype and memory layout.

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
from fractions import Fraction

import pytest
import torch
from scalar_arithmetic import GRIDS, SIGNS, bounds, interesting_ratios, laid_out, scale_index, scales_for, to_bfloat16

import qat.numerics
from qat import QuantSpec


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


def check_bounds_of_a_zero_point(numerics):
    """A zero point of 3 moves the bounds of x / s from -8 and 7 to -11 and 4, which give no gradient themselves."""
    for rows, dtype in ((1, torch.int8), (1, torch.float16), (2, torch.int8), (2, torch.float16)):
        spec = QuantSpec(granularity="tensor" if rows == 1 else "channel", symmetric=False, signed=True)
        step, zero_point = torch.full((rows, 1), 0.5), torch.full((rows, 1), 3, dtype=dtype)
        x = torch.tensor([[-5.75, -5.5, -5.375, 0.0, 1.875, 2.0, 2.25]] * rows, requires_grad=True)
        numerics.fake_quantize(x, step, spec, zero_point=zero_point).sum().backward()
        assert x.grad.tolist() == [[0, 0, 1, 1, 1, 0, 0]] * rows


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


def test_gradients_are_the_papers():
    check_gradients(qat.numerics)


def test_gradients_are_the_surrogates():
    check_surrogate(qat.numerics)


def test_a_zero_point_moves_the_bounds():
    check_bounds_of_a_zero_point(qat.numerics)


def test_backward_saves_only_its_inputs():
    check_saved_tensors(qat.numerics)


def test_bf16_gradients_are_summed_in_fp32():
    check_bf16_gradients(qat.numerics)


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
