"""The step size of least squared error, by search: the start that LSQ+ (arXiv:2004.09576, section 3.2) proposes.

LSQ's own 2<|v|>/sqrt(Q_P) is far too small where most values are zero, as behind a ReLU at 2 bits, and far too large at
8 bits, where few of the codes are then used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import dequantize, quantize, stored_scale
from ..spec import QuantSpec

CANDIDATES = 100  # shares of the step size that clips nothing
# Of a weight at a time on a CPU, which its caches hold: 2 to 3 times as fast as all at once.
ELEMENTS = 2**18


def squared_errors(x: Tensor, largest: Tensor, spec: QuantSpec, weights: Tensor | None = None) -> Tensor:
    """Return the summed squared error of each candidate step size.

    Args:
        x: any float tensor.
        largest: (rows, groups) float32, the step sizes that clip nothing.
        spec: the grid.
        weights: what the squares are multiplied by, float32 that broadcasts to x; None for 1.

    Returns:
        (CANDIDATES, rows, groups) float64; candidate i is ``largest * (i + 1) / CANDIDATES``.
    """
    x = x.detach().float()
    if x.device.type != "cpu" or len(x) != len(largest):  # of one scale for all rows, the sum is one
        return _squared_errors(x, largest, spec, weights)
    rows = max(1, ELEMENTS * len(x) // max(1, x.numel()))
    parts = zip(x.split(rows), largest.split(rows), strict=True)
    if weights is None:
        return torch.cat([_squared_errors(part, most, spec, None) for part, most in parts], 1)
    parts = zip(parts, weights.expand(x.shape).split(rows), strict=True)
    return torch.cat([_squared_errors(part, most, spec, weight) for (part, most), weight in parts], 1)


def _squared_errors(x: Tensor, largest: Tensor, spec: QuantSpec, weights: Tensor | None) -> Tensor:
    errors = []
    for candidate in range(1, CANDIDATES + 1):
        scale = stored_scale(largest * (candidate / CANDIDATES), spec)
        difference = dequantize(quantize(x, scale, spec), scale, torch.float32) - x
        squares = difference.square_() if weights is None else difference.square_() * weights
        errors.append(squares.reshape(*largest.shape, -1).sum(-1, dtype=torch.float64))
    return torch.stack(errors)


def best_step_size(errors: Tensor, largest: Tensor) -> Tensor:
    """Return the candidates of least error, (rows, groups) float32."""
    return largest * ((errors.argmin(0) + 1).float() / CANDIDATES)
