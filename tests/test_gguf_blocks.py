"""GGUF's blocks: pinned by hand to the byte, and every weight exact in them or refused."""

import pytest
import torch
from gguf_models import random_tensor
from hypothesis import given
from hypothesis import strategies as st

import qat
from qat.errors import ArtifactError
from qat.formats import gguf_blocks
from qat.numerics import QuantizedTensor
from qat.quantized_model import QuantizedLayer


def block(text):
    return torch.tensor([list(bytes.fromhex(text.replace(" ", "")))], dtype=torch.uint8)


def test_a_q4_0_block_to_the_nibble():
    codes = torch.arange(32, dtype=torch.int8)[None] % 16 - 8
    tensor = QuantizedTensor(codes, torch.tensor([[0.5]]).bfloat16(), qat.QuantSpec(group_size=32, signed=True))
    expected = block("00 38 00112233445566778899aabbccddeeff")  # fp16 0.5; low nibble i, high nibble i + 16
    assert torch.equal(gguf_blocks.encode(tensor, "Q4_0"), expected)
    codes[0, 17] = -8  # the high nibble of byte 1
    assert gguf_blocks.encode(tensor, "Q4_0")[0, 3] == 0x01


def test_a_q4_1_block_to_the_nibble():
    codes = torch.full((1, 32), -8, dtype=torch.int8)
    spec = qat.QuantSpec(group_size=32, signed=True, symmetric=False)
    tensor = QuantizedTensor(codes, torch.tensor([[0.5]]).bfloat16(), spec, torch.tensor([[-6]], dtype=torch.int8))
    assert torch.equal(gguf_blocks.encode(tensor, "Q4_1"), block("00 38 00 bc" + "00" * 16))  # m = -2 * 0.5


def test_a_minimum_that_fp16_would_round_turns_the_block_upside_down():
    """15 * (1 + 127/128) needs 12 bits; minus the step and m = 0 do not."""
    codes = torch.full((1, 32), -8, dtype=torch.int8)
    spec = qat.QuantSpec(group_size=32, signed=True, symmetric=False)
    tensor = QuantizedTensor(codes, torch.tensor([[255 / 128]]).bfloat16(), spec, torch.tensor([[7]], dtype=torch.int8))
    blocks = gguf_blocks.encode(tensor, "Q4_1")
    assert torch.equal(blocks, block("f8 bf 00 00" + "ff" * 16))
    assert torch.equal(gguf_blocks.decode(blocks, "Q4_1").dequantize(), tensor.dequantize())


def test_a_q8_0_block_to_the_byte():
    codes = torch.arange(-16, 16, dtype=torch.int8)[None]
    tensor = QuantizedTensor(codes, torch.tensor([[1.0]]).bfloat16(), qat.QuantSpec(bits=8, group_size=32, signed=True))
    expected = block("00 3c f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff 000102030405060708090a0b0c0d0e0f")
    assert torch.equal(gguf_blocks.encode(tensor, "Q8_0"), expected)


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 32, 64, 96, "tensor"]),
    symmetric=st.booleans(),
    scale=st.sampled_from(["bfloat16", "float16"]),
    rows=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_blocks_keep_every_weight(bits, group, symmetric, scale, rows, seed):
    grid = {"granularity": "tensor"} if group == "tensor" else {"group_size": group}
    spec = qat.QuantSpec(bits=bits, signed=True, symmetric=symmetric or bits > 4, scale_dtype=scale, **grid)
    tensor = random_tensor(rows, 192, spec, seed)
    kind = gguf_blocks.block_type(QuantizedLayer("Linear", [rows, 192], spec, None))
    try:
        read = gguf_blocks.decode(gguf_blocks.encode(tensor, kind), kind)
    except ArtifactError as error:  # an fp16 step times a zero point need not be an fp16 number
        assert not symmetric and scale == "float16" and "fp16 would round" in str(error)
        return
    assert torch.equal(read.dequantize(), tensor.dequantize())
    assert torch.equal(read.codes, tensor.codes)
    assert read.spec.symmetric == tensor.spec.symmetric
    assert torch.equal(read.scale.float(), gguf_blocks.spread(tensor.scale, rows, 6).float())


def test_bf16_steps_are_exact_in_q4_1_for_every_zero_point():
    bits = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)  # every significand
    spec = qat.QuantSpec(group_size=32, signed=True, symmetric=False)
    for zero_point in range(-8, 8):
        codes = (torch.arange(32) % 16 - 8).to(torch.int8).expand(128, 32)
        tensor = QuantizedTensor(codes, bits[:, None], spec, torch.full((128, 1), zero_point, dtype=torch.int8))
        read = gguf_blocks.decode(gguf_blocks.encode(tensor, "Q4_1"), "Q4_1")
        assert torch.equal(read.dequantize(), tensor.dequantize())
        assert torch.equal(read.zero_point, tensor.zero_point)


def test_negative_and_zero_steps_of_llama_cpp_keep_their_values():
    read = gguf_blocks.decode(block("00 b8" + "0f" * 16), "Q4_0")  # d = -0.5, nibbles 15 and 0
    assert read.dequantize()[0, 0] == -0.5 * 7 and read.dequantize()[0, 16] == -0.5 * -8
    assert read.zero_point.tolist() == [[-1]] and (read.scale > 0).all()
    empty = gguf_blocks.decode(block("00 00" + "0f" * 16), "Q4_0")
    assert not empty.dequantize().any() and (empty.scale > 0).all()
    with pytest.raises(ArtifactError, match="no zero point equals it"):
        gguf_blocks.decode(block("00 3c 00 b8" + "00" * 16), "Q4_1")  # d = 1, m = -0.5


def test_a_float32_step_that_fp16_would_round_is_refused():
    tensor = random_tensor(2, 32, qat.QuantSpec(signed=True, scale_dtype="float32"))
    with pytest.raises(ArtifactError, match="2 steps or minima that fp16 would round"):
        gguf_blocks.encode(tensor, "Q4_0")


@pytest.mark.clients
def test_files_of_llama_cpps_own_quantizer_are_read_exactly(tmp_path):
    package = pytest.importorskip("gguf")
    weight = torch.randn(4, 64)
    blocks = package.quants.quantize(weight.numpy(), package.GGMLQuantizationType.Q4_0)
    expected = package.dequantize(blocks, package.GGMLQuantizationType.Q4_0)
    read = gguf_blocks.decode(torch.from_numpy(blocks), "Q4_0")
    assert not read.spec.symmetric
    assert torch.equal(read.dequantize(), torch.from_numpy(expected))
