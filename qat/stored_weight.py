"""A QuantizedTensor as the tensors that a state dict and our artifact hold of it, by name, and back.

packed         uint8 (O, bytes of a row), codes as ``qat.packing`` lays them out
scale          (rows, groups) in ``spec.scale_dtype``; where scales are quantized too, in its place
scale_codes, scale_factor, scale_offset, scale_levels     the parts of ``qat.double_quantization``
zero_point     like the scale, where there are zero points
levels         float32 (1 or O, 2^bits), of a custom codebook; those of a named one follow from its name
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .codebook import stored_shape
from .double_quantization import BLOCK, PARTS, NestedScale
from .numerics import QuantizedTensor, scale_dtype, scale_shape, zero_point_dtype
from .packing import pack, packed_row_bytes, unpack
from .spec import Codebook, QuantSpec

NESTED = tuple(f"scale_{part}" for part in PARTS)
NAMES = ("packed", "scale", *NESTED, "zero_point", "levels")


def layouts(spec: QuantSpec, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype, by name, of the parts that a weight of that logical shape has on this grid."""
    scales, columns = scale_shape(shape, spec), math.prod(shape[1:])
    parts = {"packed": ((shape[0], packed_row_bytes(columns, spec.bits)), torch.uint8)}
    if spec.codebook is Codebook.nf4_double:
        sizes = scales, (-(-math.prod(scales) // BLOCK),), (), (256,)
        dtypes = torch.uint8, torch.float32, torch.float32, torch.float32
        parts |= dict(zip(NESTED, zip(sizes, dtypes, strict=True), strict=True))
    else:
        parts["scale"] = scales, scale_dtype(spec)
    if not spec.symmetric:
        parts["zero_point"] = scales, zero_point_dtype(spec)
    if spec.codebook is Codebook.custom:
        parts["levels"] = stored_shape(shape, spec), torch.float32
    return parts


def misfit(parts: Mapping[str, Tensor], spec: QuantSpec, shape: Sequence[int]) -> str | None:
    """Return what is wrong with the shape or dtype of a weight's parts; None where they fit."""
    for name, (size, dtype) in layouts(spec, shape).items():
        if tuple(parts[name].shape) != tuple(size):
            what = "codes" if name == "packed" else name
            where = f"of {tuple(shape)} in {spec.bits} bits, {spec.granularity.value}"
            return f"{what} {where}, are stored as {tuple(size)}, not as {tuple(parts[name].shape)}"
        if parts[name].dtype != dtype:
            return f"{name} is {parts[name].dtype}, not {dtype}"
    return None


def parts_of(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """Return a weight's parts by name, on its device."""
    parts = {"packed": pack(tensor.codes.flatten(1), tensor.spec.bits, -tensor.spec.q_n)}
    if tensor.nested is None:
        parts["scale"] = tensor.scale
    else:
        parts |= {name: getattr(tensor.nested, part) for name, part in zip(NESTED, PARTS, strict=True)}
    if tensor.zero_point is not None:
        parts["zero_point"] = tensor.zero_point
    if tensor.spec.codebook is Codebook.custom:
        parts["levels"] = tensor.levels
    return parts


def tensor_of(parts: Mapping[str, Tensor], spec: QuantSpec, shape: Sequence[int]) -> QuantizedTensor:
    """Undo ``parts_of``, for a weight of that logical shape."""
    codes = unpack(parts["packed"], spec.bits, math.prod(shape[1:]), -spec.q_n).view(*shape)
    if spec.codebook is Codebook.nf4_double:
        nested = NestedScale(*(parts[name] for name in NESTED))
        return QuantizedTensor(codes, nested.values(), spec, nested=nested)
    return QuantizedTensor(codes, parts["scale"], spec, parts.get("zero_point"), parts.get("levels"))
