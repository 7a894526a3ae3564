"""Codes as bytes: a little-endian bit stream a row, so 4-bit codes lie two a byte, the even one in the low nibble.

Codes are stored as u = code - lowest, which is never negative: lowest is -2^(bits-1), or 0 for indices of a codebook.
Each row starts on a byte boundary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_row_bytes(columns: int, bits: int) -> int:
    """Return the bytes that a row of ``columns`` codes takes."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int, lowest: int | None = None) -> Tensor:
    """Pack int8 codes (rows, columns) of ``bits`` bits into uint8 (rows, packed_row_bytes).

    Args:
        codes: from ``lowest`` to ``lowest + 2^bits - 1``.
        bits: 2 to 8.
        lowest: -2^(bits-1) if None.
    """
    rows, columns = codes.shape
    unsigned = (codes.to(torch.int16) + _offset(bits, lowest)).to(torch.uint8)
    if 8 % bits:
        return _pack_across_bytes(unsigned, bits)
    per_byte = 8 // bits
    unsigned = torch.nn.functional.pad(unsigned, (0, -columns % per_byte)).view(rows, -1, per_byte)
    packed = unsigned[..., 0].clone()
    for position in range(1, per_byte):
        packed |= unsigned[..., position] << (bits * position)
    return packed


def unpack(packed: Tensor, bits: int, columns: int, lowest: int | None = None) -> Tensor:
    """Undo ``pack``: uint8 (rows, packed_row_bytes) to int8 codes (rows, columns)."""
    if 8 % bits:
        unsigned = _unpack_across_bytes(packed, bits)
    else:
        parts = [(packed >> (bits * position)) & (2**bits - 1) for position in range(8 // bits)]
        unsigned = torch.stack(parts, -1).flatten(1)
    # In uint8 the subtraction wraps and the bit pattern is the int8 answer. A trace has no such view.
    codes = unsigned[:, :columns] - _offset(bits, lowest)
    return (codes.to(torch.int8) if torch.jit.is_tracing() else codes.view(torch.int8)).contiguous()


def _offset(bits: int, lowest: int | None) -> int:
    return 2 ** (bits - 1) if lowest is None else -lowest


def _pack_across_bytes(unsigned: Tensor, bits: int) -> Tensor:
    """Eight codes are ``bits`` whole bytes, so a 64-bit word holds them while they are regrouped."""
    rows, columns = unsigned.shape
    eights = torch.nn.functional.pad(unsigned, (0, -columns % 8)).view(rows, -1, 8)
    word = torch.zeros(eights.shape[:2], dtype=torch.int64, device=unsigned.device)
    for position in range(8):
        word |= eights[..., position].to(torch.int64) << (bits * position)
    stream = torch.stack([((word >> (8 * byte)) & 255).to(torch.uint8) for byte in range(bits)], -1).flatten(1)
    return stream[:, : packed_row_bytes(columns, bits)].contiguous()


def _unpack_across_bytes(packed: Tensor, bits: int) -> Tensor:
    rows, width = packed.shape
    stream = torch.nn.functional.pad(packed, (0, -width % bits)).view(rows, -1, bits)
    word = torch.zeros(stream.shape[:2], dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        word |= stream[..., byte].to(torch.int64) << (8 * byte)
    return torch.stack([((word >> (bits * p)) & (2**bits - 1)).to(torch.uint8) for p in range(8)], -1).flatten(1)
