"""The start of HQQ (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models").

Step sizes and zero points of least error in the p-norm with p = 0.7, in which a few values that the grid cannot reach
count little, from the weight alone. Two problems with closed forms take turns: an error of few large values is split
off (the p-norm's shrinkage), and the grid is fitted to the rest by least squares.

HQQ's own code differs in three ways. It fits zero points only, which are real there; here they are codes, or there is
none, so that the step size is fitted too. Errors are taken in steps here: shrinkage that depends on the unit of the
weight does nothing to small weights. And each block keeps the best of all turns, the start among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import MIN_SCALE, dequantize, quantize, stored_scale
from ..spec import QuantSpec

NORM, TURNS, SHARPNESS, GROWTH = 0.7, 20, 10.0, 1.01  # p, iterations, beta and kappa of HQQ's code


def half_quadratic(
    weight: Tensor, step_size: Tensor, zero_point: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor | None]:
    """Return step sizes and zero points of lower error in the p-norm than those given, or these.

    Args:
        weight: any float tensor.
        step_size: float32 (rows, groups), where to start.
        zero_point: codes of 0, like the step size; None on a symmetric grid.
        spec: the grid.
    """
    blocks = weight.detach().float().reshape(*step_size.shape, -1)
    step, zero, sharpness = step_size.clamp_min(MIN_SCALE), zero_point, SHARPNESS
    best = step, zero, None
    for _ in range(TURNS):
        scale = stored_scale(step, spec)
        codes = quantize(weight.detach().float(), scale, spec, zero)
        rounded = dequantize(codes, scale, torch.float32, zero).reshape(blocks.shape)
        best = _better(best, step, zero, (blocks - rounded).abs().pow(NORM).sum(-1))
        step, zero = _fitted(blocks, codes.float().reshape(blocks.shape), rounded, step, zero, spec, sharpness)
        sharpness *= GROWTH
    return best[:2]


def _fitted(
    blocks: Tensor, codes: Tensor, rounded: Tensor, step: Tensor, zero: Tensor | None, spec: QuantSpec, sharpness: float
) -> tuple[Tensor, Tensor | None]:
    """Return the least-squares grid of what remains when the shrunken error is taken off."""
    error = (blocks - rounded) / step[..., None]
    size = error.abs()
    shrunken = error.sign() * (size - size.clamp_min(torch.finfo(size.dtype).tiny).pow(NORM - 1) / sharpness).relu()
    target = blocks - shrunken * step[..., None]
    if zero is not None:
        zero = (codes - target / step[..., None]).mean(-1).round().clamp(-spec.q_n, spec.q_p)
        codes = codes - zero[..., None]
    squares = codes.square().sum(-1)
    fitted = (codes * target).sum(-1) / squares.clamp_min(1)  # codes are integers: below 1 there is only 0
    return torch.where((squares > 0) & (fitted > 0), fitted, step).clamp_min(MIN_SCALE), zero


def _better(
    best: tuple[Tensor, Tensor | None, Tensor | None], step: Tensor, zero: Tensor | None, error: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the better of two grids for each block, and its error."""
    if best[2] is None:
        return step, zero, error
    lower = error < best[2]
    kept_zero = None if zero is None else torch.where(lower, zero, best[1])
    return torch.where(lower, step, best[0]), kept_zero, torch.where(lower, error, best[2])
