"""LSQ+: the paper's gradients in float64, one element at a time, and the way of a zero point into the artifact."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qat
from qat.quantizers import ActivationLSQPlus, ActivationStatistics
from qat.spec import Init

CPU = torch.device("cpu")


def asymmetric(bits):
    return qat.QuantSpec(bits=bits, granularity="tensor", symmetric=False)


def made(bits, scale, steps_below_zero):
    """Return a quantizer whose lowest code stands for ``-steps_below_zero * scale``."""
    quantizer = ActivationLSQPlus(asymmetric(bits), CPU, "layer")
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
def test_values_and_gradients_are_the_papers(bits, share, scale, seed):
    """Equations 2 to 6 of arXiv:2004.09576, where the offset is a whole number of steps: there both agree exactly."""
    levels = 2**bits - 1
    below = round(share * levels)
    quantizer, offset = made(bits, scale, below), -below * scale
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


def test_zero_always_has_a_code():
    for below in (-3.0, 0.0, 2.4, 40.0):
        quantizer = made(4, 0.5, below)
        assert quantizer(torch.zeros(5)).tolist() == [0.0] * 5
        assert -8 <= quantizer.zero_point().item() <= 7


@pytest.mark.parametrize("init", [Init.minmax, Init.lsq, Init.mse])
def test_it_starts_at_the_range_or_at_the_least_error(init):
    values = torch.nn.functional.silu(torch.randn(4096, generator=torch.Generator().manual_seed(0)))
    values[0] = 30.0
    quantizer = ActivationLSQPlus(asymmetric(4), CPU, "layer", init)
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
