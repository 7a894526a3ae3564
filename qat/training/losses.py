"""What training minimises: the targets' cross-entropy, and a teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import IGNORED, cross_entropy


def training_loss(
    logits: Tensor,
    targets: Tensor,
    taught: Tensor | None,
    share: float,
    label_smoothing: float,
    temperature: float,
    teacher_share: float = 0.5,
) -> Tensor:
    """Return the loss of logits (..., C).

    Args:
        logits: the network's.
        targets: (...); those of mixed examples count for ``share``, and their reverse for the rest.
        taught: a teacher's logits, which then count for ``teacher_share``, and the targets for the rest.
        share: 1 without mixtures.
        label_smoothing, temperature, teacher_share: see ``Task``.
    """
    loss = cross_entropy(logits, targets, label_smoothing)
    if share < 1:
        loss = share * loss + (1 - share) * cross_entropy(logits, targets.flip(0), label_smoothing)
    if taught is None:
        return loss
    return loss.lerp(soft_cross_entropy(logits, taught, targets, temperature), teacher_share)


def mean_prediction(logits: Sequence[Tensor]) -> Tensor:
    """Return logits (..., C) of the mean of the probabilities that several networks' logits (..., C) stand for."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([each.float().log_softmax(-1) for each in logits]).logsumexp(0) - math.log(len(logits))


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean cross-entropy with the teacher's probabilities, for logits (..., C).

    Both are softened by the temperature, whose square keeps the size of the gradients (arXiv:1503.02531, section 2.1).
    Predictions whose target (...) is IGNORED do not count.
    """
    probabilities = (teacher_logits.flatten(0, -2).float() / temperature).softmax(-1)
    losses = F.cross_entropy(logits.flatten(0, -2).float() / temperature, probabilities, reduction="none")
    counted = targets.flatten() != IGNORED
    return torch.where(counted, losses, 0).sum() / counted.sum() * temperature**2
