"""PackedWeight: a QuantizedTensor as a module's buffers, its codes packed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from .. import codebook
from ..backend import has_triton
from ..double_quantization import NestedScale
from ..errors import StateError
from ..numerics import QuantizedTensor, dequantize, scale_shape
from ..packing import unpack
from ..quantizers import FixedDtype
from ..spec import Codebook, QuantSpec
from ..stored_weight import NESTED, layouts, parts_of

if TYPE_CHECKING:
    from qat.kernels.int4_layout import Int4Weight


class DequantizedWeight(Tensor):
    """A frozen layer's weight for who only looks at it, such as peft: a copy, which refuses changes in place.

    So do its ``data`` and its rows; whatever else is made of it, as by ``clone`` or ``detach``, is a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors
    _is_hf_initialized = True  # transformers asks before it draws a weight, also of a model that it has read

    @property
    def data(self) -> Tensor:
        """Return the values, which refuse changes as well."""
        return self.detach().as_subclass(DequantizedWeight)

    @data.setter
    def data(self, value: Tensor) -> None:
        _refuse()

    def __getitem__(self, index: Any) -> Tensor:
        rows = super().__getitem__(index)
        return rows.as_subclass(DequantizedWeight) if rows._is_view() else rows


def _refuse(*_: object, **__: object) -> NoReturn:
    raise StateError(
        "this weight is frozen into codes, and read as a copy: a change of it would be lost. Change it before "
        "qat.freeze, keep an adapter beside it, or merge with python -m qat.merge, which says what it costs; its "
        "clone() may be changed"
    )


_IN_PLACE = {name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_")}
_IN_PLACE -= {"requires_grad_", "detach_", "share_memory_"}  # these leave the values alone
for _name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", *_IN_PLACE):
    setattr(DequantizedWeight, _name, _refuse)


class PackedWeight(FixedDtype):
    """Real low-bit storage of a weight.

    On a GPU, 4-bit codes are held in the order in which the kernels read them, and ``packed`` is empty unless rows are
    looked up, as is a codebook's ``scale``; a state dict has the layout below all the same.

    Attributes:
        packed: uint8 (O, ceil(I * bits / 8)) with I the inputs of a channel; 4-bit codes lie two a byte.
        scale: (rows, groups) in ``spec.scale_dtype``; None where the scales are quantized too.
        scale_codes, scale_factor, scale_offset, scale_levels: those scales' parts (``qat.double_quantization``).
        zero_point: int8, or ``spec.zero_point_dtype``, like the scale; None if symmetric.
        levels: of the codebook, float32; None on an even grid. Only custom ones are stored.
        shape: the weight's logical shape.
        cpu_operands: what torch's CPU operator reads, made at its first use; never stored.
        gpu_operands: by the dtype of x, what the int4 kernels read; empty where they do not take the weight.
        int4_linear: of ``qat.kernels.int4_linear``, beside ``gpu_operands``; an import at each call takes its time.
        looked_up: an embedding reads rows of ``packed``, which therefore stays.
        as_stored: a model is being read, and a state dict's layout stays until ``lay_out``, on a GPU too.
        meets_codes: a layer has int8 inputs, whose zero points take ``row_sums``.
        row_sums: float32 (O,), beside ``gpu_operands`` where integer kernels take the weight.
    """

    def __init__(self, spec: QuantSpec, shape: torch.Size | tuple[int, ...]) -> None:
        super().__init__()
        self.spec, self.shape = spec, torch.Size(shape)
        self.columns = math.prod(self.shape[1:])
        self.double, parts = spec.codebook is Codebook.nf4_double, layouts(spec, shape)
        for name in ("packed", "scale", *(NESTED if self.double else ()), "zero_point"):
            size, dtype = parts.get(name, (None, None))
            self.register_buffer(name, None if size is None else torch.empty(size, dtype=dtype))
        own = codebook.stored_shape(shape, spec)
        levels = None if own is None else torch.empty(own, dtype=torch.float32)
        if spec.codebook is not None and own is None:
            levels = codebook.named_levels(spec, self.packed.device)
        self.register_buffer("levels", levels, persistent=own is not None)
        self.cpu_operands: tuple[Tensor, Tensor] | None = None
        self.gpu_operands: dict[torch.dtype, Int4Weight] = {}
        self.int4_linear: Callable[[Tensor, Int4Weight, Tensor | None], Tensor] | None = None
        self.looked_up = self.meets_codes = self.as_stored = False
        self.row_sums: Tensor | None = None

    @classmethod
    def from_tensor(cls, tensor: QuantizedTensor, lay_out: bool = True) -> PackedWeight:
        """Pack a quantized tensor, on its device; ``lay_out`` as a GPU's kernels read it, or that is called later."""
        weight = cls.from_parts(tensor.spec, tensor.codes.shape, parts_of(tensor))
        if lay_out:
            weight.lay_out()
        return weight

    @classmethod
    def from_parts(cls, spec: QuantSpec, shape: torch.Size | tuple[int, ...], parts: dict[str, Tensor]) -> PackedWeight:
        """Take the tensors of ``qat.stored_weight``, by name, as they are. On a GPU, they stay so until ``lay_out``."""
        with torch.device("meta"):
            weight = cls(spec, shape)
        weight.as_stored = True
        for name, part in parts.items():
            setattr(weight, name, part)
        if "levels" not in parts:
            weight.restore_levels()
        return weight

    def lay_out(self) -> None:
        """Let a GPU's kernels read the weight from now on, if it lies on one."""
        self.as_stored = False
        self._prepack_on_gpu()

    def prepack(self) -> None:
        """Lay 4-bit codes out for the int4 kernels, in the place of ``packed``; done by itself on a GPU."""
        from qat.kernels.int4_layout import GROUP_MULTIPLE, prepack  # kernels are not needed elsewhere
        from qat.kernels.int4_linear import int4_linear
        from qat.kernels.nested_scale import join

        group_size = self.spec.group_size or self.columns
        fits = group_size % GROUP_MULTIPLE == 0 or group_size == self.columns
        fits = fits and not (self.double and len(self.scale_codes) < self.shape[0])
        one_table = self.levels is not None and len(self.levels) == 1
        if self.gpu_operands or self.spec.bits != 4 or not (self.levels is None or one_table) or not fits:
            return
        levels = self.levels.view(16) if one_table else None
        scale, nest = (self.scale_codes, join(self._nested())) if self.double else (self.scale, None)
        self.int4_linear = int4_linear
        stored = prepack(self.packed, scale, self.zero_point, self.columns, group_size, levels, nest)
        self.gpu_operands = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), stored)
        for dtype in (torch.bfloat16, torch.float16):  # on an even grid, fastest with the scale in the dtype of x
            scale = stored.scale.to(dtype)
            # Asking also waits for the copies: kernels read a weight ahead of time.
            if torch.equal(scale.float(), stored.scale.float()) and not one_table:
                self.gpu_operands[dtype] = stored._replace(scale=scale)
        if not self.looked_up:
            self.packed = self.packed.new_empty(0)
            if one_table and not self.double:  # float32 for as few as 32 weights: held once
                self.scale = self.scale.new_empty(0)
        if self.meets_codes:
            self.meet_codes()

    def _prepack_on_gpu(self) -> None:
        if not self.as_stored and self._on_gpu():
            self.prepack()

    def _on_gpu(self) -> bool:
        return self.packed.device.type not in ("cpu", "meta")

    def _stored(self) -> tuple[Tensor, Tensor]:
        """Return ``packed`` and ``scale`` as a state dict has them."""
        if self.packed.numel() or not self.gpu_operands:
            return self.packed, self.scale
        packed, scale, _ = self.gpu_operands[torch.float32].checkpoint()
        return packed, self.scale if self.double or self.scale.numel() else scale[
            : scale_shape(self.shape, self.spec)[0]
        ]

    def _undo_prepack(self) -> None:
        self.packed, self.scale = self._stored()
        self.gpu_operands, self.row_sums = {}, None

    def codes(self) -> Tensor:
        """Return the int8 codes in the weight's logical shape."""
        return unpack(self._stored()[0], self.spec.bits, self.columns, -self.spec.q_n).view(self.shape)

    def quantized_tensor(self) -> QuantizedTensor:
        """Return the QuantizedTensor this was packed from."""
        if self.double:
            nested = self._nested()
            return QuantizedTensor(self.codes(), nested.values(), self.spec, None, self.levels, nested)
        return QuantizedTensor(self.codes(), self._stored()[1], self.spec, self.zero_point, self.levels)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in ``dtype``: through one kernel where it is laid out for kernels, with the same bits."""
        if dtype in self.gpu_operands:
            from qat.kernels.int4_linear import int4_dequantize

            matrix = int4_dequantize(self.gpu_operands[dtype], dtype)
            return matrix if matrix.shape == self.shape else matrix.view(self.shape)
        return self.quantized_tensor().dequantize(dtype)

    def _nested(self) -> NestedScale:
        return NestedScale(*(getattr(self, part) for part in NESTED))

    def keep_rows(self) -> None:
        """Hold ``packed`` on a GPU too, for ``dequantize_rows``."""
        self.packed, self.looked_up = self._stored()[0], True

    def meet_codes(self) -> None:
        """Keep what products with int8 inputs need beside the codes."""
        self.meets_codes = True
        if self.gpu_operands:
            from qat.kernels.int8_linear import row_sums, takes

            weight = self.gpu_operands[torch.float32]
            self.row_sums = row_sums(weight) if takes(weight) and has_triton() else None

    def dequantize_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows of the weight in ``dtype``: (n, ...) for integers (n,)."""
        if not rows.numel():  # nothing that scales could be spread over
            return self.packed.new_empty(0, *self.shape[1:], dtype=dtype)
        parameters = [self.scale, self.zero_point]
        if self.scale.shape[0] == self.shape[0]:
            parameters = [None if part is None else part[rows] for part in parameters]
        codes = unpack(self.packed[rows], self.spec.bits, self.columns, -self.spec.q_n)
        return dequantize(codes, parameters[0], dtype, parameters[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.gpu_operands and self._on_gpu():
            probe = self.packed.new_empty(0)
            if fn(probe) is probe:  # it stays on its device, and keeps its dtypes anyway
                return self
        self._undo_prepack()
        self.cpu_operands = None
        super()._apply(fn, recurse)
        self.restore_levels()
        self._prepack_on_gpu()
        return self

    def _replicate_for_data_parallel(self) -> nn.Module:
        if self.gpu_operands:
            raise StateError(
                "nn.DataParallel would run one GPU's packed weights on another: run a process for each GPU, as "
                "torchrun does, or qat.load the artifact once for each device"
            )
        return super()._replicate_for_data_parallel()

    def restore_levels(self) -> None:
        """Set a named codebook's levels, which are not stored: ``to_empty`` and its like leave them undefined."""
        if self.spec.codebook is not None and codebook.stored_shape(self.shape, self.spec) is None:
            self.levels = codebook.named_levels(self.spec, self.packed.device)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._undo_prepack()
        self.cpu_operands = None
        super()._load_from_state_dict(*args, **kwargs)
        self._prepack_on_gpu()

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        packed, scale = self._stored()
        destination[prefix + "packed"] = packed
        if scale is not None:
            destination[prefix + "scale"] = scale


class Frozen:
    """What frozen layers share: ``weight`` is dequantized when read, as models and adapters read its dtype or norm.

    Attributes:
        packed_weight: None where only the input is quantized; ``weight`` is then an ordinary parameter.
        like: empty; its dtype and device are the model's.
    """

    packed_weight: PackedWeight | None
    like: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight in the model's dtype, with its outputs first: a copy, which refuses changes in place."""
        parameter = self._parameters.get("weight")
        if parameter is not None or self.packed_weight is None:
            return parameter
        weight = self.packed_weight.dequantize(self.like.dtype)
        # torch.export's own tensors cannot become another class.
        return weight if torch.compiler.is_compiling() else weight.as_subclass(DequantizedWeight)


def set_dtype_(layer: Frozen, dtype: torch.dtype, device: torch.device) -> None:
    """Say in what dtype a frozen layer computes or gives its rows. It is no part of the state dict."""
    layer.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)
