"""Inputs rounded as a runtime will round them: scales from each token's own values, at run time; nothing is learned.

int8_token is ExecuTorch's 8da4w, int8 with a zero point for each token (the last axis), as XNNPACK computes it in
float32 (``xnn_qd8_asymmetric_quantization_params`` and the f32-qs8-vcvt kernels, which round half to even):

    low = min(0, x), high = max(0, x), f = 255 / (high - low), or 1 where high = low
    z = clamp(round(d), -128, 127), d = -128 - low*f where -128 + low*f + 127 + high*f > 0, else 127 - high*f
    code = clamp(round(x * f) + z, -128, 127)            x_hat = (code - z) * (1 / f)

torchao's ``int8_asym_per_token`` divides by the scale (at least the smallest normal number) where XNNPACK multiplies by
its inverse, and differs in a code where a value lies within one float32 rounding of the middle of two.

q8_0 is llama.cpp's Q8_0, int8 for each 32 values, as ``quantize_row_q8_0`` of ggml-cpu computes it with AVX:

    d = fp16(amax / 127), f = 127 / amax, or 0 where amax = 0
    code = round(x * f), half to even                    x_hat = code * d

The same function's reference (``_ref``) has f = 1 / (amax / 127) and rounds halves away from zero, and ARM's rounds
half to even with that f: they too differ within one rounding of the middle of two codes.
"""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import backend, exact, numerics
from ..once import Function, once
from ..spec import Dynamic

if TYPE_CHECKING:
    from .rounding import Rounding  # imports this module

BLOCK = 32  # of q8_0


class DynamicActivation(nn.Module):
    """Rounds a linear layer's input as its runtime does, in training and in the frozen layer alike.

    Attributes:
        spec: which rounding.
        enabled: False passes tensors through, for a delayed start.
    """

    def __init__(self, spec: Dynamic) -> None:
        super().__init__()
        self.spec, self.enabled = spec, True

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., K) rounded, in its own dtype; the gradient passes straight through, except where it clips."""
        return round_dynamic(x, self.spec) if self.enabled else x

    def rounding(self, x: Tensor) -> Rounding | None:
        """Return what ``forward`` does to x; None if it passes through."""
        from .rounding import Rounding

        return Rounding(self.spec) if self.enabled else None


def round_dynamic(x: Tensor, kind: Dynamic) -> Tensor:
    """Return x (..., K) rounded to int8 and back, in its own dtype; the arithmetic in between is float32."""
    if torch.compiler.is_dynamo_compiling():
        from .. import compiled  # keeps Inductor's own rounding out

        return compiled.round_dynamic(x, kind)
    return rounded(x, kind) if torch.jit.is_tracing() else _RoundDynamic.apply(x, kind)


def arithmetic(x: Tensor) -> ModuleType:
    """Return the module whose ``rounded`` and ``rounded_gradient`` run on x: kernels, or this one."""
    fused = backend.fused(x) and x.shape[-1] <= _kernels().MOST_VALUES
    return _kernels() if fused else sys.modules[__name__]


@cache
def _kernels() -> ModuleType:
    from qat.kernels import round_dynamic  # loads Triton

    return round_dynamic


def rounded(x: Tensor, kind: Dynamic, dtype: torch.dtype | None = None) -> Tensor:
    """Return the value of ``round_dynamic``, without gradients, in ``dtype`` (that of x): the kernels' reference."""
    return _values_(*dynamic_codes(x, kind)).reshape(x.shape).to(dtype or x.dtype)


def rounded_gradient(grad_output: Tensor, x: Tensor, kind: Dynamic) -> Tensor:
    """Return the gradient of ``round_dynamic``: the incoming one, or 0 where a code of int8_token was clipped."""
    if kind == Dynamic.q8_0:
        return grad_output.to(x.dtype, copy=True)
    return _unclipped(grad_output, _int8_token(x)[0]).to(x.dtype)


def reround_(
    grad_output: Tensor, x: Tensor, kind: Dynamic, wanted: bool = True, dtype: torch.dtype | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return (rounded x in ``dtype``, or None; gradient of x if wanted). ``grad_output`` may be overwritten.

    For a backward that kept x alone and needs its rounded value again.
    """
    if kind == Dynamic.q8_0 or dtype is None or not wanted:
        y = None if dtype is None else rounded(x, kind, dtype)
        return y, rounded_gradient(grad_output, x, kind) if wanted else None
    codes, scale, zero_point = _int8_token(x)
    grad_x = _unclipped(grad_output, codes).to(x.dtype)
    return _values_(codes.clamp_(-128, 127), scale, zero_point).to(dtype), grad_x


def _values_(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return (codes if zero_point is None else codes.sub_(zero_point)).mul_(scale)


def _unclipped(grad: Tensor, codes: Tensor) -> Tensor:
    """Return the gradient, at least in float32, where int8 holds the codes or they are NaN, else 0."""
    dtype = torch.promote_types(grad.dtype, codes.dtype)
    return numerics.inside(grad.to(dtype), codes.nan_to_num(0.0).to(dtype), -129, 128)


def dynamic_codes(x: Tensor, kind: Dynamic) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return whole-valued float32 codes, the scales and the zero points that a runtime would use for x (..., K).

    Returns:
        int8_token: codes (..., K), scale and zero point (..., 1). q8_0: codes (..., K/32, 32), scale (..., K/32, 1) on
        the fp16 grid, no zero point.
    """
    if kind == Dynamic.int8_token:
        codes, *parameters = _int8_token(x)
        return codes.clamp_(-128, 127), *parameters
    values = x.float().unflatten(-1, (-1, BLOCK))
    largest = values.abs().amax(-1, keepdim=True)
    most = torch.full_like(largest, 127)  # a number would make torch multiply by a reciprocal, which rounds twice
    factor = torch.where(largest == 0, 0.0, most / largest)
    return (values * factor).round_().add_(0.0), (largest / most).half().float(), None


def _int8_token(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 codes of any size, and each token's scale and zero point (..., 1)."""
    x = exact.rounded(x)
    values = x.float()  # ahead of the reductions, which read x: a compiler then computes it again, and keeps no mask
    low = x.amin(-1, keepdim=True).float().clamp_max(0)
    high = x.amax(-1, keepdim=True).float().clamp_min(0)
    factor = torch.where(low == high, 1.0, exact.quotient(torch.full_like(low, 255), high - low))
    least, most = exact.product(low, factor), exact.product(high, factor)
    zero_point = torch.where((-128 + least) + (127 + most) > 0, -128 - least, 127 - most).clamp(-128, 127).round()
    codes = (values * factor).round_().add_(zero_point)
    return codes, exact.quotient(torch.ones_like(factor), factor), zero_point


class _RoundDynamic(Function):
    """Saves only its input; the backward computes what was clipped again."""

    @staticmethod
    def forward(ctx, x: Tensor, kind: Dynamic) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return arithmetic(x).rounded(x, kind)

    @staticmethod
    @once
    def backward(ctx, grad_output: Tensor):
        (x,) = ctx.saved_tensors
        return arithmetic(x).rounded_gradient(grad_output, x, ctx.kind), None
