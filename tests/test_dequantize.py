"""The dequantization kernel under Triton's interpreter, and on a GPU: the same bits as the reference arithmetic."""

import pytest
import torch
from qat.kernels.dequantize import dequantize4, dequantize4_reference
from random_quantized import random_tensor, weight

import qat
from qat import backend
from qat.errors import LayerError
from qat.layers import PackedWeight
from qat.numerics import QuantizedTensor
from qat.quantizers import WeightCodebook
from qat.spec import ScaleDtype

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SPECS = {
    "group": weight(4, 32),
    "odd number of groups": weight(4, 6),
    "channel": weight(4),
    "tensor": weight(4, granularity="tensor"),
    "fp16 scales": weight(4, 32, scale_dtype="float16"),
    "fp32 scales": weight(4, 32, scale_dtype="float32"),
    "zero points": weight(4, 32, symmetric=False),
    "real zero points": weight(4, 32, symmetric=False, zero_point_dtype=ScaleDtype.float16),
    "nf4": weight(4, 32, codebook="nf4"),
    "nf4_double": weight(4, 32, codebook="nf4_double"),
}

# One table of levels for all rows, in groups of whole half tiles or whole rows.
LAID_OUT = {"group", "channel", "tensor", "fp16 scales", "fp32 scales", "zero points", "nf4", "nf4_double"}


def tensor_of(spec, rows, inputs):
    generator = torch.Generator().manual_seed(0)
    if spec.codebook is not None:
        values = torch.randn(rows, inputs, generator=generator)
        return WeightCodebook(spec, values, "").quantize(values)
    if spec.zero_point_dtype is None:
        return random_tensor(rows, inputs, spec)
    made = random_tensor(rows, inputs, weight(4, 32, symmetric=False))
    zero = torch.randn(made.scale.shape, generator=generator).half() * 3
    return QuantizedTensor(made.codes, made.scale, spec, zero)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("rows", "inputs"), [(3, 96), (70, 192)])  # less than a block, and several with a rest
def test_bits_are_those_of_the_reference(monkeypatch, device, dtype, name, rows, inputs):
    """In the checkpoint's layout, and in the tensor cores' where that takes the weight, as a GPU lays it out."""
    tensor = tensor_of(SPECS[name], rows, inputs)
    packed = PackedWeight.from_tensor(tensor).to(device)
    packed.prepack()
    laid_out = bool(packed.gpu_operands)
    assert laid_out == (name in LAID_OUT)
    made = [packed.dequantize(dtype)] if laid_out else []
    packed._undo_prepack()
    calls = []
    monkeypatch.setattr(backend, "has_kernels", lambda *_: calls.append(1) or True)
    made.append(packed.dequantize(dtype))
    expected = tensor.dequantize(dtype)
    assert calls
    for weights in made:
        assert weights.shape == expected.shape and weights.dtype is dtype
        assert torch.equal(weights.cpu(), expected)


def test_a_layer_on_a_cpu_does_not_come_here(monkeypatch):
    monkeypatch.setattr("qat.kernels.dequantize.dequantize4", None)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 8))
    policy = qat.QuantPolicy(weight=qat.QuantSpec(codebook="nf4", group_size=32))
    qat.freeze(qat.prepare(layer, policy, verbose=False))(torch.randn(2, 64))


def test_the_operator_is_registered_as_torch_wants_it():
    made = PackedWeight.from_tensor(random_tensor(4, 64, weight(4, 32, symmetric=False)))
    levels = torch.arange(-8.0, 8.0)
    arguments = (made.packed, made.scale, levels, made.zero_point, 32, torch.float32)
    torch.library.opcheck(dequantize4, arguments)
    assert torch.equal(dequantize4(*arguments), dequantize4_reference(*arguments))


def test_what_it_does_not_take():
    made, levels = PackedWeight.from_tensor(random_tensor(4, 64, weight(4, 32))), torch.arange(16.0)
    with pytest.raises(LayerError, match="16 levels"):
        dequantize4(made.packed, made.scale, levels[:8], None, 32, torch.float32)
    with pytest.raises(LayerError, match="an even size"):
        dequantize4(made.packed, made.scale, levels, None, 16, torch.float32)
    with pytest.raises(LayerError, match="bf16, fp16 or fp32"):
        dequantize4(made.packed, made.scale, levels, None, 32, torch.float64)
    with pytest.raises(LayerError, match="a zero point a scale"):
        dequantize4(made.packed, made.scale, levels, torch.zeros(3), 32, torch.float32)
