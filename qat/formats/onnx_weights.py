"""A QuantizedTensor as the operands of ONNX's operators, to the nibble, and back.

    MatMulNBits         B uint8 [N, blocks, block * bits / 8], the even input in the low nibble, u = code + 8 of 4 bits
    (com.microsoft)     (code + 128 of 8); scales float32 [N * blocks]; zero points uint8 [N * ceil(blocks * bits / 8)],
                        packed like the codes of a row and absent where symmetric (8, or 128); a last block is padded
    GatherBlockQuantized    the same bytes, of an embedding, as matrices of as many rows; a head that is tied to it has
    (com.microsoft)         them once more, since OpenVINO takes nothing but constants
    DequantizeLinear    codes INT4, or UINT8 u with zero points of 128 + z: unsigned, because onnxruntime's kernels for
                        signed ones may saturate on AVX2 without VNNI (its docs, "Quantize ONNX models", on U8S8);
                        scales float32 [], [O] or [O, groups]

Codes of 2 and 3 bits take 4, of 5 to 7 bits 8. MatMulNBits has blocks of a power of two from 16: scales are repeated.
Sources: onnxruntime, docs/ContribOperators.md and matmul_nbits.cc; ONNX, Operators.md, DequantizeLinear-21.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import QuantizedTensor, scale_dtype, scale_shape
from ..packing import pack, packed_row_bytes, unpack
from ..quantized_model import QuantizedLayer
from ..spec import Granularity, QuantSpec
from .integer_linears import spread

LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16
MATMUL_PARTS = ("weight_nbits", "weight_scales", "weight_zero_points")
ROW_PARTS = ("row_nbits", "row_scales", "row_zero_points")
DEQUANTIZE_PARTS = ("weight_codes", "weight_scales", "weight_zero_points")


def stored_bits(spec: QuantSpec) -> int:
    """Return the bits that a code takes in the file: 4 or 8."""
    return 4 if spec.bits <= 4 else 8


def matmul_block(layer: QuantizedLayer) -> int | None:
    """Return the block size that a Linear has in MatMulNBits; None where its groups fit no block."""
    if layer.weight.group_size is None:
        return max(math.gcd(layer.shape[1], LARGEST_BLOCK), 32)  # one scale a row: the last block may be padded
    block = math.gcd(layer.weight.group_size, LARGEST_BLOCK)
    return block if block >= SMALLEST_BLOCK else None


def in_blocks(layer: QuantizedLayer) -> bool:
    """Return whether a layer's operator reads blocks.

    MatMulNBits does; GatherBlockQuantized those that fill a row. OpenVINO 2026.4 fails on zero points in the latter.
    """
    if layer.weight is None or layer.type not in ("Linear", "Embedding"):
        return False
    block = matmul_block(layer)
    rows = layer.type == "Embedding"
    return block is not None and not (rows and (layer.shape[1] % block or not layer.weight.symmetric))


def matmul_shapes(layer: QuantizedLayer) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of ``matmul_operands``."""
    (rows, inputs), bits, block = layer.shape, stored_bits(layer.weight), matmul_block(layer)
    blocks = -(-inputs // block)
    return (rows, blocks, block * bits // 8), (rows * blocks,), (rows * packed_row_bytes(blocks, bits),)


def matmul_operands(tensor: QuantizedTensor, block: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return MatMulNBits' B, scales and zero points (None if symmetric)."""
    (rows, inputs), bits = tensor.codes.shape, stored_bits(tensor.spec)
    blocks = -(-inputs // block)
    packed = pack(F.pad(tensor.codes, (0, blocks * block - inputs)), bits).view(rows, blocks, -1)
    scales = spread(tensor.scale, rows, blocks).float().flatten()
    if tensor.zero_point is None:
        return packed, scales, None
    return packed, scales, pack(spread(tensor.zero_point, rows, blocks), bits).flatten()


def dequantize_shapes(layer: QuantizedLayer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of DequantizeLinear's codes and scales; with groups, a weight is a matrix.

    The only scale of a transposed convolution is repeated for each channel: its codes are turned after the operator,
    over which OpenVINO 2026.4 moves a single scale and then computes something else.
    """
    shape, spec = tuple(layer.shape), layer.weight
    if spec.granularity is Granularity.group:
        inputs = math.prod(shape[1:])
        return (shape[0], inputs), (shape[0], inputs // spec.group_size)
    single = spec.granularity is Granularity.tensor and not layer.type.startswith("ConvTranspose")
    return shape, () if single else (shape[0],)


def dequantize_operands(tensor: QuantizedTensor, layer: QuantizedLayer) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return DequantizeLinear's codes, scales and zero points (None if symmetric in 4 bits), int8 or uint8."""
    stored, scales = dequantize_shapes(layer)
    codes, zero_point = tensor.codes, tensor.zero_point
    if stored_bits(tensor.spec) == 8:
        zero_point = _flipped(torch.zeros(tensor.scale.shape, dtype=torch.int8) if zero_point is None else zero_point)
        codes = _flipped(codes)
    rows = scales[0] if scales else 1
    zero_point = None if zero_point is None else zero_point.expand(rows, -1).reshape(scales)
    return codes.reshape(stored), tensor.scale.float().expand(rows, -1).reshape(scales), zero_point


def decode(tensors: Mapping[str, Tensor], name: str, layer: QuantizedLayer) -> QuantizedTensor:
    """Undo ``matmul_operands`` or ``dequantize_operands`` for tensors called ``NAME.PART``."""
    spec, bits = layer.weight, stored_bits(layer.weight)
    shape = scale_shape(layer.shape, spec)
    part = "row" if f"{name}.row_nbits" in tensors else "weight"
    scale = tensors[f"{name}.{part}_scales"]
    zero_point = None if spec.symmetric else tensors[f"{name}.{part}_zero_points"]
    if f"{name}.weight_codes" in tensors:
        codes = tensors[f"{name}.weight_codes"]
        if bits == 8:
            codes, zero_point = _flipped(codes), None if zero_point is None else _flipped(zero_point)
        scale = scale.flatten()[: math.prod(shape)]  # of a transposed convolution it may be repeated
        zero_point = None if zero_point is None else zero_point.flatten()[: math.prod(shape)]
    else:
        packed = tensors[f"{name}.{part}_nbits"]
        rows, blocks = packed.shape[0], scale.numel() // packed.shape[0]
        codes = unpack(packed.flatten(1), bits, layer.shape[1])
        # Every row and group begins with its own scale: what is repeated after it was equal.
        first = slice(None, None, rows // shape[0]), slice(None, None, blocks // shape[1])
        scale = scale.view(rows, blocks)[first]
        zero_point = None if zero_point is None else unpack(zero_point.view(rows, -1), bits, blocks)[first]
    scale = scale.reshape(shape).to(scale_dtype(spec))
    zero_point = None if zero_point is None else zero_point.reshape(shape).contiguous()
    return QuantizedTensor(codes.view(layer.shape), scale, spec, zero_point)


def _flipped(values: Tensor) -> Tensor:
    """Add 128 to int8, which gives uint8, or take it from uint8."""
    other = torch.int8 if values.dtype == torch.uint8 else torch.uint8
    return (values.view(torch.uint8) ^ 128).view(other)
