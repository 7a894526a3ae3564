"""Fused dynamic rounding against qat.quantizers.dynamic: interpreted on a CPU; ``-m gpu`` compiles for CUDA."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qat.kernels import round_dynamic as kernels

from qat.quantizers import dynamic
from qat.spec import Dynamic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def same_bits(one, other):
    """Return whether two tensors have the same dtype, shape and bits; one NaN is like another."""
    integers = {2: torch.int16, 4: torch.int32}[one.element_size()]
    one, other = one.contiguous(), other.contiguous()
    differ = one.view(integers) != other.view(integers)
    return one.dtype == other.dtype and one.shape == other.shape and not (differ & ~(one.isnan() & other.isnan())).any()


def assert_like_the_reference(x, kind):
    grad = torch.randn_like(x)
    for dtype in (None, torch.bfloat16):
        assert same_bits(kernels.rounded(x, kind, dtype), dynamic.rounded(x, kind, dtype))
    expected = dynamic.rounded_gradient(grad, x, kind)
    assert same_bits(kernels.rounded_gradient(grad, x, kind), expected)
    y, grad_x = kernels.reround_(grad.clone(), x, kind, dtype=torch.bfloat16)
    assert same_bits(y, dynamic.rounded(x, kind, torch.bfloat16))
    assert same_bits(grad_x, expected)


@pytest.mark.parametrize("kind", list(Dynamic))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 32), (3, 5, 64), (2, 4128), (33, 96)], ids=str)
def test_grid(shape, dtype, kind):
    assert_like_the_reference((torch.randn(shape, device=DEVICE) * 3 + 0.5).to(dtype), kind)


@pytest.mark.parametrize("kind", list(Dynamic))
@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([1e-30, 1e-4, 1.0, 3e4]),  # the interpreter reads subnormal bf16 wrongly
    st.floats(-3, 3),
    st.sampled_from(DTYPES),
)
def test_any_row(kind, seed, tokens, k, size, offset, dtype):
    torch.manual_seed(seed)
    k = 32 * (k % 4 + 1) if kind == Dynamic.q8_0 else k
    x = (torch.randn(tokens, k, device=DEVICE) + offset) * size
    assert_like_the_reference(x.clamp(-6e4, 6e4).to(dtype), kind)  # finite in fp16: a NaN has many bit patterns


@pytest.mark.parametrize("kind", list(Dynamic))
@pytest.mark.parametrize("value", [0.0, -0.0, 5.0, -5.0, math.inf, math.nan])
def test_constant_and_broken_rows(value, kind):
    x = torch.full((3, 64), value, device=DEVICE)
    x[1, 7] = 1.0
    assert_like_the_reference(x, kind)


def test_clipped_codes_lose_their_gradient():
    """From -85.5 to 169.5 the factor is 1, and the zero point -42.5 goes to -42: 169.5 would get code 128."""
    x = torch.tensor([[-85.5, 0.25, 169.5], [-1.0, 0.0, 2.0]], device=DEVICE)
    grad = kernels.rounded_gradient(torch.ones_like(x), x, Dynamic.int8_token)
    assert grad.tolist() == [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    assert_like_the_reference(x, Dynamic.int8_token)


@pytest.mark.parametrize(
    ("low", "high", "zero_point", "clipped"),
    [
        ("-0x1.f1eb64p+0", "0x1.a2dcd8p-1", 51, [True, False]),
        ("-0x1.53b8a8p-1", "0x1.dd986p+1", -90, [True, False]),
        ("-0x1.8ed42p-1", "0x1.7dbc68p+0", -40, [False, True]),
        ("-0x1.a83466p+1", "0x1.2b4e6p+0", 61, [False, False]),
        ("-0x1.9e9aap-3", "0x1.cf8ce6p+1", -114, [False, True]),
    ],
)
def test_rows_that_float32_decides(low, high, zero_point, clipped):
    """Found among 4 million: an end is clipped by one rounding, or the two formulas of the zero point differ."""
    x = torch.tensor([[float.fromhex(low), float.fromhex(high)]], device=DEVICE)
    assert dynamic.dynamic_codes(x, Dynamic.int8_token)[2].item() == zero_point
    grad = kernels.rounded_gradient(torch.ones_like(x), x, Dynamic.int8_token)
    assert (grad == 0).tolist() == [clipped]
    assert_like_the_reference(x, Dynamic.int8_token)


def test_layouts_and_empty():
    x = torch.randn(6, 8, 32, device=DEVICE)
    for laid_out in (x.transpose(0, 1), x[:, ::2], x[:0]):
        for kind in Dynamic:
            assert_like_the_reference(laid_out, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(Dynamic))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [2048, 8192, 11008, 32768])
def test_grid_on_gpu(k, dtype, kind):
    x = (torch.randn(4, 257, k, device=DEVICE) * 3 + 0.5).to(dtype)
    assert_like_the_reference(x, kind)
    assert same_bits(kernels.rounded(x, kind).cpu(), dynamic.rounded(x.cpu(), kind))
