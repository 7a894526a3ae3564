"""policy.init=mse: step sizes of least squared error, against a brute-force search in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qat
from qat.numerics import dequantize, quantize, scale_shape, stored_scale
from qat.quantizers import WeightLSQ, least_error
from qat.spec import Init, QuantSpec


def brute_force(values, q_n, q_p):
    """Return the least mean squared error over step sizes as fine as 1/100 of the largest useful one."""
    values = np.asarray(values, dtype=np.float64)
    largest = np.abs(values).max() / q_p
    steps = largest * np.arange(1, 101) / 100
    return min(np.mean((np.clip(np.rint(values / s), -q_n, q_p) * s - values) ** 2) for s in steps)


def error(x, scale, spec):
    return (dequantize(quantize(x, scale, spec), scale, torch.float32) - x).double().square().mean().item()


@given(bits=st.integers(2, 8), group=st.sampled_from([None, 8]), seed=st.integers(0, 99))
def test_every_block_of_a_weight_gets_its_own_optimum(bits, group, seed):
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    spec = QuantSpec(bits=bits, group_size=group, scale_dtype="float32")
    quantizer = WeightLSQ(spec, weight, "layer", Init.mse)
    blocks = weight.reshape(*quantizer.step_size.shape, -1)
    for row, groups in enumerate(blocks):
        for index, block in enumerate(groups):
            found = error(block, quantizer.scale()[row : row + 1, index : index + 1], quantizer.spec)
            assert found == pytest.approx(brute_force(block, spec.q_n, spec.q_p), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sparse_activations_are_not_clipped_away(bits):
    """Nine in ten values are zero, as behind a ReLU: LSQ's start loses most of the rest at 2 bits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator).relu() * (torch.rand(64, 256, generator=generator) < 0.2)
    errors = {}
    for init in ("lsq", "mse"):
        spec = QuantSpec(bits=bits, granularity="tensor", scale_dtype="float32")
        model = qat.prepare(torch.nn.Linear(256, 4), qat.QuantPolicy(activation=spec, init=init), verbose=False)
        qat.calibrate(model, [x[:32], x[32:]])
        quantizer = model.activation_quantizer
        assert quantizer.spec.signed is False
        errors[init] = error(x, quantizer.scale(), quantizer.spec)
    assert errors["mse"] == pytest.approx(brute_force(x, 0, 2**bits - 1), rel=1e-3)
    assert errors["mse"] < errors["lsq"]


def test_the_search_uses_the_stored_scale():
    """On the bf16 grid the best candidate is the best after rounding."""
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    spec = QuantSpec(bits=3)
    quantizer = WeightLSQ(spec, weight, "layer", Init.mse)
    steps = weight.abs().max() / spec.q_p * torch.arange(1, 101) / 100
    best = min(error(weight, stored_scale(step.reshape(1, 1), spec), quantizer.spec) for step in steps)
    assert error(weight, quantizer.scale(), quantizer.spec) == best


def test_an_all_zero_weight_is_fine():
    quantizer = WeightLSQ(QuantSpec(), torch.zeros(2, 4), "layer", Init.mse)
    assert torch.equal(quantizer(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("shape", [(7, 24), (5, 4, 2, 3), (1, 24)])
@pytest.mark.parametrize("grid", [{"group_size": 8}, {}, {"granularity": "tensor"}])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_at_a_time_have_the_errors_of_the_whole(monkeypatch, shape, grid, weighted):
    weight, spec = torch.randn(shape), QuantSpec(bits=4, signed=True, **grid)
    weights = torch.rand(shape[-1]) if weighted else None  # of inputs: it broadcasts
    largest = weight.abs().reshape(*scale_shape(weight.shape, spec), -1).amax(-1) / spec.q_p
    found = []
    for elements in (1, 2 * weight[0].numel(), 2**18):
        monkeypatch.setattr(least_error, "ELEMENTS", elements)
        found.append(least_error.squared_errors(weight, largest, spec, weights))
    assert found[0].shape == (100, *largest.shape)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
