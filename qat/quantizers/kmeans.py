"""The levels of a custom codebook: weighted k-means of one dimension in each row, by Lloyd's algorithm.

As in SqueezeLLM (arXiv:2306.07629, section 4.1), with any importance of the values. Values are sorted once; sums are
differences of running sums in float64, so that the result is the same on every run.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 30
APART = 2.0**-20  # levels ascend, also in a row of few values


def kmeans_levels(values: Tensor, importance: Tensor, start: Tensor) -> Tensor:
    """Return ascending levels of least squared error, weighted by importance; one that no value is nearest to stays.

    Args:
        values: (rows, n).
        importance: of each value, not negative; (rows, n).
        start: ascending levels, (count,).

    Returns:
        float32 (rows, count).
    """
    ordered, order = values.detach().double().sort(-1)
    weights = importance.double().gather(1, order)
    totals, sums = (F.pad(x.cumsum(-1), (1, 0)) for x in (weights, weights * ordered))
    levels = start.to(ordered).expand(len(ordered), -1)
    for _ in range(ITERATIONS):
        bounds = (levels[:, :-1] + levels[:, 1:]) / 2
        ends = torch.searchsorted(ordered, bounds.contiguous(), right=True)  # one at a bound goes to the lower level
        edges = F.pad(F.pad(ends, (1, 0)), (0, 1), value=ordered.shape[1])
        mass = totals.gather(1, edges).diff()
        means = sums.gather(1, edges).diff() / mass.clamp_min(torch.finfo(torch.float64).tiny)
        levels = torch.where(mass > 0, means, levels)
    steps = torch.arange(levels.shape[1], device=values.device) * APART
    return ((levels - steps).cummax(-1).values + steps).float()


def normal_levels(bits: int) -> Tensor:
    """Return 2^bits levels for normally distributed values, from -1 over 0 to 1: those of NF4, for other bits too.

    From quantiles or even steps k-means ends in worse optima: a block's largest magnitude, at 1 or -1, weighs most.
    """
    end = 0.9677083  # the quantile of bitsandbytes' create_normal_map
    counts = 2 ** (bits - 1), 2 ** (bits - 1) + 1
    shares = [torch.linspace(end, 0.5, count, dtype=torch.float32, device="cpu")[:-1] for count in counts]
    halves = [torch.erfinv(2 * share - 1) * math.sqrt(2) for share in shares]
    return torch.cat([-halves[0], halves[0].new_zeros(1), halves[1].flip(0)]) / halves[1][0]
