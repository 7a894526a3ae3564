"""The one arithmetic in scalar Python, and inputs that lie on its ties and bounds, for the tests of qat/numerics.py."""

import struct

import numpy as np
import torch

SIGNS = [True, False]
GRIDS = [{"granularity": "tensor"}, {"granularity": "channel"}, {"group_size": 4}]
ROWS, COLUMNS = 3, 12
float32 = np.float32


def bounds(bits, signed):
    """Return the lowest and highest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def to_bfloat16(value):
    """Round a float32 to bf16, ties to even, by its bits."""
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    word = (word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", word))[0]


def round_to(value, dtype):
    """Round a number that float32 holds exactly, once, to a dtype."""
    if dtype == torch.bfloat16:
        return to_bfloat16(value)
    return float(np.float16(value)) if dtype == torch.float16 else float(float32(value))


def code_of(x, scale, low, high):
    """One float32 division, round half to even (what Python's round does), then the clamp."""
    return min(max(round(float(float32(x) / float32(scale))), low), high)


def scale_index(row, column, spec, columns=COLUMNS):
    """Return where element (row, column) finds its scale in (rows, groups)."""
    if spec.granularity == "tensor":
        return 0, 0
    return (row, 0) if spec.granularity == "channel" else (row, column // spec.group_size)


def interesting_ratios(bits, signed):
    """Return ratios x / s that float32 holds exactly: inside, on ties, on both bounds and beyond them."""
    low, high = bounds(bits, signed)
    ties = [low - 0.5, low + 0.5, -0.5, 0.5, 1.5, 2.5, high - 0.5, high + 0.5]
    edges = [low, high, low - 1, high + 1, low - 100, high + 100, 0.0, -0.0]
    inside = [low + 0.25, low + 0.75, 0.125, -0.125, high - 0.25, 0.53125 * high]
    near = [low * (1 - 2**-10), low * (1 + 2**-10), high * (1 - 2**-10), high * (1 + 2**-10)]
    return ties + edges + inside + near


def laid_out(ratios, scale, spec, rows=ROWS, columns=COLUMNS):
    """Return x (rows, columns) whose elements have the given ratios, over and over."""
    x = torch.zeros(rows, columns, dtype=torch.float64)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        x[row, column] = ratios[index % len(ratios)] * scale[scale_index(row, column, spec, columns)].item()
    return x


def scales_for(spec, seed=0):
    """Return different scales on the bf16 grid, not powers of two, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"tensor": (1, 1), "channel": (ROWS, 1)}.get(spec.granularity, (ROWS, COLUMNS // 4))
    return (torch.rand(shape, generator=generator) + 0.55).bfloat16().double()
