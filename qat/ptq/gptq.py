"""GPTQ (Frantar et al. 2022, arXiv:2210.17323) and GPTAQ (Li et al. 2025, arXiv:2504.02692) on one matrix.

Columns are rounded one after another, and what a rounding does to the layer's output is made up for in the columns that
are still to come. H is the mean of x x^T over calibration inputs, U the upper Cholesky factor of its inverse; after
column j the others move by -e U[j], with e = (w_j - round(w_j)) / U[j, j] (algorithm 1). GPTAQ knows what the inputs
would be in the unquantized model, and also corrects for the difference that earlier layers made.

All in float32: the caller keeps TF32 off (``qat.ptq.sequential``), which is too coarse for the factorisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..codebook import SMALLEST
from ..errors import CalibrationError
from ..numerics import dequantize, quantize, scale_shape, stored_scale
from ..quantizers.lsq import weight_step_size
from ..spec import Granularity, Init, QuantSpec

BLOCK = 128  # columns between two updates of all that come later
MOST_DAMPING = 1.0
ASYMMETRY = 0.25  # GPTAQ's alpha, of its published code


@dataclass
class Factor:
    """What GPTQ needs of a layer's inputs; layers that read the same inputs share it.

    Attributes:
        order: the columns in the order they are rounded in.
        inverse: U, (K, K) upper, rows and columns in that order.
        correction: GPTAQ's P, (K, K) strictly upper; None for GPTQ.
        damping: the share of the mean diagonal that was added before the factorisation succeeded.
    """

    order: Tensor
    inverse: Tensor
    correction: Tensor | None
    damping: float


def factorize(hessian: Tensor, damping: float, act_order: bool, difference: Tensor | None = None) -> Factor:
    """Factorise the inverse of a damped Hessian.

    Args:
        hessian: (K, K) float32, the mean of x x^T.
        damping: the first share of the mean diagonal to add; doubled until the factorisation succeeds.
        act_order: round the columns of the largest inputs first.
        difference: (K, K), the mean of (x_unquantized - x) x^T, for GPTAQ.

    Raises:
        CalibrationError: it does not succeed with a damping of 1 either.
    """
    diagonal = hessian.diagonal()
    order = torch.arange(len(diagonal), device=diagonal.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    hessian, mean = hessian[order][:, order], diagonal.mean()
    damped, damping = hessian.clone(), max(damping, 1e-6)
    while damping <= MOST_DAMPING:
        damped.diagonal().copy_(hessian.diagonal() + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            return Factor(order, upper, _correction(difference, order, upper), damping)
        damping *= 2
    raise CalibrationError(
        f"the Hessian of its inputs has no Cholesky factor, even with {damping / 2:g} of its mean diagonal added: "
        "give more and more varied calibration batches"
    )


def _correction(difference: Tensor | None, order: Tensor, upper: Tensor) -> Tensor | None:
    if difference is None:
        return None
    return ASYMMETRY * (difference[order][:, order] @ upper.T).triu(1) @ upper


def gptq(
    weight: Tensor, factor: Factor, spec: QuantSpec, act_order: bool, step_size: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what was rounded, and with which step sizes: quantizing the one by the other gives GPTQ's codes.

    Step sizes have the least sum of e^2: the squared error of a weight counts 1 / U[j, j]^2, which is what it costs
    after later columns have made up for it (benchmarks/NOTES.md has the figures). Without ``act_order`` a group's come
    from its compensated weights, when its first column is reached; with it from the original ones, as a group's columns
    are then not neighbours (static groups: no index of groups has to be stored). Those of channels and tensors come
    from the original weight.

    Args:
        weight: (N, K) float32.
        factor: of its inputs.
        spec: the grid.
        act_order: whether ``factor`` was made with it.
        step_size: given instead, (rows, groups) float32; then none is searched.

    Returns:
        compensated: (N, K) float32 in the layer's own column order.
        step_size: (rows, groups) float32.
    """
    columns, order = weight.shape[1], factor.order.tolist()
    live = spec.granularity is Granularity.group and not act_order and step_size is None
    costs = factor.inverse.diagonal()[factor.order.argsort()] ** -2
    step_size = weight_step_size(weight, spec, Init.mse, costs) if step_size is None else step_size
    group = spec.group_size if spec.granularity is Granularity.group else columns
    per_group = replace(spec, granularity="channel", group_size=None)

    def rounded(ahead: Tensor, position: int) -> Tensor:
        at = order[position] // group
        if live and position % group == 0:
            here = ahead[:, :group].contiguous(), per_group, Init.mse, costs[position : position + group]
            step_size[:, at : at + 1] = weight_step_size(*here)
        scale = stored_scale(step_size[:, at : at + 1], spec)
        return dequantize(quantize(ahead[:, :1].clone(), scale, per_group), scale, torch.float32)[:, 0]

    # A live group never straddles two blocks.
    return compensate(weight, factor, rounded, max(1, BLOCK // group) * group if live else BLOCK), step_size


def gptq_to_levels(
    weight: Tensor, factor: Factor, levels: Tensor, scale: Tensor, shipped_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the codes (N, K), int8, and ``levels[codes] * scale``, whose own codes they are, for GPTQ on a codebook.

    Scales stay those of the original weight, the largest magnitude of each block. Where that lies, its level is the
    outermost one: so the result has the same scales, and they need not be stored beside it while it trains.

    Args:
        weight: (N, K) float32.
        factor: of its inputs.
        levels: (L,) ascending from -1 to 1.
        scale: (N, groups) float32, the largest magnitudes, by which codes are chosen.
        shipped_scale: what dequantizing multiplies with, like ``scale``, which it is unless scales are quantized too.
    """
    columns, order = weight.shape[1], factor.order.tolist()
    group, bounds = columns // scale.shape[1], (levels[:-1] + levels[1:]) / 2
    codes = torch.empty_like(weight, dtype=torch.int8)
    blocks = weight.view(*scale.shape, group)
    largest = torch.zeros_like(blocks, dtype=torch.bool)
    largest.scatter_(-1, blocks.abs().argmax(-1, keepdim=True), (scale > 0)[..., None])
    outermost = torch.where(weight > 0, len(levels) - 1, 0).to(torch.int8)
    pinned, factors = largest.view_as(weight), 1.0 / scale.clamp_min(SMALLEST)

    def rounded(ahead: Tensor, position: int) -> Tensor:
        at = order[position]
        ratio = (ahead[:, 0] * factors[:, at // group]).clamp(-1, 1)
        nearest = torch.bucketize(ratio, bounds).to(torch.int8)
        codes[:, at] = torch.where(pinned[:, at], outermost[:, at], nearest)
        return levels[codes[:, at].int()] * shipped_scale[:, at // group]

    compensate(weight, factor, rounded)
    return codes, (levels[codes.int()].view_as(blocks) * scale[..., None]).view_as(weight)


def compensate(weight: Tensor, factor: Factor, rounded: Callable[[Tensor, int], Tensor], block: int = BLOCK) -> Tensor:
    """Return what was rounded, (N, K) in the layer's own column order: each column behind the errors of those before.

    Args:
        weight: (N, K) float32.
        factor: of its inputs.
        rounded: from the columns that are left of a block, in the factor's order, and the position of the first of
            them to what that one is rounded to, (N,).
        block: columns between two updates of all that come later.
    """
    w, columns = weight[:, factor.order].clone(), weight.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        w1, upper = w[:, start:stop], factor.inverse[start:stop]
        errors = torch.empty_like(w1)
        for j in range(stop - start):
            column = w1[:, j].clone()
            errors[:, j] = (column - rounded(w1[:, j:], start + j)) / upper[j, start + j]
            w1[:, j:] -= torch.outer(errors[:, j], upper[j, start + j : stop])
            if factor.correction is not None:
                w1[:, j:] += torch.outer(column, factor.correction[start + j, start + j : stop])
            w1[:, j] = column
        w[:, stop:] -= errors @ upper[:, stop:]
        if factor.correction is not None:
            w[:, stop:] += w1 @ factor.correction[start:stop, stop:]
    return w[:, factor.order.argsort()]


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """Return the mean squared change of the layer's output, summed over its N outputs: tr(E H E^T)."""
    error = rounded - weight
    return ((error @ hessian) * error).sum(dtype=torch.float64)


def rounded_weight(weight: Tensor, step_size: Tensor, spec: QuantSpec) -> Tensor:
    """Return the dequantized float32 weight for step sizes (rows, groups)."""
    scale = stored_scale(step_size.reshape(scale_shape(weight.shape, spec)), spec)
    return dequantize(quantize(weight, scale, spec), scale, torch.float32)
