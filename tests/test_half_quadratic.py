"""Real zero points, and HQQ's start of them: never a larger error in its norm than the range's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qat
from qat.errors import LayerError, PolicyError
from qat.numerics import fake_quantize_gradients, stored_scale
from qat.quantizers import AsymmetricLSQ
from qat.quantizers.asymmetric import range_of
from qat.quantizers.half_quadratic import half_quadratic

REAL = {"symmetric": False, "zero_point_dtype": "float16"}


def rounded(weight, step_size, zero_point, spec):
    """Return the nearest grid points in float64, by the definition of the grid."""
    blocks = weight.double().reshape(*step_size.shape, -1)
    scale, zero = stored_scale(step_size, spec).double()[..., None], zero_point.double()[..., None]
    codes = (blocks / scale + zero).round().clamp(-spec.q_n, spec.q_p)
    return ((codes - zero) * scale).reshape(weight.shape)


def norm_of_error(weight, step_size, zero_point, spec):
    error = weight.double() - rounded(weight, step_size, zero_point, spec)
    return (error / stored_scale(step_size, spec).double().mean()).abs().pow(0.7).reshape(*step_size.shape, -1).sum(-1)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 16, 32]),
    rows=st.integers(1, 5),
    tail=st.floats(1, 6),
    shift=st.floats(-2, 2),
    seed=st.integers(0, 999),
)
def test_no_block_ends_with_a_larger_error_than_it_began_with(bits, group, rows, tail, shift, seed):
    noise = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    weight = noise.sign() * noise.abs().pow(tail) * 0.02 + shift * 0.02
    spec = qat.QuantSpec(bits=bits, group_size=group, scale_dtype="float32", **REAL)
    step_size, start = range_of(weight, spec)
    found = half_quadratic(weight, step_size, start, spec)
    assert found.dtype == torch.float16
    before, after = (norm_of_error(weight, step_size, zero_point, spec) for zero_point in (start, found))
    assert (after <= before * (1 + 1e-3)).all()


@pytest.mark.parametrize(("bits", "most"), [(2, 0.95), (3, 0.98), (4, 0.99)])
def test_heavy_tails_lose_some_of_it(bits, most):
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(3.0).sample((64, 64)) * 0.02
    spec = qat.QuantSpec(bits=bits, group_size=64, **REAL)
    step_size, start = range_of(weight, spec)
    found = half_quadratic(weight, step_size, start, spec)
    before, after = (norm_of_error(weight, step_size, zero_point, spec).sum() for zero_point in (start, found))
    assert after < most * before


def test_a_zero_point_is_found_again_behind_values_that_no_code_reaches():
    """60 values lie on a grid; 15 lie 0.4 steps above it, by which a mean of all errors is 0.08 off."""
    step, zero = 2.0**-6, 0.375
    grid = torch.arange(-8, 7).repeat(5) - zero + torch.tensor([0.0] * 60 + [0.4] * 15)
    spec = qat.QuantSpec(bits=4, scale_dtype="float32", **REAL)
    found = half_quadratic((grid * step)[None], torch.tensor([[step]]), torch.tensor([[zero - 0.2]]), spec)
    assert (found.float() - zero).abs() < 0.05


def test_the_unit_of_the_weight_does_not_matter():
    weight, spec = torch.randn(4, 64), qat.QuantSpec(bits=3, group_size=32, **REAL)
    found = [half_quadratic(w, *range_of(w, spec), spec) for w in (weight, weight * 2.0**-8, weight * 64)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_blocks_of_one_value_are_kept(value):
    spec = qat.QuantSpec(bits=4, scale_dtype="float32", **REAL)
    quantizer = AsymmetricLSQ(spec, torch.full((3, 8), value), "w", qat.spec.Init.hqq)
    torch.testing.assert_close(quantizer(torch.full((3, 8), value)), torch.full((3, 8), value), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("init", ["minmax", "hqq"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("value", "spread"), [(1.0, 1e-6), (-10.0, 3e-5), (0.01, 3e-7), (0.3, 1e-3), (0.0, 1e-7)])
def test_blocks_of_nearly_one_value_are_kept(value, spread, dtype, init):
    """Whose zero points are past what float16 holds, or whose step size is smaller than what is stored."""
    weight = value + spread * torch.randn(3, 8)
    quantizer = AsymmetricLSQ(
        qat.QuantSpec(bits=2, symmetric=False, zero_point_dtype=dtype), weight, "w", qat.spec.Init(init)
    )
    torch.testing.assert_close(quantizer(weight), weight, rtol=2**-7, atol=2.0**-17)


@settings(deadline=None, max_examples=30)
@given(bits=st.integers(2, 8), group=st.sampled_from([None, 8]), seed=st.integers(0, 999))
def test_real_zero_points_round_and_learn_by_the_definition(bits, group, seed):
    """Values against float64, gradients against automatic differentiation of s (q - z) with a straight-through q."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 16, generator=generator, dtype=torch.float64)
    spec = qat.QuantSpec(bits=bits, group_size=group, scale_dtype="float32", **REAL)
    step_size, zero_point = range_of(weight, spec)
    step_size, zero_point = step_size * 0.8, zero_point.half()  # so that some are clipped
    expected = rounded(weight, step_size, zero_point, spec)
    x, s = weight.clone().requires_grad_(), step_size.double().requires_grad_()
    ratio = x.reshape(*s.shape, -1) / s[..., None] + zero_point.double()[..., None]
    codes = ratio.clamp(-spec.q_n, spec.q_p)
    codes = codes + (codes.round() - codes).detach()
    y = ((codes - zero_point.double()[..., None]) * s[..., None]).reshape(x.shape)
    torch.testing.assert_close(y.detach(), expected, rtol=1e-6, atol=1e-9)
    grad = torch.randn(4, 16, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(y, (x, s), grad)
    made = fake_quantize_gradients(grad, weight, step_size, spec, 1.0, zero_point=zero_point)
    torch.testing.assert_close(made[0], wanted[0])
    torch.testing.assert_close(made[1].double(), wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["minmax", "hqq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_trains_is_what_ships(init, dtype, tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 80), nn.Unflatten(-1, (5, 4, 4)), nn.Conv2d(5, 6, 3)).to(dtype)

    policy = qat.QuantPolicy.from_dict({"weight": {"bits": 3, **REAL}, "init": init})
    prepared, x = qat.prepare(model(), policy, verbose=False), torch.randn(8, 16).to(dtype)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        prepared(x).float().square().mean().backward()
        optimizer.step()
    prepared = prepared.bfloat16() if dtype == torch.bfloat16 else prepared
    trained = {
        name: layer.weight_quantizer(layer.weight).detach() for name, layer in prepared.named_children() if name != "1"
    }
    assert prepared[0].weight_quantizer.zero_point.dtype == torch.float16
    again = qat.prepare(model(), policy, verbose=False)
    again.load_state_dict(prepared.state_dict())
    qat.save(qat.freeze(prepared), tmp_path / "out")
    loaded = qat.load(tmp_path / "out", model())
    for name, tensor in qat.quantized_tensors(loaded).items():
        assert torch.equal(tensor.dequantize(dtype).reshape(trained[name].shape), trained[name])
        layer = again.get_submodule(name)
        assert torch.equal(layer.weight_quantizer(layer.weight), trained[name])


def test_other_grids_are_refused_by_name():
    with pytest.raises(
        LayerError, match=r"init=hqq does not know grids without real zero points \('0'\): use weight.symm"
    ):
        qat.prepare(nn.Sequential(nn.Linear(4, 4)), qat.QuantPolicy(qat.QuantSpec(4), init="hqq"), verbose=False)
    with pytest.raises(PolicyError, match="weight_quantizer=minmax has no real zero points"):
        qat.QuantPolicy(qat.QuantSpec(4, **REAL), weight_quantizer="minmax")
