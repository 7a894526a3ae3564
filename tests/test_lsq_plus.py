"""LSQ+: the paper's gradients in float64, one element at a time, and the way of a zero point into the artifact.

``check_*`` takes the module under test, so that the mutants' tests can show that it fails on a wrong one.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

import qat
from qat.quantizers import ActivationStatistics, lsq_plus
from qat.spec import Init

CPU = torch.device("cpu")


def asymmetric(bits):
    return qat.QuantSpec(bits=bits, granularity="tensor", symmetric=False)


def made(bits, scale, steps_below_zero, lsq_plus=lsq_plus):
    """Return a quantizer whose lowest code stands for ``-steps_below_zero * scale``."""
    quantizer = lsq_plus.ActivationLSQPlus(asymmetric(bits), CPU, "layer")
    quantizer.set_step_size(torch.tensor(scale))
    with torch.no_grad():
        quantizer.offset.fill_(-steps_below_zero * scale)
    return quantizer


@given(
    bits=st.integers(2, 8),
    share=st.floats(0, 1),
    scale=st.sampled_from([0.25, 0.0390625, 1.5]),
    seed=st.integers(0, 2**16),
)
def check_values_and_gradients(lsq_plus, bits, share, scale, seed):
    """Equations 2 to 6 of arXiv:2004.09576, where the offset is a whole number of steps: there both agree exactly."""
    levels = 2**bits - 1
    below = round(share * levels)
    quantizer, offset = made(bits, scale, below, lsq_plus), -below * scale
    generator = torch.Generator().manual_seed(seed)
    x = (2 * levels * scale * (torch.rand(3, 16, generator=generator) - 0.5)).double()
    x[0, 0], x[0, 1], x[0, 2] = offset, offset + levels * scale, 0.0  # both bounds, and the code of zero
    x.requires_grad_()
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    y = quantizer(x)
    (y * upstream).sum().backward()
    grad_step = grad_offset = 0.0
    for value, result, grad, passed in zip(*(t.flatten().tolist() for t in (x, y, upstream, x.grad)), strict=True):
        v = (value - offset) / scale
        code = min(max(round(value / scale) + below, 0), levels)
        assert result == pytest.approx(code * scale + offset, abs=1e-12)
        inside = 0 < v < levels
        assert passed == (grad if inside else 0)
        grad_step += grad * (round(value / scale) - value / scale if inside else code)
        grad_offset += 0 if inside else grad
    g = 1 / math.sqrt(16 * levels)
    assert quantizer.step_size.grad.item() == pytest.approx(grad_step * g, rel=1e-5, abs=1e-5)
    assert quantizer.offset.grad.item() == pytest.approx(grad_offset * g, rel=1e-5, abs=1e-5)


def test_values_and_gradients_are_the_papers():
    check_values_and_gradients(lsq_plus)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_frozen_activation_passes_the_same_gradient(dtype):
    """An adapter below a frozen layer learns through its input."""
    quantizer = made(4, 0.5, 6)
    frozen = qat.quantizers.FrozenActivation(quantizer.spec, quantizer.scale(), quantizer.zero_point())
    gradients = []
    for layer in (quantizer, frozen):
        x = torch.linspace(-4, 6, 101).to(dtype).requires_grad_()
        (layer(x) * torch.arange(101)).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and (gradients[1] != 0).sum() > 50


def check_zero_has_a_code(lsq_plus):
    for below, code in ((-3.0, -8), (0.0, -8), (2.4, -6), (2.6, -5), (40.0, 7)):
        quantizer = made(4, 0.5, below, lsq_plus)
        assert quantizer(torch.zeros(5)).tolist() == [0.0] * 5
        assert quantizer.zero_point().item() == code and quantizer.zero_point().dtype == torch.int8


def test_zero_always_has_a_code():
    check_zero_has_a_code(lsq_plus)


def check_stored_scale(lsq_plus):
    """A step size between two bf16 numbers: values, masks and gradients are those of the one it is stored as."""
    stored, steps = 0.3515625, 4
    quantizer, exact = (made(4, stored, steps, lsq_plus) for _ in range(2))
    with torch.no_grad():
        quantizer.step_size.mul_(1.001)
    x = torch.linspace(-3, 6, 91)
    results = []
    for each in (quantizer, exact):
        inputs = x.clone().requires_grad_()
        y = each(inputs)
        (y * x.cos()).sum().backward()
        results.append((y.detach(), inputs.grad, each.step_size.grad, each.offset.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def check_bf16_inputs(lsq_plus):
    """Gradients of bf16 inputs are summed in float32: those of the same values in float64, but for its rounding."""
    x = (torch.randn(64, 64) * 3).bfloat16()
    upstream = torch.randn(64, 64).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        quantizer = made(4, 0.5, 5, lsq_plus)
        quantizer(x.to(dtype)).backward(upstream.to(dtype))
        results.append(torch.cat([quantizer.step_size.grad, quantizer.offset.grad]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def check_stored_zero_point(lsq_plus):
    """The zero point is that of the stored scale, where the step size has another: 0.3 is stored as 0.30078125."""
    quantizer = made(8, 0.3, 0, lsq_plus)
    with torch.no_grad():
        for below in (100.4, 100.6, 100.8):  # steps of 0.3, which are 100.14 to 100.54 stored ones
            quantizer.offset.fill_(-below * 0.3)
            lowest = quantizer(torch.tensor([-1e3])).item()
            assert lowest == -round(below * 0.3 / 0.30078125) * 0.30078125


def check_nan(lsq_plus):
    """It counts as clipped at the lower end: the offset's gradient has its own, x's and the step size's have not."""
    quantizer = made(4, 0.5, 6, lsq_plus)
    x = torch.tensor([[math.nan, 0.6, 1.0]], requires_grad=True)
    y = quantizer(x)
    assert y.isnan().tolist() == [[True, False, False]]
    y.backward(torch.tensor([[5.0, 2.0, 3.0]]))
    g = 1 / math.sqrt(3 * 15)
    assert x.grad.tolist() == [[0.0, 2.0, 3.0]]
    assert quantizer.step_size.grad.item() == pytest.approx(2 * -0.2 * g, rel=1e-5)
    assert quantizer.offset.grad.item() == pytest.approx(5 * g, rel=1e-6)


def check_bounds_that_are_tensors(lsq_plus):
    """With a step size and an offset for each element, gradients are what numbers give one element at a time."""
    spec, generator = made(3, 0.5, 2, lsq_plus).spec, torch.Generator().manual_seed(0)
    scale = torch.rand(64, 1, generator=generator) * 0.4 + 0.1
    offset, x, grad = -scale * torch.arange(64)[:, None] / 8, *torch.randn(2, 64, 1, generator=generator)
    together = lsq_plus.gradients(grad, x, scale, offset, spec, 1.0)
    for row in range(64):
        one = slice(row, row + 1)
        alone = lsq_plus.gradients(grad[one], x[one], scale[one], offset[one], spec, 1.0)
        assert all(torch.equal(found[one], expected) for found, expected in zip(together, alone, strict=True))
    assert 10 < (together[0] != 0).sum() < 54 and together[1].unique().numel() > 10


def test_tensors_without_data_have_gradients_too():
    """As an estimate of a step's memory has them: no bound is read of them."""
    with FakeTensorMode():
        x, step_size, offset = torch.randn(4, 8), torch.ones(1, 1), torch.zeros(1, 1)
        found = lsq_plus.gradients(x, x, step_size, offset, made(4, 0.5, 6).spec, 1.0)
    assert [list(each.shape) for each in found] == [[4, 8], [1, 1], [1, 1]]


def check_start(lsq_plus):
    """A stored scale and zero point come out as they went in, and say what is a code of what."""
    for zero_point in (-8, -3, 0, 7):
        quantizer = lsq_plus.ActivationLSQPlus(asymmetric(4), CPU, "layer")
        quantizer.start(torch.tensor([[0.25]]), torch.tensor([[zero_point]], dtype=torch.int8))
        assert quantizer.zero_point().item() == zero_point and quantizer.scale().item() == 0.25
        ends = quantizer(torch.tensor([-1e3, 1e3]))
        assert ends.tolist() == [(-8 - zero_point) * 0.25, (7 - zero_point) * 0.25]


def check_grid_is_signed(lsq_plus):
    """Whatever a spec leaves open: codes run from -8 to 7, and so after loading."""
    quantizer = lsq_plus.ActivationLSQPlus(asymmetric(4), CPU, "layer")
    assert quantizer.spec.signed is True and bool(quantizer.signed)


@pytest.mark.parametrize(
    "check",
    [
        *(check_stored_scale, check_stored_zero_point, check_bf16_inputs, check_start, check_grid_is_signed),
        *(check_nan, check_bounds_that_are_tensors),
    ],
)
def test_what_is_stored(check):
    check(lsq_plus)


def check_enabled(lsq_plus):
    quantizer = made(4, 0.5, 3, lsq_plus)
    quantizer.enabled = False
    assert quantizer(x := torch.randn(5)) is x
    quantizer.enabled = True
    quantizer.observer = ActivationStatistics(CPU)
    assert quantizer(x) is x


def test_it_passes_values_before_its_start_and_in_calibration():
    check_enabled(lsq_plus)


def check_start_from_data(lsq_plus, init):
    values = torch.nn.functional.silu(torch.randn(4096, generator=torch.Generator().manual_seed(0)))
    values[0] = 30.0
    quantizer = lsq_plus.ActivationLSQPlus(asymmetric(4), CPU, "layer", init)
    statistics = ActivationStatistics(CPU, keep_sample=init is Init.mse)
    for batch in values.chunk(4):
        statistics.update(batch)
    quantizer.initialise(statistics)
    error = (quantizer(values) - values).square().mean().item()
    low, high = values.min().item(), values.max().item()
    step = (high - low) / 15
    clipless = torch.clamp(torch.round(values / step) - round(low / step), 0, 15) * step + round(low / step) * step
    expected = (clipless - values).square().mean().item()
    if init is Init.mse:
        assert error < 0.9 * expected
    else:
        assert quantizer.step_size.item() == pytest.approx(step)
        assert quantizer.offset.item() == pytest.approx(low)
        assert error == pytest.approx(expected, rel=0.05)


def check_start_at_the_range(lsq_plus):
    check_start_from_data(lsq_plus, Init.minmax)
    check_start_from_data(lsq_plus, Init.lsq)


def check_start_at_the_least_error(lsq_plus):
    check_start_from_data(lsq_plus, Init.mse)


@pytest.mark.parametrize("check", [check_start_at_the_range, check_start_at_the_least_error])
def test_it_starts_at_the_range_or_at_the_least_error(check):
    check(lsq_plus)


def test_an_offset_learns_what_a_symmetric_grid_cannot_hold():
    """Values around 1 at 3 bits: the error after training against that of LSQ, signed or unsigned."""

    def trained(**spec):
        torch.manual_seed(0)
        values = torch.randn(64, 32) + 1
        model = nn.Sequential(nn.Linear(32, 32, bias=False))
        policy = qat.QuantPolicy(activation={"bits": 3, "granularity": "tensor", **spec}, init="mse")
        qat.prepare(model, policy, verbose=False)
        qat.calibrate(model, [values])
        quantizer = model[0].activation_quantizer
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            (quantizer(values) - values).square().sum().div(64).backward()
            optimizer.step()
        return (quantizer(values) - values).square().mean().item()

    plus, signed, unsigned = trained(symmetric=False), trained(signed=True), trained(signed=False)
    assert plus < 0.75 * min(signed, unsigned)


def test_torchs_default_dtype_changes_no_gradient():
    """Whose sum is float32's, as that of float64 would differ in last bits."""
    found, x = [], torch.randn(64, 999, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        quantizer = made(4, 0.25, 4)
        torch.set_default_dtype(dtype)
        try:
            quantizer(x.requires_grad_()).square().sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append([parameter.grad for parameter in quantizer.parameters()])
    torch.testing.assert_close(*found, rtol=0, atol=0)
