"""Packed codes: bytes worked out by hand, and nothing lost at any width."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qat.packing

# bits: (codes, bytes). Stored is code + 2^(bits-1); the first code takes the lowest bits of the first byte.
BY_HAND = {
    2: ([-2, -1, 0, 1, 1], [0b11_10_01_00, 0b00_00_00_11]),
    # 0 1 2 3 4 5 6 7 as 3-bit numbers, highest first: 111 110 101 100 011 010 001 000 = 0xFAC688; then 7 and 0
    3: ([-4, -3, -2, -1, 0, 1, 2, 3, 3, -4], [0x88, 0xC6, 0xFA, 0b00_000_111]),
    4: ([-8, 7, 0, -1, 3], [0xF0, 0x78, 0x0B]),
    # 0, 31, 1 as 5-bit numbers: 00001 11111 00000 = 0x07E0
    5: ([-16, 15, -15], [0xE0, 0x07]),
    8: ([-128, -1, 0, 127], [0x00, 0x7F, 0x80, 0xFF]),
}


def check_bytes(packing):
    for bits, (codes, expected) in BY_HAND.items():
        packed = packing.pack(torch.tensor([codes], dtype=torch.int8), bits)
        assert packed.dtype == torch.uint8
        assert packed.tolist() == [expected], bits


def check_unpacks_bytes(packing):
    for bits, (codes, stored) in BY_HAND.items():
        unpacked = packing.unpack(torch.tensor([stored], dtype=torch.uint8), bits, len(codes))
        assert unpacked.dtype == torch.int8
        assert unpacked.tolist() == [codes], bits


def check_row_bytes(packing):
    for bits in range(2, 9):
        for columns in range(0, 40):
            exact = Fraction(columns * bits, 8)
            assert exact <= packing.packed_row_bytes(columns, bits) < exact + 1


def test_bytes_by_hand():
    check_bytes(qat.packing)


def test_unpack_by_hand():
    check_unpacks_bytes(qat.packing)


def test_bytes_a_row():
    check_row_bytes(qat.packing)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_row_starts_on_a_byte(bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.tensor([[high], [low]], dtype=torch.int8)
    assert qat.packing.pack(codes, bits).tolist() == [[2**bits - 1], [0]]


@given(bits=st.integers(2, 8), rows=st.integers(1, 5), columns=st.integers(1, 67), seed=st.integers(0, 2**31))
def test_round_trip(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8, generator=generator)
    packed = qat.packing.pack(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert torch.equal(qat.packing.unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_survives(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)[None]
    unpacked = qat.packing.unpack(qat.packing.pack(codes, bits), bits, codes.shape[1])
    assert torch.equal(unpacked, codes)
    assert unpacked.is_contiguous()


def test_packing_does_not_touch_the_codes():
    codes = torch.tensor([[1, -2, 3]], dtype=torch.int8)
    qat.packing.pack(codes, 4)
    assert codes.tolist() == [[1, -2, 3]]


def test_transposed_codes():
    codes = torch.randint(-8, 8, (6, 5), dtype=torch.int8)
    assert torch.equal(qat.packing.unpack(qat.packing.pack(codes.t(), 4), 4, 6), codes.t())
