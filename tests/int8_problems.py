"""What the tests of products of integers share: grids of inputs, random weights, and training's integers in float64."""

import torch
from int4_problems import DEVICE, HALF_ULP
from qat.kernels import int8_linear as module
from qat.kernels.int4_layout import prepack
from qat.kernels.int8_codes import int8_codes_reference

from qat.numerics import quantize
from qat.packing import pack
from qat.quantizers.dynamic import dynamic_codes
from qat.spec import Dynamic, QuantSpec

# A trained scale, bits, signed, zero point; no scale is int8 for each token.
GRIDS = {
    "token": (None, 8, True, None),
    "int8": (0.03, 8, True, None),
    "uint8": (0.015, 8, False, None),
    "int4": (0.3, 4, True, None),
    "uint4": (0.2, 4, False, None),
    "int2": (0.7, 2, True, None),
    "int8 with an offset": (0.02, 8, True, -77),
    "int4 with an offset": (0.3, 4, True, -5),
}


def grid_of(name, device=DEVICE):
    scale, bits, signed, zero_point = GRIDS[name]
    if zero_point is not None:
        zero_point = torch.tensor([[zero_point]], dtype=torch.int8, device=device)
    scale = None if scale is None else torch.tensor([[scale]], dtype=torch.bfloat16, device=device)
    return scale, bits, signed, zero_point


def make_weight(n, k, group, with_zero=False, scale_dtype=torch.bfloat16, device=DEVICE):
    """Return codes less zero points (N, K) and scales (N, K), in float64, and the weight."""
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
    scale = (torch.rand(n, k // group, device=device) * 0.1 + 0.01).to(scale_dtype)
    zero_point = torch.randint(-8, 8, scale.shape, dtype=torch.int8, device=device) if with_zero else None
    values = codes.double()
    if with_zero:
        values -= zero_point.double().repeat_interleave(group, 1)
    return values, scale.double().repeat_interleave(group, 1), prepack(pack(codes, 4), scale, zero_point, k, group)


def integers_of(x, name):
    """Return code - zero point (M, K) and the step (M, 1) of training, in float64."""
    scale, bits, signed, zero_point = grid_of(name, x.device)
    if scale is None:
        codes, step, zero_point = dynamic_codes(x, Dynamic.int8_token)
        return (codes - zero_point).double(), step.double()
    spec = QuantSpec(bits=bits, granularity="tensor", signed=signed)
    less = 0.0 if zero_point is None else zero_point.double()
    return quantize(x, scale, spec, zero_point).double() - less, scale.double()


def assert_exact_but_for_float32_sums(y, x, name, weight, bias=None):
    """Check y against integers: float32 sums of parts, correction for zero points, step and bias, and y's dtype.

    A float32 sum of P terms is off by about sqrt(P) units of 2^-24 of the sum of magnitudes at most, and twice that is
    allowed, as in tests/test_int4_linear.py. The magnitudes are those of parts of 64 inputs, with the zero point in.
    """
    values, scale, packed = weight
    integers, step = integers_of(x, name)
    exact = integers @ (values * scale).T * step
    shift = int8_codes_reference(x, *grid_of(name, x.device)).shift
    parts = -(-x.shape[1] // 64)
    stored = integers + shift.double()[:, None]
    magnitude = sum((stored[:, k : k + 64] @ (values * scale)[:, k : k + 64].T).abs() for k in range(0, x.shape[1], 64))
    magnitude += (shift.double()[:, None] * (values * scale).sum(1)).abs()
    magnitude = magnitude * step
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    one_rounding = HALF_ULP[y.dtype] * exact.abs() + torch.finfo(y.dtype).smallest_normal * HALF_ULP[y.dtype]
    error = (y.double() - exact).abs()
    assert (error <= 1.01 * one_rounding + 2 * (parts + 4) ** 0.5 * 2.0**-24 * magnitude).all()
    assert packed.out_features == y.shape[1]


def product(x, weight, name, bias=None, dtype=None):
    return module.int8_linear(x, weight[2], module.row_sums(weight[2]), *grid_of(name, x.device), bias, dtype)
