"""GGUF's blocks of 32 weights, to the byte (ggml-common.h and ggml-quants.c of llama.cpp; gguf/quants.py reads them).

    Q4_0  18 bytes: fp16 d; 16 bytes, byte i = u[i] | u[i + 16] << 4           w = d * (u - 8)
    Q4_1  20 bytes: fp16 d; fp16 m; 16 bytes as in Q4_0                        w = d * u + m
    Q8_0  34 bytes: fp16 d; 32 int8                                            w = d * q

A scale that spans more than 32 weights is repeated. Codes of 2 and 3 bits lie in Q4_0 and Q4_1, of 5 to 7 bits in Q8_0.
A zero point z becomes m = -(z + 8) * s; where that is not an fp16 number, the block is written upside down instead,
u' = 15 - u, d = -s and m = (7 - z) * s: with a bf16 scale one of the two is always exact.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..numerics import MIN_SCALE, QuantizedTensor
from ..quantized_model import QuantizedLayer
from ..spec import Dynamic, QuantSpec
from .integer_linears import other_grid, spread

BLOCK = 32
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def block_type(layer: QuantizedLayer) -> str:
    """Return the block type that holds a layer's codes exactly.

    Raises:
        ArtifactError: none does; the message says why and what does.
    """
    spec, inputs = layer.weight, layer.shape[-1]
    if layer.type not in ("Linear", "Embedding"):
        raise ArtifactError(f"is a {layer.type}: use --to onnx")
    if layer.activation is Dynamic.int8_token:
        raise ArtifactError(
            "trained with its input rounded as int8_token, and llama.cpp rounds as q8_0: use --to executorch"
        )
    if layer.has_activation_scale:
        raise ArtifactError("has a trained activation scale, which llama.cpp has no place for: use --to onnx")
    if not spec.holds_integers:
        raise ArtifactError(other_grid(layer, "GGUF"))
    if inputs % BLOCK or (spec.group_size or BLOCK) % BLOCK:
        what = f"{inputs} inputs" if inputs % BLOCK else f"groups of {spec.group_size}"
        raise ArtifactError(f"has {what}, which blocks of {BLOCK} do not divide: use --to onnx")
    if spec.bits <= 4:
        return "Q4_0" if spec.symmetric else "Q4_1"
    if not spec.symmetric:
        raise ArtifactError(f"has {spec.bits} bits and a zero point, which no block type holds: use --to onnx")
    return "Q8_0"


def encode(tensor: QuantizedTensor, kind: str) -> Tensor:
    """Return a (N, K) weight as blocks: uint8 (N, K / 32 * bytes of a block).

    Raises:
        ArtifactError: a scale (or a minimum of Q4_1) is not exact in fp16.
    """
    rows, inputs = tensor.codes.shape
    scale = spread(tensor.scale, rows, inputs // BLOCK)
    codes = tensor.codes.reshape(rows, -1, BLOCK)
    if kind == "Q8_0":
        return _join(_exact_half(scale), codes.view(torch.uint8))
    unsigned = (codes + 8).view(torch.uint8)
    if kind == "Q4_0":
        return _join(_exact_half(scale), _nibbles(unsigned))
    zero_point = spread(tensor.zero_point, rows, inputs // BLOCK).float() + 8
    straight, flipped = -zero_point * scale.float(), (15 - zero_point) * scale.float()
    flip = _half(straight).float() != straight
    unsigned = torch.where(flip[..., None], 15 - unsigned, unsigned)
    steps = torch.where(flip, -scale.float(), scale.float())
    return _join(_exact_half(steps), _exact_half(torch.where(flip, flipped, straight)), _nibbles(unsigned))


def decode(blocks: Tensor, kind: str) -> QuantizedTensor:
    """Undo ``encode`` for uint8 (N, bytes): codes int8 (N, K) with float16 scales (N, K / 32).

    llama.cpp's own quantizer writes negative scales into Q4_0: such a block comes back with a zero point of -1.

    Raises:
        ArtifactError: Q4_1 blocks whose minimum is no multiple of their step, or Q8_0 blocks with a negative step.
    """
    rows = blocks.shape[0]
    parts = blocks.reshape(rows, -1, BYTES[kind])
    step = parts[..., :2].contiguous().view(torch.float16)[..., 0]
    if kind == "Q8_0":
        if (step < 0).any():
            raise ArtifactError("holds a negative Q8_0 step, which no quantizer writes: the file is damaged")
        return _tensor(parts[..., 2:].contiguous().view(torch.int8), step, None, 8)
    packed = parts[..., -16:]
    codes = torch.cat([packed & 15, packed >> 4], -1).view(torch.int8) - 8
    negative = step < 0
    if kind == "Q4_0":
        codes = torch.where(negative[..., None], -codes - 1, codes)
        return _tensor(codes, step.abs(), -negative.to(torch.int8) if negative.any() else None, 4)
    minimum = parts[..., 2:4].contiguous().view(torch.float16)[..., 0].double()
    codes = torch.where(negative[..., None], -codes - 1, codes)
    ratio = torch.where(step == 0, 0, minimum / step.double())
    zero_point = torch.where(negative, 15 + ratio, -ratio)
    inside = (zero_point == zero_point.round()) & (zero_point >= 0) & (zero_point <= 15)
    if not (inside & ((step != 0) | (minimum == 0))).all():
        raise ArtifactError("has Q4_1 blocks whose minimum is no whole multiple of the step: no zero point equals it")
    return _tensor(codes, step.abs(), (zero_point - 8).to(torch.int8), 4)


def _tensor(codes: Tensor, step: Tensor, zero_point: Tensor | None, bits: int) -> QuantizedTensor:
    """A block of zeros has a step of 0: it keeps its value with a step that can train."""
    empty = step == 0
    codes = codes.masked_fill(empty[..., None], 0).flatten(1)
    zero_point = None if zero_point is None else zero_point.masked_fill(empty, 0)
    spec = QuantSpec(bits=bits, group_size=BLOCK, signed=True, symmetric=zero_point is None, scale_dtype="float16")
    return QuantizedTensor(codes, step.masked_fill(empty, MIN_SCALE), replace(spec), zero_point)


def _join(*parts: Tensor) -> Tensor:
    as_bytes = [part[..., None].view(torch.uint8) if part.dtype == torch.float16 else part for part in parts]
    return torch.cat(as_bytes, -1).flatten(1)


def _nibbles(unsigned: Tensor) -> Tensor:
    return unsigned[..., :16] | unsigned[..., 16:] << 4


def _half(values: Tensor) -> Tensor:
    return values.to(torch.float16).contiguous()


def _exact_half(values: Tensor) -> Tensor:
    half = _half(values)
    off = half.double() != values.double()
    if off.any():
        example = values[off][0].item()
        raise ArtifactError(f"has {int(off.sum())} steps or minima that fp16 would round, such as {example!r}")
    return half
