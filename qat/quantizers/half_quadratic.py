"""The start of HQQ (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models").

Real zero points of least error in the p-norm with p = 0.7, in which a few values far from the others count little, from
the weight alone; step sizes stay those of the range. Two problems with closed forms take turns: an error of few large
values is split off (the p-norm's shrinkage), and the zero point is fitted to the rest, a mean.

HQQ's own code differs in two ways. Errors are taken in steps here: shrinkage that depends on the unit of the weight
does nothing to small weights. And each block keeps the best of all turns, the start among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import dequantize, quantize, stored_scale, stored_zero_point
from ..spec import QuantSpec

NORM, TURNS, SHARPNESS, GROWTH = 0.7, 20, 10.0, 1.01  # p, iterations, beta and kappa of HQQ's code


def half_quadratic(weight: Tensor, step_size: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Return zero points of lower error in the p-norm than those given, or these, in ``spec.zero_point_dtype``.

    Args:
        weight: any float tensor.
        step_size: float32 (rows, groups).
        zero_point: real, like the step size; where to start.
        spec: the grid, with real zero points.
    """
    weight, scale = weight.detach().float(), stored_scale(step_size, spec)
    blocks, steps = weight.reshape(*step_size.shape, -1), scale.float()[..., None]
    zero = best = stored_zero_point(zero_point, spec)
    least, sharpness = torch.full(step_size.shape, torch.inf, device=weight.device), SHARPNESS
    for _ in range(TURNS):
        codes = quantize(weight, scale, spec, zero)
        error = (blocks - dequantize(codes, scale, torch.float32, zero).reshape(blocks.shape)) / steps
        size = error.abs()
        total = size.pow(NORM).sum(-1)
        best, least = torch.where(total < least, zero, best), torch.minimum(total, least)
        shrunken = error.sign() * (size - size.clamp_min(torch.finfo(size.dtype).tiny).pow(NORM - 1) / sharpness).relu()
        fitted = (codes.reshape(blocks.shape) - blocks / steps + shrunken).mean(-1)
        zero, sharpness = stored_zero_point(fitted, spec), sharpness * GROWTH
    return best
