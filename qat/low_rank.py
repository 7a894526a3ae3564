"""Adapters B A of the least error: of a weight itself, and of the output of a layer whose inputs are known."""

from __future__ import annotations

import torch
from torch import Tensor


def best_of_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (r, K) and B (N, r) of the least squared error in a weight (N, K), the singular values shared evenly.

    They come from the eigenvectors of the smaller product of the weight with itself, in float64, where squaring loses
    nothing that a float32 weight has: several times as fast as a decomposition of the weight. They are computed on a
    GPU where there is one, since an 8B model's take hours on a CPU.
    """
    if weight.shape[0] > weight.shape[1]:
        b, a = best_of_rank(weight.T, rank)
        return a.T, b.T
    wide = weight.to("cuda" if torch.cuda.is_available() else weight.device, torch.float64)
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    root = values[-rank:].clamp_min(torch.finfo(torch.float32).tiny).pow(0.25)
    b = vectors[:, -rank:] * root
    return (vectors[:, -rank:].T @ wide / root[:, None]).to(weight), b.to(weight)


def best_for_inputs(weight: Tensor, factor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of the least squared error in a layer's output, tr((W - B A) H (W - B A)^T).

    With H = R R^T that is the best approximation of W R, taken back by R^-1 (CLoQ, arXiv:2501.18475). Any such R will
    do, since two of them differ by a rotation. The singular values of B A are then shared evenly.

    Args:
        weight: W, (N, K) float32.
        factor: U, (K, K) upper triangular with H^-1 = U^T U: R is U^-1.
        rank: r.
    """
    a, b = best_of_rank(torch.linalg.solve_triangular(factor, weight, upper=True, left=False), rank)
    return best_of_rank(b @ (a @ factor), rank)
