"""HQQ's start: never a larger error in its norm than where it began, and a grid that outliers do not bend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qat
from qat.numerics import stored_scale
from qat.quantizers.asymmetric import range_of
from qat.quantizers.half_quadratic import half_quadratic
from qat.quantizers.lsq import weight_step_size
from qat.spec import Init


def norm_of_error(weight, step_size, zero_point, spec):
    """Return sum |w - rounded(w)|^0.7 of each block in float64, by the definition of the grid."""
    blocks = weight.double().reshape(*step_size.shape, -1)
    scale = stored_scale(step_size, spec).double()[..., None]
    zero = 0 if zero_point is None else zero_point.double()[..., None]
    codes = ((blocks / scale).round() + zero).clamp(-spec.q_n, spec.q_p)
    return (blocks - (codes - zero) * scale).abs().pow(0.7).sum(-1)


def start_of(weight, spec):
    return (weight_step_size(weight, spec, Init.mse), None) if spec.symmetric else range_of(weight, spec)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from([None, 16, 32]),
    rows=st.integers(1, 5),
    tail=st.floats(1, 6),
    shift=st.floats(-1, 1),
    seed=st.integers(0, 999),
)
def test_no_block_ends_with_a_larger_error_than_it_began_with(bits, symmetric, group, rows, tail, shift, seed):
    noise = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    weight = noise.sign() * noise.abs().pow(tail) * 0.02 + shift * 0.02
    spec = qat.QuantSpec(bits=bits, symmetric=symmetric, group_size=group, scale_dtype="float32")
    start = start_of(weight, spec)
    found = half_quadratic(weight, *start, spec)
    assert (norm_of_error(weight, *found, spec) <= norm_of_error(weight, *start, spec) * (1 + 1e-4)).all()
    if not symmetric:
        assert ((found[1] == found[1].round()) & (found[1] >= -spec.q_n) & (found[1] <= spec.q_p)).all()


@pytest.mark.parametrize(("bits", "most"), [(2, 0.95), (3, 0.96), (4, 0.98)])
def test_heavy_tails_lose_some_of_it(bits, most):
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(3.0).sample((64, 64)) * 0.02
    spec = qat.QuantSpec(bits=bits, group_size=64)
    start = start_of(weight, spec)
    before = norm_of_error(weight, *start, spec).sum()
    assert norm_of_error(weight, *half_quadratic(weight, *start, spec), spec).sum() < most * before


def test_a_grid_is_found_again_behind_an_outlier():
    step = 0.013
    weight = torch.cat([torch.arange(-7, 8).repeat(4) * step, torch.tensor([9.3 * step])])[None]
    spec = qat.QuantSpec(bits=4, scale_dtype="float32")
    start = weight_step_size(weight, spec, Init.mse)
    assert start > 1.005 * step
    torch.testing.assert_close(weight_step_size(weight, spec, Init.hqq), torch.tensor([[step]]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_unit_of_the_weight_does_not_matter(symmetric):
    weight = torch.randn(4, 64)
    spec = qat.QuantSpec(bits=3, symmetric=symmetric, group_size=32)
    for factor in (2.0**-8, 2.0**6):
        small, large = (half_quadratic(w, *start_of(w, spec), spec) for w in (weight, weight * factor))
        assert torch.equal(small[0] * factor, large[0])
        assert symmetric or torch.equal(small[1], large[1])


def test_blocks_of_zeros_stay():
    for symmetric in (True, False):
        spec = qat.QuantSpec(bits=4, symmetric=symmetric)
        step_size, _ = half_quadratic(torch.zeros(3, 8), *start_of(torch.zeros(3, 8), spec), spec)
        assert step_size.isfinite().all() and (step_size > 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_policy_starts_with_it_and_ships_it(symmetric, tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 80), nn.Unflatten(-1, (5, 4, 4)), nn.Conv2d(5, 6, 3))

    grid = {"bits": 3, "symmetric": symmetric}
    prepared = qat.prepare(model(), qat.QuantPolicy.from_dict({"weight": grid, "init": "hqq"}), verbose=False)
    other = qat.prepare(model(), qat.QuantPolicy.from_dict({"weight": grid, "init": "mse"}), verbose=False)
    for at in (0, 2):
        quantizer, weight = prepared[at].weight_quantizer, prepared[at].weight.flatten(1)
        spec, zero_point = quantizer.spec, None if symmetric else quantizer.zero_point
        error = norm_of_error(weight, quantizer.step_size, zero_point, spec)
        assert (error <= norm_of_error(weight, *start_of(weight, spec), spec) * 1.0001).all()
        assert not torch.equal(quantizer.step_size, other[at].weight_quantizer.step_size)
    x = torch.randn(2, 16)
    expected = prepared.eval()(x)
    qat.save(qat.freeze(prepared), tmp_path / "out")
    torch.testing.assert_close(qat.load(tmp_path / "out", model())(x), expected, rtol=1e-5, atol=1e-6)
