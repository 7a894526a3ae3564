"""W4A8 and W4A4 linear: int8 codes of the input times int4 codes of the weight, in integers.

    y_MN = step_M * (sum_G scale_NG * sum_{K in G} (weight_NK - zero_NG) * code_MK  -  shift_M * sums_N) + bias_N
    sums_N = sum_G scale_NG * sum_{K in G} (weight_NK - zero_NG)

M tokens, N outputs, K inputs in groups G. ``int8_codes`` says what code, step and shift are: int8 chosen for each
token, or a trained scale of 2 to 8 bits, with a zero point or none, whose integers go through the same int8 units.
Hopper has none for int4: 4-bit inputs are no faster than 8-bit ones, and take the same memory here.

The integers are those of the training forward. The sum of a part of a group, of 64 or 128 inputs, is exact in int32
and below 2^24, so that float32 holds it. Sums of parts, the correction, the step and the bias are float32, and y is
rounded once to its dtype. So y differs from exact arithmetic on the integers and scales by the float32 rounding of as
many terms as there are parts, and by the rounding of y. Neither inputs nor weights are rounded to 16 bits, as the
training forward rounds them in bf16. A token's result does not depend on how many others there are.

The weight is laid out by ``int4_layout.prepack``: on an even grid, symmetric or with integer zero points, in groups
that are a multiple of 64 or the whole row. In groups of 32, of 128 x 128 outputs, an SM's tensor cores would take 128
cycles for what its float units then scale in 256, and a 16-bit product takes 256 in all. Real zero points and codebooks
are no integers. Such layers take ``int4_linear``.

Ways: ``int8_batch`` on Hopper, its twin ``int8_portable`` on every other GPU. Without Triton there is
``int8_linear_reference``, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import LayerError
from qat.packing import unpack

from .int4_layout import INPUTS, Int4Weight
from .int4_linear import backend
from .int8_codes import MOST_VALUES, int8_codes_reference

try:
    from . import int8_run
except ImportError:  # there is no Triton for macOS
    int8_run = None

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def takes(weight: Int4Weight) -> bool:
    """Return whether ``int8_linear`` takes a weight."""
    whole_row = weight.group_size == weight.in_features
    integers = weight.levels is None and (weight.zero_point is None or weight.zero_point.dtype == torch.int8)
    return integers and (whole_row or weight.group_size % INPUTS == 0) and weight.in_features <= MOST_VALUES


def row_sums(weight: Int4Weight) -> Tensor:
    """Return float32 (N,): the sums of each output's dequantized weights, rounded once."""
    packed, scale, zero_point = weight.checkpoint()
    codes = unpack(packed, 4, weight.in_features).view(*scale.shape, weight.group_size)
    sums = codes.sum(2, dtype=torch.int32)  # of a large weight, float64 codes would take 16 times its memory
    if zero_point is not None:
        sums -= zero_point.to(torch.int32) * weight.group_size
    return (sums.double() * scale.double()).sum(1).float()


def int8_linear(
    x: Tensor,
    weight: Int4Weight,
    sums: Tensor,
    scale: Tensor | None,
    bits: int = 8,
    signed: bool = True,
    x_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the product of the rounded x with an int4 weight. It has no gradient.

    Args:
        x: (..., K) bf16, fp16 or fp32, not yet rounded.
        weight: one that ``takes`` says yes to.
        sums: from ``row_sums``.
        scale: one value, the trained scale of x; None for int8_token.
        bits, signed: the grid of a trained scale, 2 to 8 bits.
        x_zero_point: int8, one value, that grid's code of 0; None for 0.
        bias: (N,) bf16, fp16 or fp32, or None.
        dtype: of the result; that of x if None.

    Returns:
        (..., N), contiguous.

    Raises:
        LayerError: a shape, dtype, weight or device other than these.
    """
    w = weight
    parts = w.words, w.scale, w.zero_point, sums, scale, bits, signed, x_zero_point, bias
    return torch.ops.qat.int8_linear(x, *parts, w.out_features, w.in_features, w.group_size, dtype or x.dtype)


def int8_linear_reference(
    x: Tensor,
    weight: Int4Weight,
    scale: Tensor | None,
    bits: int = 8,
    signed: bool = True,
    x_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return what ``int8_linear`` returns, in float64 before the one rounding to ``dtype``."""
    codes, step, shift = int8_codes_reference(x.reshape(-1, weight.in_features), scale, bits, signed, x_zero_point)
    codes = codes.view(len(codes), -1, INPUTS // 2, 2).transpose(2, 3).reshape(codes.shape)  # as x has them
    values, weight_scale = _integers(weight)
    codes = (codes[:, : weight.in_features] - shift.double()[:, None]).view(len(codes), *values.shape[1:])
    y = torch.einsum("mgk,ngk,ng->mn", codes, values, weight_scale) * step.double()[:, None]
    y = y if bias is None else y + bias.double()
    return y.to(dtype or x.dtype).view(*x.shape[:-1], weight.out_features)


def _integers(weight: Int4Weight) -> tuple[Tensor, Tensor]:
    """Return code - zero point (N, groups, inputs of a group) and the scale (N, groups), in float64."""
    packed, scale, zero_point = weight.checkpoint()
    values = unpack(packed, 4, weight.in_features).view(*scale.shape, weight.group_size).double()
    return values if zero_point is None else values - zero_point.double()[..., None], scale.double()


_library = torch.library.Library("qat", "FRAGMENT")
_library.define(
    "int8_linear(Tensor x, Tensor words, Tensor weight_scale, Tensor? zero_point, Tensor sums, Tensor? scale, "
    "int bits, bool signed, Tensor? x_zero_point, Tensor? bias, int out_features, int in_features, int group_size, "
    "ScalarType dtype) -> Tensor"
)


@torch.library.impl(_library, "int8_linear", "CompositeExplicitAutograd")
def _impl(x, words, weight_scale, zero_point, sums, scale, bits, signed, x_zero_point, bias, *rest):
    *sizes, dtype = rest
    weight = Int4Weight(words, weight_scale, zero_point, *sizes)
    _check(x, weight, sums, bits, bias, dtype)
    if backend(x.device) == "torch reference":
        return int8_linear_reference(x, weight, scale, bits, signed, x_zero_point, bias, dtype)
    x_MK = x.reshape(-1, weight.in_features).contiguous()
    if bias is not None and (not bias.is_contiguous() or bias.data_ptr() % 16):
        bias = bias.clone(memory_format=torch.contiguous_format)
    y_MN = int8_run.multiply(x_MK, weight, sums, (scale, bits, signed, x_zero_point), bias, dtype)
    return y_MN.view(*x.shape[:-1], weight.out_features)


@torch.library.register_fake("qat::int8_linear", lib=_library)
def _fake(x, words, weight_scale, zero_point, sums, scale, bits, signed, x_zero_point, bias, *rest):
    *sizes, dtype = rest
    weight = Int4Weight(words, weight_scale, zero_point, *sizes)
    _check(x, weight, sums, bits, bias, dtype)
    return x.new_empty(*x.shape[:-1], weight.out_features, dtype=dtype)


def _check(x: Tensor, weight: Int4Weight, sums: Tensor, bits: int, bias: Tensor | None, dtype: torch.dtype) -> None:
    n, k = weight.out_features, weight.in_features
    if not takes(weight):
        raise LayerError(
            f"int8_linear takes integer codes and zero points in groups that are a multiple of {INPUTS} or the whole "
            f"row, of at most {MOST_VALUES} inputs, not group_size={weight.group_size} of {k}: use int4_linear"
        )
    if x.dim() < 1 or x.shape[-1] != k or x.dtype not in _FLOATS or dtype not in _FLOATS:
        raise LayerError(f"x is {x.dtype} {tuple(x.shape)} and y {dtype}: bf16, fp16 or fp32 with {k} inputs is wanted")
    if not 2 <= bits <= 8:
        raise LayerError(f"bits={bits}: codes of x have 2 to 8")
    if sums.shape != (n,) or sums.dtype != torch.float32:
        raise LayerError(f"sums is {sums.dtype} {tuple(sums.shape)}: torch.float32 ({n},) from row_sums is wanted")
    if bias is not None and (bias.shape != (n,) or bias.dtype not in _FLOATS):
        raise LayerError(f"bias is {bias.dtype} {tuple(bias.shape)}: bf16, fp16 or fp32 ({n},) is wanted")
    for name, tensor in (("words", weight.words), ("scale", weight.scale), ("sums", sums), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise LayerError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
