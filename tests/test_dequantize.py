"""The dequantization kernel under Triton's interpreter, and on a GPU: the same bits as the reference arithmetic."""

import pytest
import torch
from random_quantized import random_tensor, weight

import qat
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
LAID_OUT = SPECS.keys() - {"odd number of groups"}


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
def test_bits_are_those_of_the_reference(device, dtype, name, rows, inputs):
    """In the kernels' layout where that takes the weight, as a GPU lays it out, and in the checkpoint's."""
    tensor = tensor_of(SPECS[name], rows, inputs)
    packed = PackedWeight.from_tensor(tensor).to(device)
    packed.prepack()
    laid_out = bool(packed.gpu_operands)
    assert laid_out == (name in LAID_OUT)
    expected = tensor.dequantize(dtype)
    for _ in range(2):
        made = packed.dequantize(dtype)
        assert made.shape == expected.shape and made.dtype is dtype
        assert torch.equal(made.cpu(), expected)
        packed._undo_prepack()


def test_a_layer_on_a_cpu_does_not_come_here(monkeypatch):
    monkeypatch.setattr("qat.kernels.int4_linear.int4_dequantize", None)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 8))
    policy = qat.QuantPolicy(weight=qat.QuantSpec(codebook="nf4", group_size=32))
    qat.freeze(qat.prepare(layer, policy, verbose=False))(torch.randn(2, 64))
