"""What the tests of the int4 kernels share: random weights and inputs, and how far from float64 an output may be."""

import torch
import torch.nn.functional as F
from qat.kernels import int4_linear as module
from qat.kernels.int4_layout import prepack

from qat.packing import pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def int4_linear(x, packed, scale, bias, in_features, group_size, zero_point=None):
    return module.int4_linear(x, prepack(packed, scale, zero_point, in_features, group_size), bias)


def int4_linear_reference(x, packed, scale, bias, in_features, zero_point=None):
    group_size = in_features // scale.shape[1]
    return module.int4_linear_reference(x, prepack(packed, scale, zero_point, in_features, group_size), bias)


def make_weight(n, k, group, scale_dtype=torch.bfloat16, device=DEVICE):
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
    scale = (torch.rand(n, k // group, device=device) * 0.1 + 0.01).to(scale_dtype)
    return codes, pack(codes, 4), scale


def make_inputs(m, n, k, dtype, with_bias, device=DEVICE):
    x = torch.randn(m, k, device=device).to(dtype)
    return x, torch.randn(n, device=device).to(dtype) if with_bias else None


def rms(x):
    return x.square().mean().sqrt()


def assert_accurate(y, x, weight, bias=None):
    """Check y against float64 by two bounds: one rounding of a float32 sum, and the plain matmul's error times 1.1.

    A float32 sum of K terms in any order is off by about sqrt(K) units of 2^-24 of the sum of magnitudes at most
    (Higham and Mary 2019, doi:10.1137/18M1226312); twice that leaves room for tensor cores, which may truncate.
    """
    x64, w64 = x.double(), weight.double()
    exact, magnitude = x64 @ w64.T, x64.abs() @ w64.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    error = (y.double() - exact).abs()
    one_rounding = HALF_ULP[y.dtype] * exact.abs() + torch.finfo(y.dtype).smallest_normal * HALF_ULP[y.dtype]
    assert (error <= 1.01 * one_rounding + 2 * (x.shape[-1] + 1) ** 0.5 * 2.0**-24 * magnitude).all()
    plain = (F.linear(x, weight, bias).double() - exact).abs()
    assert rms(error) <= 1.1 * rms(plain) + 2.0**-24 * rms(magnitude)
