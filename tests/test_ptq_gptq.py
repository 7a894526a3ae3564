"""GPTQ and GPTAQ against dense float64 algebra, and where they must win."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ptq_models import correlated_inputs, mlp, optimal_brain_quantizer, prepared, spec
from torch import nn

import qat
from qat.errors import CalibrationError
from qat.layers import quant_layers
from qat.ptq.gptq import factorize, gptq, output_error, rounded_weight
from qat.ptq.moments import Moments, input_rows
from qat.quantizers.lsq import weight_step_size
from qat.spec import Init


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("inputs", [12, 200])  # less and more than one block of columns
def test_gptq_is_the_optimal_brain_quantizer(act_order, inputs):
    x = correlated_inputs(inputs=inputs, spread=0.7).double()
    hessian = x.T @ x / len(x)
    weight = torch.randn(5, inputs, dtype=torch.float64)
    step = torch.full((5, 1), 0.296875, dtype=torch.float64)  # of few bits: its multiples are exact in float32
    factor = factorize(hessian, 0.01, act_order)
    moved, _ = gptq(weight, factor, spec(scale_dtype="float32"), act_order, step)
    scale = step[:, 0]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(inputs)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else range(inputs)
    expected = optimal_brain_quantizer(
        weight, damped, order, lambda column, _: (column / scale).round().clamp(-8, 7) * scale
    )
    assert torch.allclose(moved, expected, rtol=1e-6, atol=1e-8)
    assert torch.equal((moved / step).round().clamp(-8, 7), (expected / step).round().clamp(-8, 7))


def test_gptaq_corrects_later_columns_for_what_earlier_layers_changed():
    """P[j, F] = alpha D[j, F] H[F, F]^-1 with F the columns after j; the unquantized model's output comes closer."""
    x = correlated_inputs(inputs=8).double()
    unquantized = x + 0.3 * x @ torch.randn(8, 8).double()
    hessian, difference = x.T @ x / len(x), (unquantized - x).T @ x / len(x)
    factor = factorize(hessian, 1e-6, False, difference)
    hessian += 1e-6 * hessian.diagonal().mean() * torch.eye(8)
    expected = torch.zeros(8, 8, dtype=torch.float64)
    for j in range(7):
        expected[j, j + 1 :] = 0.25 * difference[j, j + 1 :] @ torch.linalg.inv(hessian[j + 1 :, j + 1 :])
    assert torch.allclose(factor.correction, expected, atol=1e-8)
    weight, step = torch.randn(3, 8, dtype=torch.float64), torch.full((3, 1), 1 / 32, dtype=torch.float64)
    moved, _ = gptq(weight, factor, spec(8, scale_dtype="float32"), False, step)
    target = weight @ unquantized.T
    before, after = ((w @ x.T - target).square().mean() for w in (weight, moved))
    assert after < 0.95 * before


def test_gptaq_in_blocks_is_gptaq_column_by_column():
    x = correlated_inputs(inputs=200).double()
    unquantized = x + 0.1 * x @ torch.randn(200, 200).double() / 200**0.5
    factor = factorize(x.T @ x / len(x), 0.01, False, (unquantized - x).T @ x / len(x))
    weight, step = torch.randn(4, 200, dtype=torch.float64), torch.full((4, 1), 0.25, dtype=torch.float64)
    moved, _ = gptq(weight, factor, spec(8, scale_dtype="float32"), False, step)
    for j in range(200):
        column = weight[:, j].clone()
        error = (column - (column / 0.25).round().clamp(-128, 127) * 0.25) / factor.inverse[j, j]
        weight += torch.outer(column, factor.correction[j]) - torch.outer(error, factor.inverse[j])
        weight[:, j] = column
    assert torch.allclose(moved, weight, rtol=1e-6, atol=1e-8)


def test_moments_of_two_models():
    """The mean of x x^T and of (x_unquantized - x) x^T over batches, an empty one among them."""
    layer, moments = nn.Linear(5, 2), Moments()
    pairs = [(torch.randn(size, 3, 5), torch.randn(size, 3, 5)) for size in (2, 0, 4)]
    for x, unquantized in pairs:
        moments.update(layer, x, unquantized)
    moments.finish("layer")
    x, unquantized = (torch.cat([pair[side] for pair in pairs]).flatten(0, 1).double() for side in (0, 1))
    assert moments.count == 18
    assert torch.allclose(moments.hessian[0].double(), x.T @ x / 18, atol=1e-6)
    assert torch.allclose(moments.difference[0].double(), (unquantized - x).T @ x / 18, atol=1e-6)
    assert torch.allclose(moments.magnitude[0].double(), x.abs().mean(0), atol=1e-6)


def test_live_groups_read_compensated_weights():
    """The last group's step size fits the weights that it rounds, not the original ones."""
    x = correlated_inputs(inputs=256, spread=1.5)
    weight, grid = torch.randn(16, 256), spec(3, group_size=16)
    factor = factorize(x.T @ x / len(x), 0.01, False)
    moved, step = gptq(weight, factor, grid, False)
    last, costs = moved[:, -16:], factor.inverse.diagonal()[-16:] ** -2
    assert (last - weight[:, -16:]).abs().max() > 0.1
    errors = []
    for steps in (step[:, -1:], weight_step_size(weight, grid, Init.mse)[:, -1:]):
        rounded = rounded_weight(last.contiguous(), steps, spec(3))
        errors.append(((rounded - last).square() * costs).mean())
    assert errors[0] < errors[1]


def test_a_channel_that_is_always_zero_is_rounded_to_nearest():
    x = correlated_inputs(inputs=16)
    x[:, 5] = 0
    weight = torch.randn(4, 16)
    moved, _ = gptq(weight, factorize(x.T @ x / len(x), 0.01, True), spec(), True)
    assert torch.equal(moved[:, 5], weight[:, 5])


def test_damping_rises_and_then_fails():
    """A matrix that is no Hessian: its least eigenvalue asks for a damping of 0.5, or for more than 1."""
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 1.4
    assert factorize(hessian, 0.01, False).damping == pytest.approx(0.64)
    hessian[0, 1] = hessian[1, 0] = 3.0
    with pytest.raises(CalibrationError, match=r"no Cholesky factor.*give more"):
        factorize(hessian, 0.01, False)


@given(seed=st.integers(0, 999), groups=st.sampled_from([1, 2, 4]), mode=st.sampled_from(["zeros", "reflect"]))
def test_rows_of_a_convolution_are_its_matrix_product(seed, groups, mode):
    torch.manual_seed(seed)
    stride, dilation = int(torch.randint(1, 3, ())), int(torch.randint(1, 3, ()))
    options = {"stride": stride, "dilation": dilation, "padding": 1, "groups": groups, "padding_mode": mode}
    layer = nn.Conv2d(4, 8, 3, bias=False, **options)
    x = torch.randn(2, 4, 7, 6)
    rows = input_rows(layer, x)
    product = rows @ layer.weight.flatten(1).unflatten(0, (groups, -1)).mT  # (groups, T, N / groups)
    output = layer(x)
    expected = output.permute(1, 0, 2, 3).reshape(groups, 8 // groups, -1).mT
    assert torch.allclose(product, expected, atol=1e-5)


def loss_over_nearest(moved, step, weight, hessian, grid):
    nearest = rounded_weight(weight, weight_step_size(weight, grid, Init.minmax), grid)
    found = output_error(weight, rounded_weight(moved, step, grid), hessian)
    return (found / output_error(weight, nearest, hessian)).item()


def test_gptq_on_correlated_inputs():
    """A fraction of round-to-nearest's output error; less with the columns in order; more with too much damping."""
    x, grid = correlated_inputs(8192, 256), spec(4, group_size=32)
    weight, hessian = torch.randn(64, 256) / 16, x.T @ x / len(x)
    losses = {}
    for damping, act_order in [(0.01, True), (0.01, False), (1.0, True)]:
        factor = factorize(hessian, damping, act_order)
        losses[damping, act_order] = loss_over_nearest(*gptq(weight, factor, grid, act_order), weight, hessian, grid)
    assert losses[0.01, True] < 0.25 and losses[0.01, False] < 0.4
    assert losses[0.01, True] < losses[0.01, False] < 1
    assert losses[1.0, True] > losses[0.01, True]


def test_weights_learn_on_from_gptq():
    """Latent weights of the highest code lie inside the grid where they can, so that LSQ's mask lets them learn."""
    model = prepared(mlp(), "gptq", 2)
    qat.calibrate(model, [torch.randn(256, 32)], verbose=False)
    model(torch.randn(16, 32)).square().mean().backward()
    for _, layer in quant_layers(model):
        assert (layer.weight.grad != 0).float().mean() > 0.3
        assert (layer.weight_quantizer.step_size.grad != 0).float().mean() > 0.9
