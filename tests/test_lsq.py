"""LSQ's quantizers: the gradient scale, how step sizes start, and the state that holds them.

``check_*`` takes the module under test, so that the mutants' tests can show that it fails on a wrong one.
"""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qat.quantizers.lsq
import qat.quantizers.observer
from qat import QuantSpec
from qat.errors import StateError
from qat.spec import Init

CPU = torch.device("cpu")
TENSOR4 = QuantSpec(bits=4, granularity="tensor")
# shape of a weight, spec, and how many elements share a scale, by hand
SHARED = [
    ((6, 16), QuantSpec(bits=4, granularity="tensor"), 96),
    ((6, 16), QuantSpec(bits=4), 16),
    ((6, 16), QuantSpec(bits=4, group_size=8), 8),
    ((4, 3, 2, 2), QuantSpec(bits=2, granularity="tensor"), 48),
    ((4, 3, 2, 2), QuantSpec(bits=3), 12),
    ((4, 3, 2, 2), QuantSpec(bits=8, group_size=4), 4),
    ((1, 7), QuantSpec(bits=5), 7),
]
# shape of an activation, and its features: everything but the batch axis
FEATURES = [((5, 12), 12), ((2, 3, 4), 12), ((3, 2, 4, 4), 32), ((1, 9), 9), ((7,), 7)]
HIGHEST = {2: 1, 3: 3, 4: 7, 5: 15, 8: 127}  # Q_P of a signed grid


def slope_of(x, scale, low, high):
    """LSQ's derivative with respect to the scale (eq. 3), one element, in Python floats."""
    ratio = x / scale
    return low if ratio <= low else high if ratio >= high else round(ratio) - ratio


def sums_of_slopes(x, scales, bits):
    """Return the unscaled gradient of each scale for an incoming gradient of ones: flat lists in float64."""
    blocks = x.double().reshape(len(scales), -1).tolist()
    high = HIGHEST[bits]
    return [math.fsum(slope_of(v, s, -high - 1, high) for v in block) for block, s in zip(blocks, scales, strict=True)]


def activation(spec=TENSOR4, step_size=0.5, lsq=qat.quantizers.lsq):
    """Return an initialised activation quantizer."""
    quantizer = lsq.ActivationLSQ(spec, CPU, "layer", Init.lsq)
    quantizer.set_step_size(torch.tensor(step_size))
    return quantizer


def statistics_of(batches, observer=qat.quantizers.observer):
    statistics = observer.ActivationStatistics(CPU)
    for batch in batches:
        statistics.update(torch.as_tensor(batch))
    return statistics


def check_weight_gradient_scale(lsq):
    """1 / sqrt(N Q_P) with N the elements that share a scale."""
    for shape, spec, shared in SHARED:
        weight = torch.randn(shape)
        quantizer = lsq.WeightLSQ(spec, weight, "layer")
        with torch.no_grad():
            quantizer.step_size.copy_(quantizer.step_size.bfloat16())
        quantizer(weight).sum().backward()
        g = 1 / math.sqrt(shared * HIGHEST[spec.bits])
        sums = sums_of_slopes(weight, quantizer.step_size.flatten().tolist(), spec.bits)
        expected = torch.tensor(sums, dtype=torch.float64) * g
        torch.testing.assert_close(quantizer.step_size.grad.double().flatten(), expected, rtol=1e-4, atol=1e-5)


def check_activation_gradient_scale(lsq):
    """1 / sqrt(N Q_P) with N the features: the batch axis does not count."""
    for shape, features in FEATURES:
        quantizer = activation(lsq=lsq)
        x = torch.randn(shape)
        quantizer(x).sum().backward()
        expected = sums_of_slopes(x.flatten(), [0.5], 4)[0] / math.sqrt(features * 7)
        assert quantizer.step_size.grad.item() == pytest.approx(expected, rel=1e-4, abs=1e-5), shape


def check_unsigned_gradient_scale(lsq):
    """Q_P is 2^bits - 1 where the activation is unsigned."""
    x = torch.full((3, 4), 100.0)  # all above the grid: the slope is Q_P each
    quantizer = activation(QuantSpec(bits=4, granularity="tensor", signed=False), lsq=lsq)
    quantizer(x).sum().backward()
    assert quantizer.step_size.grad.item() == pytest.approx(12 * 15 / math.sqrt(4 * 15))


def check_weight_start(lsq):
    """2<|v|>/sqrt(Q_P) over the elements that share a scale, or max|v|/Q_P; in the paper no other statistic."""
    for shape, spec, _ in SHARED:
        weight = torch.randn(shape)
        blocks = weight.double().abs().reshape(*lsq.scale_shape(shape, spec), -1)
        high = HIGHEST[spec.bits]
        published = lsq.WeightLSQ(spec, weight, "layer").step_size
        torch.testing.assert_close(published.double(), 2 * blocks.mean(-1) / math.sqrt(high), rtol=1e-5, atol=0)
        minmax = lsq.WeightLSQ(spec, weight, "layer", Init.minmax).step_size
        torch.testing.assert_close(minmax.double(), blocks.amax(-1) / high, rtol=1e-6, atol=0)


def check_activation_start(lsq, observer=qat.quantizers.observer):
    """2<|x|>/sqrt(Q_P) over all batches, which need not be of one size."""
    quantizer = lsq.ActivationLSQ(TENSOR4, CPU, "layer")
    quantizer.initialise(statistics_of([[[1.0, -2.0], [3.0, 0.0]], [[-10.0, 4.0]]], observer))
    assert quantizer.step_size.item() == pytest.approx(2 * (20 / 6) / math.sqrt(7), rel=1e-6)
    minmax = lsq.ActivationLSQ(TENSOR4, CPU, "layer", Init.minmax)
    minmax.initialise(statistics_of([[[1.0, -2.0], [3.0, 0.0]], [[-10.0, 4.0]]], observer))
    assert minmax.step_size.item() == pytest.approx(10 / 7, rel=1e-6)


def check_sign_detection(lsq, observer=qat.quantizers.observer):
    """Unsigned where nothing is negative; a sign that the spec gives is kept."""
    batches = {True: [[[-0.001, 2.0]], [[0.0, 1.0]]], False: [[[0.0, 1.0]], [[3.0, 2.0]]]}
    for negative, values in batches.items():
        for given_sign in (None, True, False):
            quantizer = lsq.ActivationLSQ(QuantSpec(granularity="tensor", signed=given_sign), CPU, "layer")
            quantizer.initialise(statistics_of(values, observer))
            expected = negative if given_sign is None else given_sign
            assert quantizer.spec.signed is expected and bool(quantizer.signed) is expected
            x = torch.tensor([[-100.0, 100.0]])
            low, high = (-8, 7) if expected else (0, 15)
            scale = quantizer.scale().item()
            assert quantizer(x).tolist() == [[low * scale, high * scale]]
            mean = sum(abs(v) for batch in values for v in batch[0]) / 4
            assert quantizer.step_size.item() == pytest.approx(2 * mean / math.sqrt(high), rel=1e-6)


def check_observed_start(observer):
    """The same of what observes the batches."""
    check_activation_start(qat.quantizers.lsq, observer)


def check_observed_sign(observer):
    """The same of what observes the batches."""
    check_sign_detection(qat.quantizers.lsq, observer)


def check_project(lsq):
    """After project the parameter is positive, whatever the optimizer did."""
    for value in (-1e6, -1e-3, 0.0):
        quantizer = activation(lsq=lsq)
        with torch.no_grad():
            quantizer.step_size.fill_(value)
        assert quantizer(torch.randn(2, 4)).isfinite().all()
        quantizer.project()
        assert quantizer.step_size.item() == 2.0**-17


def test_gradient_scale_of_weights():
    check_weight_gradient_scale(qat.quantizers.lsq)


def test_gradient_scale_of_activations():
    check_activation_gradient_scale(qat.quantizers.lsq)


def test_gradient_scale_of_unsigned_activations():
    check_unsigned_gradient_scale(qat.quantizers.lsq)


def test_how_weights_start():
    check_weight_start(qat.quantizers.lsq)


def test_how_activations_start():
    check_activation_start(qat.quantizers.lsq)


def test_sign_detection():
    check_sign_detection(qat.quantizers.lsq)


def test_project_keeps_step_sizes_positive():
    check_project(qat.quantizers.lsq)


@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.sampled_from([1, 2, 8, 16]),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    init=st.sampled_from([init for init in Init if not init.reads_data]),
    seed=st.integers(0, 2**31),
)
def test_quantize_gives_the_integers_of_the_forward(bits, rows, groups, size, granularity, dtype, init, seed):
    spec = QuantSpec(bits=bits, granularity=granularity, group_size=size if granularity == "group" else None)
    weight = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    quantizer = qat.quantizers.WeightLSQ(spec, weight, "layer", init)
    tensor = quantizer.quantize(weight)
    trained = quantizer(weight)
    assert trained.dtype == dtype
    assert torch.equal(trained, tensor.dequantize(dtype))
    assert tensor.scale.dtype == torch.bfloat16
    codes = trained.double().reshape(*tensor.scale.shape, -1) / tensor.scale.double()[..., None]
    if dtype in (torch.float32, torch.float64):  # a code times a bf16 scale is exact there
        assert torch.equal(codes.reshape(weight.shape), tensor.codes.double())


def test_minmax_clips_by_less_than_half_a_step():
    """max|v|/Q_P is rounded to bf16, which may lower it by 2^-9: the largest magnitude still gets the code Q_P."""
    weight = torch.randn(64, 32).abs()
    tensor = qat.quantizers.WeightLSQ(QuantSpec(bits=4), weight, "layer", Init.minmax).quantize(weight)
    assert (tensor.codes.amax(1) == 7).all()
    assert ((tensor.dequantize() - weight).abs() <= 0.55 * tensor.scale.float()).all()


def test_a_weight_of_zeros_starts_positive():
    weight = torch.zeros(4, 8)
    quantizer = qat.quantizers.WeightLSQ(QuantSpec(), weight, "layer")
    assert (quantizer.step_size == 2.0**-17).all()
    assert torch.equal(quantizer(weight), weight)


@pytest.mark.parametrize(
    "cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double, lambda m: m.to("cpu", torch.bfloat16)]
)
def test_step_sizes_stay_fp32_when_the_model_is_cast(cast):
    weight = torch.randn(4, 8)
    model = nn.ModuleList([qat.quantizers.WeightLSQ(QuantSpec(), weight, "w"), activation(step_size=0.1)])
    before = [parameter.clone() for parameter in model.parameters()]
    identities = [id(parameter) for parameter in model.parameters()]
    cast(model)
    assert [id(parameter) for parameter in model.parameters()] == identities
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, value)


def test_frozen_activations_keep_their_scale_when_cast():
    frozen = qat.quantizers.FrozenActivation(
        QuantSpec(granularity="tensor", signed=True), torch.tensor([[0.3]]).bfloat16()
    )
    scale = frozen.scale.clone()
    frozen.half().double()
    assert frozen.scale.dtype == torch.bfloat16 and torch.equal(frozen.scale, scale)


def test_frozen_activation_is_its_training_twin():
    quantizer = activation(step_size=0.3)
    frozen = qat.quantizers.FrozenActivation(quantizer.spec, quantizer.scale())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(5, 7).to(dtype)
        assert torch.equal(frozen(x), quantizer(x))
    assert not list(frozen.parameters())


def test_a_huge_gradient_step_can_be_recovered_from():
    """An optimizer step far below zero: finite, projected, and the next gradients bring the step size back."""
    weight = torch.randn(1, 64)
    quantizer = qat.quantizers.WeightLSQ(QuantSpec(bits=4, granularity="tensor"), weight, "layer")
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.05)
    start = (quantizer(weight) - weight).square().mean().item()
    quantizer.step_size.grad = torch.full((1, 1), 1e6)
    optimizer.step()
    assert quantizer.step_size.item() < 0
    for _ in range(300):
        optimizer.zero_grad()
        (quantizer(weight) - weight).square().sum().backward()
        assert quantizer.step_size.grad.isfinite().all()
        optimizer.step()
        quantizer.project()
        assert quantizer.step_size.item() > 0
    assert (quantizer(weight) - weight).square().mean().item() < 2 * start


def test_uninitialised_names_the_layer_and_the_fix():
    quantizer = qat.quantizers.ActivationLSQ(TENSOR4, CPU, "blocks.3.fc", Init.lsq)
    for use in (lambda: quantizer(torch.randn(2, 3)), quantizer.scale):
        with pytest.raises(StateError, match=r"'blocks.3.fc' was never initialised: run qat.calibrate"):
            use()


def test_disabled_passes_through():
    for quantizer in (activation(), qat.quantizers.WeightLSQ(QuantSpec(), torch.randn(4, 8), "layer")):
        quantizer.enabled = False
        x = torch.randn(4, 8)
        assert quantizer(x) is x


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign):
    """Scale, sign and the flag come back, in an instance that was never calibrated."""
    trained = qat.quantizers.ActivationLSQ(TENSOR4, CPU, "layer", Init.lsq)
    trained.initialise(statistics_of([[[0.0, 1.5, 4.0]]]))
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh = qat.quantizers.ActivationLSQ(TENSOR4, CPU, "layer", Init.lsq)
    identity = id(fresh.step_size)
    fresh.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert fresh.is_initialised and bool(fresh.initialised)
    assert fresh.spec == trained.spec and fresh.spec.signed is False
    assert assign or id(fresh.step_size) == identity
    x = torch.randn(3, 5)
    assert torch.equal(fresh(x), trained(x))


def test_an_uninitialised_state_dict_leaves_it_uninitialised():
    saved = qat.quantizers.ActivationLSQ(TENSOR4, CPU, "layer", Init.lsq).state_dict()
    quantizer = activation()
    quantizer.load_state_dict(saved)
    assert not quantizer.is_initialised
    with pytest.raises(StateError):
        quantizer(torch.randn(2, 2))


def test_initialising_keeps_the_parameter():
    quantizer = qat.quantizers.ActivationLSQ(TENSOR4, CPU, "layer", Init.lsq)
    parameter = quantizer.step_size
    quantizer.initialise(statistics_of([[[1.0, -1.0]]]))
    assert quantizer.step_size is parameter and parameter.requires_grad and parameter.is_leaf


def test_a_copy_is_independent():
    quantizer = activation(step_size=0.5)
    twin = copy.deepcopy(quantizer)
    twin.set_step_size(torch.tensor(2.0))
    assert quantizer.step_size.item() == 0.5 and twin.is_initialised


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_statistics_with_nan_are_refused(bad):
    quantizer = qat.quantizers.ActivationLSQ(TENSOR4, CPU, "encoder.fc", Init.lsq)
    with pytest.raises(StateError, match=r"'encoder.fc' saw NaN or infinity"):
        quantizer.initialise(statistics_of([[[1.0, 2.0]], [[bad, 1.0]], [[1.0, 2.0]]]))
    assert not quantizer.is_initialised


def test_nothing_observed_is_refused():
    quantizer = qat.quantizers.ActivationLSQ(TENSOR4, CPU, "encoder.fc", Init.lsq)
    with pytest.raises(StateError, match=r"'encoder.fc' was never reached"):
        quantizer.initialise(statistics_of([]))


def test_statistics_count_half_precision_exactly():
    """Sums run in float64: 2^16 times 1 + 2^-7 in bf16, whose own sum would stall at 256."""
    statistics = statistics_of([torch.full((2**16,), 1 + 2**-7, dtype=torch.bfloat16)])
    assert statistics.sums.tolist() == [2**16 + 2**9, 2**16]


def test_an_empty_batch_counts_nothing():
    """A mixture-of-experts layer may get no token from a batch."""
    statistics = statistics_of([torch.zeros(0, 4), torch.ones(1, 4), torch.zeros(0, 4)])
    assert statistics.sums.tolist() == [4, 4]
    for shape in ((0, 4), (2, 0, 4)):
        assert activation()(torch.zeros(shape)).shape == shape
