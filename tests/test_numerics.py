"""The one arithmetic, against scalar Python: codes, dequantized weights, zero points, and the scale's rounding.

Each ``check_*`` takes the module under test, so that the mutants' tests can show that it fails on a wrong one.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scalar_arithmetic import (
    COLUMNS,
    GRIDS,
    ROWS,
    SIGNS,
    bounds,
    code_of,
    interesting_ratios,
    laid_out,
    round_to,
    scale_index,
    scales_for,
    to_bfloat16,
)

import qat.numerics
from qat import QuantSpec
from qat.errors import LayerError


def same_bits(one, other):
    """Return whether two tensors without NaN are the same, signs of zeros included."""
    return one.dtype == other.dtype and torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


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


def test_nan_is_refused():
    check_refuses_nan(qat.numerics)


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
