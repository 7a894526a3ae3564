"""Packed weights: codes come back whatever order they lie in, and torch's int4 operator gets what it computes right.

``check_*`` takes the modules under test, so that the mutants' tests can show that it fails on a wrong one.
"""

import pytest
import torch
from frozen_linears import frozen_linear, random_tensor

import qat.layers.cpu_int4
import qat.layers.packed
import qat.numerics
from qat import QuantSpec
from qat.errors import StateError


def check_packed_weight(packed):
    """Codes, scale and shape come back; 4-bit codes lie two a byte, the even one in the low nibble."""
    spec = QuantSpec(bits=4, signed=True)
    codes = torch.tensor([[-8, 7, 0], [1, -1, 3]], dtype=torch.int8)
    scale = torch.tensor([[0.5], [0.25]]).bfloat16()
    weight = packed.PackedWeight.from_tensor(qat.numerics.QuantizedTensor(codes, scale, spec))
    assert weight.packed.tolist() == [[0xF0, 0x08], [0x79, 0x0B]]
    assert torch.equal(weight.codes(), codes)
    assert weight.dequantize(torch.bfloat16).tolist() == [[-4, 3.5, 0], [0.25, -0.25, 0.75]]
    assert weight.quantized_tensor().spec == spec
    empty = packed.PackedWeight(spec, (2, 3))
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in weight.state_dict().items()
    }


def check_cpu_operands_follow_the_weight(packed):
    """What torch's operator reads is made again after a load, and never stored."""
    one, other = (frozen_linear(random_tensor(seed=seed), packed=packed) for seed in (0, 1))
    x = torch.randn(3, 64).bfloat16()
    first, second = one(x), other(x)
    assert not torch.equal(first, second)
    assert set(one.state_dict()) == {"bias", "packed_weight.packed", "packed_weight.scale"}
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), second)
    one.to(torch.bfloat16)
    assert one.packed_weight.cpu_operands is None and one.packed_weight.scale.dtype == torch.bfloat16
    assert torch.equal(one(x), second)


def check_prepacked_weight(packed):
    """Codes in the kernels' order, as on a GPU: same state dict, same codes, same outputs; a load lays out anew."""
    one, other = (frozen_linear(random_tensor(seed=seed), packed=packed) for seed in (0, 1))
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    codes = one.packed_weight.codes()
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(3, 64).to(dtype)
        expected = other(x)
        other.packed_weight.prepack()
        torch.testing.assert_close(other(x), expected, rtol=2e-3, atol=2e-3)
        assert torch.equal(other.packed_weight.dequantize(dtype), one_shot(other, dtype))
    one.packed_weight.prepack()
    assert one.packed_weight.packed.numel() == 0
    assert {name: tensor.tolist() for name, tensor in one.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }
    assert torch.equal(one.packed_weight.codes(), codes)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.packed_weight.codes(), codes)
    one.to(torch.bfloat16)
    assert torch.equal(one.packed_weight.codes(), codes)


def check_prepacked_scales(packed):
    """A scale that the dtype of x cannot hold is not rounded to it."""
    tensor = random_tensor()
    tensor.scale = tensor.scale.float() * (1 + 2.0**-20)
    layer = frozen_linear(tensor, packed=packed)
    layer.packed_weight.prepack()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(layer.packed_weight.dequantize(dtype), one_shot(layer, dtype))
        assert layer.packed_weight.gpu_operands[dtype].scale.dtype == torch.float32


def one_shot(layer, dtype):
    tensor = layer.packed_weight.quantized_tensor()
    return qat.numerics.dequantize(tensor.codes, tensor.scale, dtype, tensor.zero_point)


def check_operator_fits(cpu_int4):
    """Only shapes and dtypes that torch's operator computes right."""
    weight = qat.layers.packed.PackedWeight.from_tensor(random_tensor())
    x = torch.randn(2, 64)
    assert cpu_int4.fits(x.bfloat16(), weight)
    assert not cpu_int4.fits(x, weight) and not cpu_int4.fits(x.half(), weight)
    assert not cpu_int4.fits(x.bfloat16().requires_grad_(), weight)
    with torch.no_grad():
        assert cpu_int4.fits(x.bfloat16().requires_grad_(), weight)
    finer = [random_tensor(scale_dtype=dtype) for dtype in (torch.float16, torch.float32)]  # it would round them
    for other in (random_tensor((24, 64)), random_tensor(bits=3), random_tensor(group=16), *finer):
        assert not cpu_int4.fits(x.bfloat16(), qat.layers.packed.PackedWeight.from_tensor(other))


def check_operator(cpu_int4):
    """torch's int4 operator against float64: its rounding of the output, and a float32 sum's error, no more."""
    tensor = random_tensor((48, 256), group=64)
    weight = qat.layers.packed.PackedWeight.from_tensor(tensor)
    exact_weight = tensor.codes.double() * tensor.scale.double().repeat_interleave(64, 1)
    bias = torch.randn(48).bfloat16()
    for batch in ((), (0,), (1,), (5,), (2, 3), (0, 3)):
        x = torch.randn(*batch, 256).bfloat16()
        y = cpu_int4.int4_linear(x, weight, None)
        assert y.shape == (*batch, 48) and y.dtype == torch.bfloat16
        exact = x.double() @ exact_weight.T
        magnitude = x.double().abs() @ exact_weight.T.abs()
        assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-20 * magnitude).all()
        assert torch.equal(cpu_int4.int4_linear(x, weight, bias), y + bias)
    strided = torch.randn(3, 2, 256).bfloat16().transpose(0, 1)
    assert torch.equal(
        cpu_int4.int4_linear(strided, weight, None), cpu_int4.int4_linear(strided.contiguous(), weight, None)
    )
    for columns in (torch.randn(256, 5).bfloat16().t(), torch.randn(5, 512).bfloat16()[:, ::2], strided[:, 0]):
        assert torch.equal(
            cpu_int4.int4_linear(columns, weight, None), cpu_int4.int4_linear(columns.contiguous(), weight, None)
        )


def test_packed_weight():
    check_packed_weight(qat.layers.packed)


def test_cpu_operands_follow_the_weight():
    check_cpu_operands_follow_the_weight(qat.layers.packed)


def test_prepacked_weight():
    check_prepacked_weight(qat.layers.packed)
    check_prepacked_scales(qat.layers.packed)


def test_data_parallel_is_refused_where_weights_lie_as_one_gpu_reads_them():
    weight = frozen_linear(random_tensor()).packed_weight
    weight._replicate_for_data_parallel()
    weight.prepack()
    with pytest.raises(StateError, match="run a process for each GPU"):
        weight._replicate_for_data_parallel()


def test_when_torchs_operator_is_used():
    check_operator_fits(qat.layers.cpu_int4)


def test_torchs_operator():
    check_operator(qat.layers.cpu_int4)
