"""Double quantization: the scales of blocks as 8-bit codes, as in QLoRA (arXiv:2305.14314, section 3) and bitsandbytes.

    scale = levels[codes] * factor + offset      one factor for 256 scales in row-major order, one offset for a weight

in float32, each operation rounded by itself. What multiplies is this value; a weight's own codes are chosen with the
scale before it (bitsandbytes' ``quantize_4bit`` with ``compress_statistics``). The levels are bitsandbytes' dynamic map
(arXiv:1511.04561) and are stored, since its own float32 table depends on the machine that computed it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
SMALLEST = 1e-38  # a smaller factor would have no finite reciprocal
PARTS = ("codes", "factor", "offset", "levels")


@dataclass
class NestedScale:
    """The scales of a weight, quantized.

    Attributes:
        codes: uint8 (rows, groups).
        factor: float32, one for each 256 codes.
        offset: float32 scalar.
        levels: float32 (256,), ascending.
    """

    codes: Tensor
    factor: Tensor
    offset: Tensor
    levels: Tensor

    def values(self) -> Tensor:
        """Return the scales that multiply: float32 (rows, groups)."""
        flat = self.codes.flatten().int()
        values = self.levels[flat] * self.factor.repeat_interleave(BLOCK)[: flat.numel()]
        return (values + self.offset).view(self.codes.shape)

    def cpu(self) -> NestedScale:
        """Return it on the CPU."""
        return NestedScale(*(getattr(self, part).cpu() for part in PARTS))


def nest(scale: Tensor, levels: Tensor) -> NestedScale:
    """Quantize scales, float32 (rows, groups); the offset is their mean, in float64 so that the order does not show."""
    offset = scale.double().mean().float()
    flat = (scale - offset).flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    factor = blocks.abs().amax(-1)
    ratio = (blocks * (1.0 / factor.clamp_min(SMALLEST))[:, None]).clamp(-1, 1)
    codes = torch.bucketize(ratio, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
    return NestedScale(codes.flatten()[: flat.numel()].view(scale.shape), factor, offset, levels)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """Return bitsandbytes' signed dynamic map of 8 bits: 0, 1, and 2^i means in each of 7 decades up to 1, twice."""
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = 2**exponent
        means = [(0.1 + 0.9 * (2 * step + 1) / (2 * steps)) * 10.0 ** (exponent - 6) for step in range(steps)]
        values += means + [-mean for mean in means]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def stored_bits(shape: tuple[int, int]) -> int:
    """Return the bits that nested scales of a shape take."""
    count = shape[0] * shape[1]
    return 8 * count + 32 * (-(-count // BLOCK) + 1 + 256)
