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

from torch import Tensor

from .double_quantization import PARTS, NestedScale
from .numerics import QuantizedTensor
from .packing import pack, unpack
from .spec import Codebook, QuantSpec

NESTED = tuple(f"scale_{part}" for part in PARTS)
NAMES = ("packed", "scale", *NESTED, "zero_point", "levels")


def part_names(spec: QuantSpec) -> list[str]:
    """Return the names of the parts that a weight on this grid has."""
    names = ["packed", *(NESTED if spec.codebook is Codebook.nf4_double else ["scale"])]
    return names + ["zero_point"] * (not spec.symmetric) + ["levels"] * (spec.codebook is Codebook.custom)


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
