"""Run: python -m pytest tests/test_int4_registers.py: the PTX that makes weights, followed instruction by instruction.

The few instructions are written down again from the PTX ISA, for the 32 lanes of a warp; so the weights' bits are seen
without a GPU.
"""

import re

import pytest
import torch

from qat import codebook, numerics
from qat.packing import pack

pytest.importorskip("triton")
from qat.kernels.int4_layout import prepack
from qat.kernels.int4_registers import RAISED, dequantize_asm, gl, look_up_asm, times_asm
from qat.kernels.int8_batch import unpack_asm

LANES, LOW = 32, 0xFFFFFFFF
GL = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def halves(register, dtype):
    """Return the two 16-bit floats of 32-bit registers (lanes,), as float64."""
    parts = torch.stack([register & 0xFFFF, register >> 16 & 0xFFFF])
    return parts.to(torch.uint16).view(dtype).double()


def joined(values, dtype):
    """Round float64 (2, lanes) once to nearest even and put the bits into registers."""
    digits, smallest = (11, 2.0**-24) if dtype == torch.float16 else (8, 2.0**-133)
    exponent = torch.frexp(values)[1].double()
    unit = torch.maximum(2.0 ** (exponent - digits), torch.tensor(smallest, dtype=torch.float64))
    bits = ((values / unit).round() * unit).to(dtype).view(torch.uint16).long()
    return bits[0] | bits[1] << 16


def follow(asm, operands):
    """Return $0 of a warp's lanes after the instructions; ``operands`` holds $1, $2, ... as int64 (lanes,)."""
    registers = {f"${index}": value & LOW for index, value in enumerate(operands, 1)}

    def read(name):
        return torch.full((LANES,), int(name, 0)) & LOW if name[0].isdigit() else registers[name]

    for line in asm.strip("{ }").split(";"):
        name, *rest = line.split(None, 1)[0:2] if line.strip() else [".reg"]
        if name == ".reg":
            continue
        target, *sources = (part.strip() for part in rest[0].split(","))
        a, b, c, d = (*map(read, sources), *[None] * 4)[:4]
        kind = re.search(r"(b?f16)x2", name)
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind.group(1)] if kind else None
        if name == "mov.b32":
            value = a
        elif name == "shr.u32":
            value = a >> b
        elif name == "and.b32":
            value = a & b
        elif name == "shl.b32":
            value = a << b & LOW
        elif name == "sub.u32":
            value = a - b & LOW
        elif name == "xor.b32":
            value = a ^ b
        elif name == "lop3.b32":
            value = {"0xea": a & b | c, "0x6a": a & b ^ c}[sources[3]]  # by their truth tables
        elif name == "shfl.sync.idx.b32":
            lane, segment = torch.arange(LANES), c >> 8 & 31
            assert (d == LOW).all() and (c & 31 == 31).all()  # all lanes take part, and none is out of range
            value = a[lane & segment | b & 31 & ~segment]
        elif name == "mul.rn.f32":
            product = a.to(torch.uint32).view(torch.float32) * b.to(torch.uint32).view(torch.float32)
            value = product.view(torch.uint32).long()
        elif name.startswith("cvt.rn."):
            value = joined(torch.stack([r.to(torch.uint32).view(torch.float32).double() for r in (b, a)]), dtype)
        elif name in ("add.f16x2", "mul.f16x2"):
            one, other = halves(a, dtype), halves(b, dtype)
            value = joined(one + other if name[0] == "a" else one * other, dtype)
        elif name.startswith("fma.rn."):
            value = joined(halves(a, dtype) * halves(b, dtype) + halves(c, dtype), dtype)
        else:
            raise NotImplementedError(line)
        registers[target] = value
    return registers["$0"]


def codes_of(word, plane):
    """Return u of the two inputs that a plane takes from words."""
    return torch.stack([word >> 4 * plane & 15, word >> 4 * plane + 16 & 15])


def twice(values, dtype):
    bits = values.to(dtype).view(torch.uint16).long()
    return bits | bits << 16


def factors(scale, zero, plane, dtype):
    """Return the last operands of a plane's instructions, as the kernels' ``factors`` makes them."""
    scale = twice(scale, dtype)
    if dtype == torch.float16:
        return [scale] if zero is None else [scale, twice(-1032 - zero.float(), dtype)]
    if zero is not None:
        return [follow(times_asm(6, 1), [scale]), twice((-8 - zero.float()) / 64, dtype)]
    raised = RAISED.value
    even_or_odd = follow(times_asm((129 if plane % 2 else 133) - raised, 1), [scale])
    return [even_or_odd, follow(times_asm(3 - raised, -1), [scale])]


@pytest.mark.parametrize("dtype", GL, ids=str)
@pytest.mark.parametrize("with_zero", [False, True])
@pytest.mark.parametrize("plane", range(4))
def test_even_grid(plane, with_zero, dtype):
    exponents = range(-12, 6) if dtype == torch.float16 else (-78, -40, *range(-17, 6), 16, 41)
    for exponent in exponents:
        word = torch.randint(0, 2**32, (LANES,))
        scale = ((1 + torch.rand(LANES)) * 2.0**exponent).bfloat16()
        zero = torch.randint(-8, 8, (LANES,), dtype=torch.int8) if with_zero else None
        made = follow(dequantize_asm(GL[dtype], plane, with_zero), [word, word, *factors(scale, zero, plane, dtype)])
        codes = (codes_of(word, plane) - 8).to(torch.int8)
        expected = numerics.dequantize(
            codes.T.contiguous(), scale[:, None], dtype, None if zero is None else zero[:, None]
        )
        is_raised = dtype == torch.bfloat16 and not with_zero
        assert torch.equal(halves(made, dtype) * 2.0 ** (RAISED.value * is_raised), expected.T.double())


@pytest.mark.parametrize("dtype", GL, ids=str)
@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("plane", range(4))
def test_codebook(plane, nf4, dtype):
    levels = torch.tensor(codebook.NF4) if nf4 else torch.randn(16).sort().values
    held = levels.repeat(2).view(torch.uint32).long()  # lane l has level l mod 16
    for exponent in range(-30, 6):
        word = torch.randint(0, 2**32, (LANES,))
        scale = (1 + torch.rand(LANES)) * 2.0**exponent
        bits = scale.view(torch.uint32).long()
        made = follow(look_up_asm(GL[dtype], plane), [word, word, bits, bits, held, held])
        codes = codes_of(word, plane).to(torch.int8)
        expected = codebook.dequantize(codes.T.contiguous(), scale[:, None], levels[None], dtype)
        assert torch.equal(halves(made, dtype), expected.T.double())


@pytest.mark.parametrize("with_zero", [False, True])
def test_int8(with_zero):
    """Four int8 a register, where wgmma.m64nNk32 wants them (PTX ISA, its fragment of A), beside the codes of x."""
    codes = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    zero = torch.randint(-8, 8, (16, 1), dtype=torch.int8)
    words = prepack(pack(codes, 4), torch.ones(16, 1), None, 64, 64).words.view(LANES, 4).long()
    lane = torch.arange(LANES)
    made = torch.zeros(16, 64, dtype=torch.long)
    for plane in range(2):
        for register in range(4):
            row, column = lane // 4 + register % 2 * 8, lane % 4 * 4 + register // 2 * 16
            shift = (zero[row, 0].long() + 8) * 0x01010101
            held = follow(unpack_asm(plane, with_zero), [words[:, register]] * 4 + [shift] * 4 * with_zero)
            for byte in range(4):
                value = held >> 8 * byte & 255
                made[row, 32 * plane + column + byte] = torch.where(value > 127, value - 256, value)
    values = codes.long() - zero if with_zero else 16 * codes.long()
    assert torch.equal(made, values.view(16, 2, 32).transpose(1, 2).reshape(16, 64))


@pytest.mark.parametrize(("what", "instead"), [("$1, 20", "$1, 16"), ("$0, b, a", "$0, a, b"), ("$1, 4", "$1, 8")])
def test_a_wrong_instruction_is_noticed(monkeypatch, what, instead):
    right = look_up_asm(GL[torch.bfloat16], 1)
    assert what in right
    monkeypatch.setitem(globals(), "look_up_asm", lambda dtype, plane: right.replace(what, instead))
    with pytest.raises(AssertionError):
        test_codebook(1, True, torch.bfloat16)
