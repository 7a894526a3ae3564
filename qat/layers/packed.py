"""PackedWeight: a QuantizedTensor as a module's buffers, its codes packed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..numerics import QuantizedTensor, dequantize, scale_dtype, scale_shape
from ..packing import pack, packed_row_bytes, unpack
from ..quantizers import FixedDtype
from ..spec import QuantSpec


class PackedWeight(FixedDtype):
    """Real low-bit storage of a weight.

    Attributes:
        packed: uint8 (O, ceil(I * bits / 8)) with I the inputs of a channel; 4-bit codes lie two a byte.
        scale: (rows, groups) in ``spec.scale_dtype``.
        zero_point: int8 like the scale; None if symmetric.
        shape: the weight's logical shape.
        cpu_operands: what torch's CPU operator reads, made at its first use; never stored.
    """

    def __init__(self, spec: QuantSpec, shape: torch.Size | tuple[int, ...]) -> None:
        super().__init__()
        self.spec, self.shape = spec, torch.Size(shape)
        self.columns = math.prod(self.shape[1:])
        row_bytes = packed_row_bytes(self.columns, spec.bits)
        self.register_buffer("packed", torch.empty(self.shape[0], row_bytes, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(scale_shape(shape, spec), dtype=scale_dtype(spec)))
        zero_point = None if spec.symmetric else torch.empty(self.scale.shape, dtype=torch.int8)
        self.register_buffer("zero_point", zero_point)
        self.cpu_operands: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_tensor(cls, tensor: QuantizedTensor) -> PackedWeight:
        """Pack a quantized tensor, on its device."""
        with torch.device("meta"):
            weight = cls(tensor.spec, tensor.codes.shape)
        weight.packed = pack(tensor.codes.flatten(1), tensor.spec.bits)
        weight.scale = tensor.scale
        weight.zero_point = tensor.zero_point
        return weight

    def codes(self) -> Tensor:
        """Return the int8 codes in the weight's logical shape."""
        return unpack(self.packed, self.spec.bits, self.columns).view(self.shape)

    def quantized_tensor(self) -> QuantizedTensor:
        """Return the QuantizedTensor this was packed from."""
        return QuantizedTensor(self.codes(), self.scale, self.spec, self.zero_point)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in ``dtype``."""
        return dequantize(self.codes(), self.scale, dtype, self.zero_point)

    def dequantize_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows of the weight in ``dtype``: (n, ...) for integers (n,)."""
        parameters = [self.scale, self.zero_point]
        if self.scale.shape[0] == self.shape[0]:
            parameters = [None if part is None else part[rows] for part in parameters]
        codes = unpack(self.packed[rows], self.spec.bits, self.columns)
        return dequantize(codes, parameters[0], dtype, parameters[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.cpu_operands = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.cpu_operands = None
        super()._load_from_state_dict(*args, **kwargs)
