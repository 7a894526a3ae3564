"""PackedWeight: a QuantizedTensor as a module's buffers, its codes packed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..numerics import QuantizedTensor, dequantize, scale_dtype, scale_shape
from ..packing import pack, packed_row_bytes, unpack
from ..quantizers import FixedDtype
from ..spec import QuantSpec

if TYPE_CHECKING:
    from qat.kernels.int4_layout import Int4Weight


class PackedWeight(FixedDtype):
    """Real low-bit storage of a weight.

    On a GPU, 4-bit codes are held in the order in which the kernels read them, and ``packed`` is empty; a state dict
    has the layout below all the same.

    Attributes:
        packed: uint8 (O, ceil(I * bits / 8)) with I the inputs of a channel; 4-bit codes lie two a byte.
        scale: (rows, groups) in ``spec.scale_dtype``.
        zero_point: int8 like the scale; None if symmetric.
        shape: the weight's logical shape.
        cpu_operands: what torch's CPU operator reads, made at its first use; never stored.
        gpu_operands: by the dtype of x, what the int4 kernels read; empty where they do not take the weight.
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
        self.gpu_operands: dict[torch.dtype, Int4Weight] = {}

    @classmethod
    def from_tensor(cls, tensor: QuantizedTensor) -> PackedWeight:
        """Pack a quantized tensor, on its device."""
        with torch.device("meta"):
            weight = cls(tensor.spec, tensor.codes.shape)
        weight.packed = pack(tensor.codes.flatten(1), tensor.spec.bits)
        weight.scale = tensor.scale
        weight.zero_point = tensor.zero_point
        weight._prepack_on_gpu()
        return weight

    def prepack(self) -> None:
        """Lay 4-bit codes out for the int4 kernels, in the place of ``packed``; done by itself on a GPU."""
        from qat.kernels.int4_layout import GROUP_MULTIPLE, prepack  # kernels are not needed elsewhere

        group_size = self.spec.group_size or self.columns
        if (
            self.gpu_operands
            or self.spec.bits != 4
            or not (group_size % GROUP_MULTIPLE == 0 or group_size == self.columns)
        ):
            return
        stored = prepack(self.packed, self.scale, self.zero_point, self.columns, group_size)
        self.gpu_operands = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), stored)
        for dtype in (torch.bfloat16, torch.float16):  # the kernels are fastest with the scale in the dtype of x
            scale = stored.scale.to(dtype)
            if torch.equal(scale.float(), stored.scale.float()):  # also waits: kernels read a weight ahead of time
                self.gpu_operands[dtype] = stored._replace(scale=scale)
        self.packed = self.packed.new_empty(0)

    def _prepack_on_gpu(self) -> None:
        if self.packed.device.type not in ("cpu", "meta"):
            self.prepack()

    def _packed(self) -> Tensor:
        if not self.gpu_operands:
            return self.packed
        return self.gpu_operands[torch.float32].checkpoint()[0]

    def _undo_prepack(self) -> None:
        self.packed, self.gpu_operands = self._packed(), {}

    def codes(self) -> Tensor:
        """Return the int8 codes in the weight's logical shape."""
        return unpack(self._packed(), self.spec.bits, self.columns).view(self.shape)

    def quantized_tensor(self) -> QuantizedTensor:
        """Return the QuantizedTensor this was packed from."""
        return QuantizedTensor(self.codes(), self.scale, self.spec, self.zero_point)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in ``dtype``."""
        if dtype in self.gpu_operands:
            from qat.kernels.int4_linear import int4_dequantize

            return int4_dequantize(self.gpu_operands[dtype], dtype).view(self.shape)
        return dequantize(self.codes(), self.scale, dtype, self.zero_point)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._undo_prepack()
        self.cpu_operands = None
        super()._apply(fn, recurse)
        self._prepack_on_gpu()
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._undo_prepack()
        self.cpu_operands = None
        super()._load_from_state_dict(*args, **kwargs)
        self._prepack_on_gpu()

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "packed"] = self._packed()
