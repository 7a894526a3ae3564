"""The one quantize and dequantize arithmetic, which training, conversion, formats and the kernels' tests all use.

    codes = clamp(round_half_even(x / s) + z, -q_n, q_p)          x_hat = (codes - z) * s

computed in float32 (float64 for float64 inputs) with the scale already rounded to the dtype it is stored in, and
rounded once, at the end, to the dtype asked for. For whole bounds this equals LSQ's round(clip(x / s)). Grids that are
not even have their arithmetic in ``qat.codebook``.

A scale has shape (rows, groups): (1, 1) per tensor, (O, 1) per channel, (O, G) per group. The tensor it belongs to is
read row-major as (rows, groups, block), where ``block`` elements share a scale.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import backend, codebook, double_quantization, exact
from .double_quantization import NestedScale
from .errors import LayerError
from .once import Function, no_view, once
from .spec import Codebook, Granularity, QuantSpec

# The smallest scale: from here up to 65536 a bf16 scale, and a 4-bit code times it, are exact in fp16.
MIN_SCALE = 2.0**-17


def scale_dtype(spec: QuantSpec) -> torch.dtype:
    """Return the torch dtype that the spec's scales are stored in."""
    return getattr(torch, spec.scale_dtype.value)


def scale_shape(shape: torch.Size | tuple[int, ...], spec: QuantSpec) -> tuple[int, int]:
    """Return (rows, groups) for a tensor whose first axis holds output channels.

    Raises:
        LayerError: the group size does not divide the inputs of a channel; the message lists sizes that do.
    """
    if spec.granularity is Granularity.tensor:
        return 1, 1
    rows, inputs = shape[0], math.prod(shape[1:])
    if spec.granularity is Granularity.channel:
        return rows, 1
    if inputs % spec.group_size:
        sizes = [size for size in range(8, inputs + 1, 8) if inputs % size == 0]
        fix = f"group sizes that do: {', '.join(map(str, sizes))}; or" if sizes else "use"
        raise LayerError(
            f"group_size={spec.group_size} does not divide its {inputs} inputs; {fix} granularity='channel'"
        )
    return rows, inputs // spec.group_size


def zero_point_dtype(spec: QuantSpec) -> torch.dtype:
    """Return the torch dtype that the spec's zero points are stored in."""
    return torch.int8 if spec.zero_point_dtype is None else getattr(torch, spec.zero_point_dtype.value)


def stored_zero_point(zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Round a real zero point to the dtype it is stored and computed with, at most its largest finite value."""
    dtype = zero_point_dtype(spec)
    most = torch.finfo(dtype).max
    return zero_point.detach().clamp(-most, most).to(dtype)


def stored_scale(step_size: Tensor, spec: QuantSpec) -> Tensor:
    """Round a step size to the scale that is stored and computed with: at least MIN_SCALE, in ``spec.scale_dtype``."""
    return exact.rounded(step_size.detach().clamp_min(MIN_SCALE).to(scale_dtype(spec)))


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None) -> Tensor:
    """Return (codes - zero_point) * scale in ``dtype``, in the shape of ``codes``."""
    return _dequantize_(codes.to(_working_dtype(dtype), copy=True), scale, dtype, zero_point)


def _dequantize_(codes: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None) -> Tensor:
    """Do what ``dequantize`` does, in place: on a CPU a new tensor takes several times as long as the arithmetic."""
    values, s = broadcast(codes, scale.to(codes.dtype))
    if zero_point is not None:
        values.sub_(broadcast(codes, zero_point.to(codes.dtype))[1])
    return values.mul_(s).to(dtype).reshape(codes.shape)


def quantize(x: Tensor, scale: Tensor, spec: QuantSpec, zero_point: Tensor | None = None) -> Tensor:
    """Return whole-valued codes in the working float dtype, in the shape of ``x``."""
    ratio, _ = _ratio(x, scale)
    if zero_point is None:
        codes = ratio.round_()
    elif spec.zero_point_dtype is not None:
        codes = ratio.add_(broadcast(x, zero_point.to(ratio.dtype))[1]).round_()
    else:
        codes = ratio.round_().add_(broadcast(x, zero_point.to(ratio.dtype))[1])
    codes = codes.clamp_(-spec.q_n, spec.q_p).add_(0.0)  # an integer has no -0.0, and neither may its float
    return codes.reshape(x.shape)


@dataclass
class QuantizedTensor:
    """Codes, scales and spec: the one value that quantizers make and formats, kernels and frozen layers read.

    Attributes:
        codes: int8, the tensor's logical shape, from ``-spec.q_n`` to ``spec.q_p``.
        scale: (rows, groups) in ``spec.scale_dtype``.
        zero_point: int8, the scale's shape, in the range of the codes, or real in ``spec.zero_point_dtype``; None if
            symmetric.
        spec: the grid.
        levels: of the codebook, float32 (1 or rows, 2^bits), where the spec has one; a named one's follow from it.
        nested: what the scale was made of, where the scales are quantized too.
    """

    codes: Tensor
    scale: Tensor
    spec: QuantSpec
    zero_point: Tensor | None = None
    levels: Tensor | None = None
    nested: NestedScale | None = None

    def __post_init__(self) -> None:
        if self.spec.codebook is not None and self.levels is None:
            self.levels = codebook.named_levels(self.spec, self.codes.device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (codes - zero_point) * scale, or levels[codes] * scale, rounded once to ``dtype``."""
        if self.levels is not None:
            return codebook.dequantize(self.codes, self.scale, self.levels, dtype)
        return dequantize(self.codes, self.scale, dtype, self.zero_point)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, scales and zero points included."""
        return self.spec.bits + parameter_bits(self.codes.shape, self.spec) / self.codes.numel()


def parameter_bits(shape: torch.Size, spec: QuantSpec) -> int:
    """Return the bits that a weight's scales, zero points and levels take."""
    scales = scale_shape(shape, spec)
    if spec.codebook is Codebook.nf4_double:
        return double_quantization.stored_bits(scales)
    bits = math.prod(scales) * (scale_dtype(spec).itemsize * 8 + _zero_point_bits(spec))
    return bits + 32 * math.prod(codebook.stored_shape(shape, spec) or (0,))


def _zero_point_bits(spec: QuantSpec) -> int:
    if spec.symmetric:
        return 0
    return spec.bits if spec.zero_point_dtype is None else zero_point_dtype(spec).itemsize * 8


def quantize_tensor(x: Tensor, scale: Tensor, spec: QuantSpec, zero_point: Tensor | None = None) -> QuantizedTensor:
    """Quantize a weight onto an already stored scale.

    Raises:
        LayerError: the weight or the scale holds NaN or infinity.
    """
    if not (x.isfinite().all() and scale.isfinite().all()):
        raise LayerError("the weight or its scale holds NaN or infinity")
    codes = quantize(x.detach(), scale, spec, zero_point).to(torch.int8)
    return QuantizedTensor(codes, scale.detach(), replace(spec, signed=True), zero_point)


def fake_quantize(
    x: Tensor, step_size: Tensor, spec: QuantSpec, grad_scale: float = 1.0, zero_point: Tensor | None = None
) -> Tensor:
    """Quantize and dequantize with LSQ's gradients (arXiv:1902.08153, eq. 3 and the straight-through estimator, eq. 5).

    Args:
        x: any float dtype and shape.
        step_size: (rows, groups) float32 (or float64), before rounding to the stored scale.
        spec: its bounds and dtypes are used.
        grad_scale: LSQ's g, which multiplies the gradient of the step size.
        zero_point: of the step size's shape, as stored; it has no gradient. None on a symmetric grid.

    Returns:
        ``dequantize(quantize(x))`` in the dtype of ``x``. The gradient of x is the incoming one where
        ``-q_n < x / s + z < q_p`` strictly, else 0; the step size's passes through the rounding to the stored scale.
    """
    # Not is_compiling(), which torch.export sets too; and is_exporting() is always true inside Dynamo in torch 2.11.
    if torch.compiler.is_dynamo_compiling():
        from . import compiled  # keeps Inductor's own rounding out

        return compiled.fake_quantize(x, step_size, spec, grad_scale, zero_point)
    return _FakeQuantize.apply(x, step_size, zero_point, spec, grad_scale)


def fake_quantized(
    x: Tensor,
    step_size: Tensor,
    spec: QuantSpec,
    dtype: torch.dtype | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Return the value of ``fake_quantize``, without gradients, in ``dtype`` (that of x): the kernels' reference."""
    scale, dtype = stored_scale(step_size, spec), dtype or x.dtype
    codes = quantize(x, scale, spec, zero_point).to(_working_dtype(dtype))
    return _dequantize_(codes, scale, dtype, zero_point)


def fake_quantize_gradients(
    grad_output: Tensor,
    x: Tensor,
    step_size: Tensor,
    spec: QuantSpec,
    grad_scale: float,
    wanted=(True, True),
    zero_point: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of ``fake_quantize``, of x and of the step size; None for one that is not wanted.

    With zero points the bounds of x / s are those of the codes less the zero point.
    """
    ratio, _ = _ratio(x, stored_scale(step_size, spec))
    low, high, rounded = -spec.q_n, spec.q_p, None
    if zero_point is not None:
        shift = broadcast(x, zero_point.to(ratio.dtype))[1]
        if spec.zero_point_dtype is not None:  # what is whole is x / s + z
            rounded = (ratio + shift).clamp_(low, high).round_().sub_(shift)
        low, high = low - shift, high - shift
    if wanted[1] and rounded is None:
        rounded = ratio.clamp(low, high).round_()
    low, high = bounds(low, high)
    ratio.nan_to_num_(math.inf)  # which is not inside
    grad = grad_output.to(ratio.dtype).reshape(ratio.shape)
    grad_x = grad_step = None
    if wanted[0]:
        grad_x = inside(grad, ratio, low, high).to(x.dtype).reshape(x.shape)
    if wanted[1]:
        slope = rounded.sub_(inside(ratio, ratio, low, high, out=ratio))
        grad_step = summed_by_scale(slope.mul_(grad), step_size, grad_scale)
    return grad_x, grad_step


def bounds(low: float | Tensor, high: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Return two bounds as numbers where each is one, on a CPU: its operators are several times as fast with them.

    From a GPU they are not read, as the host would wait. NaN stays a tensor: nothing is inside of it.
    """
    if type(low) is not Tensor or low.dim() or low.device.type != "cpu":  # or a tensor without data
        return low, high
    least, most = low.item(), high.item()
    return (least, most) if least <= most else (low, high)


def inside(
    values: Tensor, ratio: Tensor, low: float | Tensor, high: float | Tensor, out: Tensor | None = None
) -> Tensor:
    """Return the values where ``low < ratio < high``, strictly, and 0 elsewhere; no ratio is NaN.

    What is returned may be ``out``.
    """
    if isinstance(low, Tensor):
        return torch.where((ratio > low) & (ratio < high), values, 0)
    if out is not None:
        return torch.ops.aten.hardtanh_backward.grad_input(values, ratio, low, high, grad_input=out)
    return torch.ops.aten.hardtanh_backward(values, ratio, low, high)  # the same in a tenth of the time on a CPU


def summed_by_scale(terms: Tensor, step_size: Tensor, grad_scale: float) -> Tensor:
    """Return ``grad_scale`` times the sum of the terms that share a scale, in the shape and dtype of the step size."""
    total = terms.sum() if step_size.numel() == 1 else terms.reshape(*step_size.shape, -1).sum(-1)
    return (total.reshape(step_size.shape) * grad_scale).to(step_size.dtype)


def requantize_(
    grad_output: Tensor,
    x: Tensor,
    step_size: Tensor,
    spec: QuantSpec,
    grad_scale: float,
    wanted=(True, True),
    dtype: torch.dtype | None = None,
    zero_point: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (fake-quantized x in ``dtype``, or None; gradient of x; gradient of the step size).

    For a backward that kept x alone and needs its fake-quantized value again. ``grad_output`` may be overwritten.
    """
    y = None if dtype is None else fake_quantized(x, step_size, spec, dtype, zero_point)
    return y, *fake_quantize_gradients(grad_output, x, step_size, spec, grad_scale, wanted, zero_point)


class _FakeQuantize(Function):
    """Saves only its inputs; the backward computes the ratio again."""

    @staticmethod
    def forward(ctx, x: Tensor, step_size: Tensor, zero_point: Tensor | None, spec: QuantSpec, grad_scale: float):
        ctx.save_for_backward(x, step_size, zero_point)
        ctx.spec, ctx.grad_scale = spec, grad_scale
        return no_view(arithmetic(x, step_size).fake_quantized(x, step_size, spec, x.dtype, zero_point))

    @staticmethod
    @once
    def backward(ctx, grad_output: Tensor):
        x, step_size, zero_point = ctx.saved_tensors
        how = ctx.spec, ctx.grad_scale, ctx.needs_input_grad, zero_point
        return *arithmetic(x, step_size).fake_quantize_gradients(grad_output, x, step_size, *how), None, None, None


def arithmetic(x: Tensor, step_size: Tensor) -> ModuleType:
    """Return the module whose ``fake_quantized`` and ``fake_quantize_gradients`` run on x: kernels, or this one."""
    return _kernels() if backend.fused(x, step_size) else sys.modules[__name__]


@cache
def _kernels() -> ModuleType:
    from qat.kernels import fake_quant  # loads Triton

    return fake_quant


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def broadcast(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """View x and scale so that they broadcast; without groups, x's shape and strides stay as they are."""
    if scale.numel() == 1:
        return x, scale.reshape(())
    if scale.shape == (*x.shape[:1], 1):
        return x, scale.reshape(-1, *(1,) * (x.dim() - 1))
    return x.contiguous().view(*scale.shape, -1), scale[..., None]


def _ratio(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    working = _working_dtype(x.dtype)
    values, s = broadcast(exact.rounded(x).to(working), scale.to(working))
    return exact.quotient(values, s), s
