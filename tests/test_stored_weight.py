"""What is stored of a weight: names, dtypes and bytes as documented, and nothing lost on the way back."""

import pytest
import torch
from random_quantized import random_tensor

import qat.stored_weight
from qat import QuantSpec
from qat.layers import PackedWeight
from qat.numerics import QuantizedTensor

# (spec, {part: (dtype, shape)}) of a weight with 6 outputs and 64 inputs
STORED = [
    (QuantSpec(bits=4, signed=True), {"packed": (torch.uint8, (6, 32)), "scale": (torch.bfloat16, (6, 1))}),
    (
        QuantSpec(bits=3, group_size=32, signed=True, symmetric=False, scale_dtype="float16"),
        {
            "packed": (torch.uint8, (6, 24)),
            "scale": (torch.float16, (6, 2)),
            "zero_point": (torch.int8, (6, 2)),
        },
    ),
    (
        QuantSpec(codebook="nf4", group_size=32),
        {"packed": (torch.uint8, (6, 32)), "scale": (torch.float32, (6, 2))},
    ),
    (
        QuantSpec(codebook="nf4_double", group_size=32),
        {
            "packed": (torch.uint8, (6, 32)),
            "scale_codes": (torch.uint8, (6, 2)),
            "scale_factor": (torch.float32, (1,)),
            "scale_offset": (torch.float32, ()),
            "scale_levels": (torch.float32, (256,)),
        },
    ),
    (
        QuantSpec(bits=2, codebook="custom", group_size=64),
        {
            "packed": (torch.uint8, (6, 16)),
            "scale": (torch.float32, (6, 1)),
            "levels": (torch.float32, (6, 4)),
        },
    ),
]


def quantized(spec):
    if spec.codebook != "custom":
        return random_tensor(6, 64, spec)
    levels = torch.tensor([-1.0, -0.25, 0.5, 1.0]) * torch.arange(1, 7)[:, None]
    return QuantizedTensor(torch.arange(6 * 64).view(6, 64).to(torch.int8) % 4, torch.rand(6, 1), spec, levels=levels)


def check_parts(stored_weight):
    """Each part is there under its name, in its dtype and shape; the first code lies in the lowest bits."""
    for spec, expected in STORED:
        tensor = quantized(spec)
        parts = stored_weight.parts_of(tensor)
        assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == expected
        assert list(parts) == list(stored_weight.layouts(spec, tensor.codes.shape)) and set(parts) <= set(
            stored_weight.NAMES
        )
        first = parts["packed"][:, 0].int() % 2**spec.bits
        assert torch.equal(first, tensor.codes[:, 0].int() + spec.q_n)


def check_nothing_is_lost(stored_weight):
    """What comes back has the same codes, scales and zero points, and the same values to the bit."""
    for spec, _ in STORED:
        tensor = quantized(spec)
        back = stored_weight.tensor_of(stored_weight.parts_of(tensor), spec, tensor.codes.shape)
        assert torch.equal(back.codes, tensor.codes) and back.codes.dtype == torch.int8
        for name in ("scale", "zero_point", "levels"):
            here, there = getattr(back, name), getattr(tensor, name)
            assert (here is None) == (there is None)
            assert here is None or (here.dtype == there.dtype and torch.equal(here, there))
        assert torch.equal(back.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("check", [check_parts, check_nothing_is_lost])
def test_what_is_stored(check):
    check(qat.stored_weight)


@pytest.mark.parametrize("spec", [spec for spec, _ in STORED], ids=str)
def test_a_state_dict_holds_the_same(spec):
    tensor = quantized(spec)
    state = PackedWeight.from_tensor(tensor).state_dict()
    parts = qat.stored_weight.parts_of(tensor)
    assert state.keys() == parts.keys()
    assert all(torch.equal(state[name], part) for name, part in parts.items())
