"""int4_linear as an operator: axes, strides, gradients, autocast, torch.compile, refusals, and without Triton."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from int4_problems import DEVICE, DTYPES, assert_accurate, int4_linear, int4_linear_reference, make_inputs, make_weight
from qat.kernels import int4_linear as module
from qat.kernels.int4_layout import Int4Weight, prepack

from qat.errors import LayerError
from qat.numerics import dequantize


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (5,), (2, 3, 4)])
def test_leading_axes(lead):
    codes, packed, scale = make_weight(9, 32, 32)
    x = torch.randn(*lead, 32, device=DEVICE, requires_grad=True)
    bias = torch.randn(9, device=DEVICE, requires_grad=True)
    y = int4_linear(x, packed, scale, bias, 32, 32)
    torch.testing.assert_close(y, F.linear(x, dequantize(codes, scale, x.dtype), bias))
    grad_x, grad_bias = torch.autograd.grad(y.sum(), (x, bias))
    assert grad_x.shape == x.shape
    assert grad_bias.tolist() == [x[..., 0].numel()] * 9


def test_strides():
    torch.manual_seed(0)
    _, packed, scale = make_weight(40, 64, 32)
    x, bias = make_inputs(6, 40, 64, torch.bfloat16, True)
    expected = int4_linear(x, packed, scale, bias, 64, 32)
    column_major = [t.T.contiguous().T for t in (x, packed, scale)]
    assert not any(t.is_contiguous() for t in column_major)
    every_other = torch.stack([bias, bias], 1)[:, 0]
    assert torch.equal(int4_linear(*column_major, every_other, 64, 32), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    torch.manual_seed(0)
    codes, packed, scale = make_weight(65, 96, 32)
    x, bias = make_inputs(17, 65, 96, dtype, True)
    grad_y = torch.randn(17, 65, device=DEVICE).to(dtype)
    y = int4_linear(x.requires_grad_(), packed, scale, bias.requires_grad_(), 96, 32)
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad_y)
    assert_accurate(grad_x, grad_y, dequantize(codes, scale, dtype).T)
    torch.testing.assert_close(grad_bias, grad_y.double().sum(0).to(dtype))


def test_autocast_does_not_apply_inside():
    torch.manual_seed(0)
    _, packed, scale = make_weight(20, 64, 32)
    x, bias = make_inputs(4, 20, 64, torch.float32, True)
    x.requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            y = int4_linear(x, packed, scale, bias, 64, 32)
            reference = int4_linear_reference(x, packed, scale, bias, 64)
            results.append((y, reference, torch.autograd.grad(y.sum(), x)[0]))
    assert all(torch.equal(without, with_it) for without, with_it in zip(*results, strict=True))


def test_op_registration():
    _, packed, scale = make_weight(20, 64, 32)
    x, bias = make_inputs(4, 20, 64, torch.float32, True)
    w = prepack(packed, scale, torch.zeros_like(scale, dtype=torch.int8), 64, 32)
    for x_, bias_ in ((x, None), (x.clone().requires_grad_(), bias.clone().requires_grad_()), (x[:0], bias)):
        arguments = (x_, w.words, w.scale, w.zero_point, None, None, bias_, 20, 64, 32)
        torch.library.opcheck(torch.ops.qat.int4_linear.default, arguments)
    torch.library.opcheck(torch.ops.qat.int4_dequantize.default, (*arguments[1:6], 20, 64, 32, torch.bfloat16))


def test_compiles_into_one_graph():
    torch.manual_seed(0)
    _, packed, scale = make_weight(20, 64, 32)
    x, bias = make_inputs(4, 20, 64, torch.float32, True)

    weight = prepack(packed, scale, None, 64, 32)

    def loss(x):
        return module.int4_linear(x * 2, weight, bias).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x.requires_grad_()), x)[0] for f in (loss, compiled)]
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 63)}, r"\(2, 63\), and in_features=64"),
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "x is torch.float64: cast it"),
        ({"words": torch.zeros(1, 2, 128, dtype=torch.int32)}, r"\(1, 2, 128\): .* take torch.int32 \(1, 1, 128\)"),
        ({"words": torch.zeros(1, 1, 128)}, "words is torch.float32"),
        ({"scale": torch.ones(1, 1, 16)}, r"scale is \(1, 1, 16\): 4 outputs with group_size=32 .* take \(1, 2, 16\)"),
        ({"scale": torch.ones(4, 2)}, r"scale is \(4, 2\).*prepack"),
        ({"scale": torch.ones(1, 2, 16, dtype=torch.int8)}, "scale is torch.int8"),
        ({"scale": torch.ones(1, 2, 16, device="meta")}, "scale is on meta"),
        ({"scale": torch.ones(1, 2, 16, requires_grad=True)}, r"pass scale\.detach\(\)"),
        ({"zero_point": torch.ones(1, 1, 16)}, r"zero_point is \(1, 1, 16\)"),
        ({"zero_point": torch.ones(1, 2, 16, dtype=torch.int32)}, "zero_point is torch.int32"),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\): 4 outputs"),
        ({"levels": torch.ones(8)}, r"16 levels and no zero point, not \(8,\)"),
        ({"levels": torch.ones(16), "zero_point": torch.ones(1, 2, 16)}, "a codebook has 16 levels and no zero point"),
        ({"group_size": 16}, "group_size=16 with 64 inputs.*group_size=64"),
        ({"group_size": 48}, "group_size=48"),
        ({"group_size": 0}, "group_size=0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals(change, message):
    arguments = {
        "x": torch.zeros(2, 64),
        "words": torch.zeros(1, 1, 128, dtype=torch.int32),
        "scale": torch.ones(1, 2, 16),
        "zero_point": None,
        "bias": None,
        "out_features": 4,
        "in_features": 64,
        "group_size": 32,
    } | change
    x, bias = arguments.pop("x"), arguments.pop("bias")
    with pytest.raises(LayerError, match=message):
        module.int4_linear(x, Int4Weight(**arguments), bias)


def test_runs_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from qat.kernels.int4_layout import prepack
from qat.kernels.int4_linear import backend, int4_linear
weight = prepack(torch.tensor([[0x9F]], dtype=torch.uint8), torch.ones(1, 1), None, 2, 2)
print(backend(torch.device("cpu")), int4_linear(torch.tensor([1.0, 10.0]), weight).item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "torch reference 17.0", done.stderr
