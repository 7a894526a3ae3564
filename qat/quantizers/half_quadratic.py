"""HQQ's step size, without data: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".

It minimises ||W - W_hat||_p^p with p < 1, for which a few large errors weigh less than under a square. HQQ learns the
zero point of an asymmetric grid beside a fixed scale; a symmetric grid has only the step size, so the same splitting
is solved for that: shrink the error to what counts as an outlier, then fit the step size to the rest in closed form.
Errors are measured in starting step sizes, so that the result does not depend on the scale of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import MIN_SCALE, dequantize, quantize, stored_scale
from ..spec import QuantSpec

P = 0.7
BETA, GROWTH = 10.0, 1.01  # of the quadratic penalty, and its growth an iteration
ITERATIONS = 20
STARTS = (1.0, 0.85, 0.7, 0.55, 0.4)  # of the step size that clips nothing: the splitting is local


def half_quadratic_step_size(weight: Tensor, largest: Tensor, spec: QuantSpec) -> Tensor:
    """Return the step sizes of least p-norm error, (rows, groups) float32.

    Args:
        weight: any float tensor.
        largest: (rows, groups) float32, the step sizes that clip nothing.
        spec: the grid.
    """
    largest = largest.clamp_min(MIN_SCALE)
    values = weight.detach().float().reshape(*largest.shape, -1) / largest[..., None]
    best, least = largest, _error(values, largest, largest, spec)
    for share in STARTS:
        step, beta = largest * share, BETA
        for _ in range(ITERATIONS):
            error = _error(values, step, largest, spec)
            best, least = torch.where(error < least, step, best), error.minimum(least)
            codes, residual = _residual(values, step, largest, spec)
            outliers = residual.sign() * (residual.abs() - residual.abs().clamp_min(1e-6) ** (P - 1) / beta).relu()
            norm = codes.square().sum(-1)
            fitted = (codes * (values - outliers)).sum(-1) / norm.clamp_min(1) * largest
            step, beta = torch.where(norm > 0, fitted, step).clamp_min(MIN_SCALE), beta * GROWTH
    return best


def _residual(values: Tensor, step: Tensor, largest: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the codes and the error of the stored scale, both (rows, groups, block), in units of ``largest``."""
    scale = stored_scale(step, spec).float() / largest
    codes = quantize(values, scale, spec)
    return codes, values - dequantize(codes, scale, torch.float32)


def _error(values: Tensor, step: Tensor, largest: Tensor, spec: QuantSpec) -> Tensor:
    return _residual(values, step, largest, spec)[1].abs().pow(P).sum(-1)
