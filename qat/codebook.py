"""Codebooks: codes that point into a table of levels, and the one arithmetic of them, which is bitsandbytes' own.

    s = max|x|      codes = index of the level nearest to x * (1 / s)      x_hat = levels[codes] * s

(with the s that ``qat.double_quantization`` makes of it in the last product, where the spec says so)
in float32 (float64 for float64 inputs), rounded once to the dtype asked for; a tie goes to the lower level, and a block
of zeros has s = 0. s is taken from the weight at every forward, so a model trained with "nf4" has exactly the codes and
weights that bitsandbytes' ``quantize_4bit`` makes of its weights (its ``backends/default/ops.py`` and CUDA kernel).
Gradients pass straight through: nothing is clipped, since no |x| exceeds its s.

A scale has shape (rows, groups) as in ``qat.numerics``; levels have shape (1, L), or (rows, L) for a table a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .double_quantization import nest
from .errors import LayerError
from .once import Function
from .spec import Codebook, Granularity, QuantSpec

# The quantiles of a normal distribution, with an exact zero: QLoRA (arXiv:2305.14314), appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
SMALLEST = 1e-38  # a smaller s would have no finite reciprocal


def stored_shape(shape: torch.Size | tuple[int, ...], spec: QuantSpec) -> tuple[int, int] | None:
    """Return the shape of the levels that a weight stores: one table a channel; None where the name says them all."""
    if spec.codebook is not Codebook.custom:
        return None
    return 1 if spec.granularity is Granularity.tensor else shape[0], 2**spec.bits


def named_levels(spec: QuantSpec, device: torch.device) -> Tensor:
    """Return the levels that a codebook's name says: float32 (1, L).

    Raises:
        LayerError: the weight should have stored them.
    """
    if spec.codebook is Codebook.custom:
        raise LayerError("a custom codebook is without its levels")
    return torch.tensor([NF4], dtype=torch.float32, device=device)


def block_scale(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the largest magnitude of each block of x: float32 of the given shape (rows, groups)."""
    return x.detach().reshape(*shape, -1).abs().amax(-1).float()


def ratio(x: Tensor, scale: Tensor) -> Tensor:
    """Return x in units of the scale, from -1 to 1: float32 or float64 (rows, groups, block)."""
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    factor = 1.0 / scale.to(working).clamp_min(SMALLEST)
    return (x.detach().to(working).reshape(*scale.shape, -1) * factor[..., None]).clamp(-1, 1)


def quantize(x: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """Return int8 indices of the nearest levels, which ascend, in the shape of x."""
    values = ratio(x, scale)
    bounds = ((levels[:, :-1] + levels[:, 1:]) / 2).to(values.dtype)
    if len(bounds) == 1:
        codes = torch.bucketize(values, bounds[0], out_int32=True)
    else:
        codes = torch.searchsorted(bounds.contiguous(), values.flatten(1), out_int32=True)
    return codes.to(torch.int8).reshape(x.shape)


def dequantize(codes: Tensor, scale: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return levels[codes] * scale in ``dtype``, in the shape of the codes."""
    working = torch.float64 if dtype == torch.float64 else torch.float32
    table = levels.to(working)
    one = len(table) == 1
    values = table[0][codes.int()] if one else table.gather(1, codes.reshape(len(table), -1).long())
    return (values.reshape(*scale.shape, -1) * scale.to(working)[..., None]).to(dtype).reshape(codes.shape)


def fake_quantized(x: Tensor, shape: tuple[int, int], levels: Tensor, scale_levels: Tensor | None = None) -> Tensor:
    """Return x quantized and dequantized in its own dtype, without gradients.

    Args:
        x: any float dtype.
        shape: (rows, groups) of the scale.
        levels: (1, L) or (rows, L).
        scale_levels: float32 (256,), where scales are quantized too.
    """
    scale = block_scale(x, shape)
    codes = quantize(x.detach(), scale, levels)
    if scale_levels is not None:
        scale = nest(scale, scale_levels).values()
    return dequantize(codes, scale, levels, x.dtype)


def fake_quantize(x: Tensor, shape: tuple[int, int], levels: Tensor, scale_levels: Tensor | None = None) -> Tensor:
    """Return ``fake_quantized``, whose gradient is the incoming one."""
    if torch.compiler.is_dynamo_compiling():
        from . import compiled  # keeps Inductor's own rounding out

        return compiled.codebook_fake_quantize(x, shape, levels, scale_levels)
    return _FakeQuantize.apply(x, shape, levels, scale_levels)


def check_levels(levels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return levels as float32 of the given shape; a single table is repeated for every row.

    Raises:
        LayerError: they have another shape, do not ascend, or are not finite.
    """
    table = levels.detach().float().reshape(-1, levels.shape[-1])
    if table.shape[1] != shape[1] or len(table) not in (1, shape[0]):
        raise LayerError(f"levels of shape {list(levels.shape)}: give {list(shape)}, or one table of {shape[1]}")
    if not (table.isfinite().all() and (table.diff() > 0).all()):
        raise LayerError("the levels of a codebook must be finite and ascend")
    return table.expand(shape).contiguous()


class _FakeQuantize(Function):
    """Saves nothing."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple[int, int], levels: Tensor, scale_levels: Tensor | None) -> Tensor:
        return fake_quantized(x, shape, levels, scale_levels)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None, None, None
