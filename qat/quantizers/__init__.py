"""Quantizers: the learned step size (LSQ) of weights and activations."""

from .fixed_dtype import FixedDtype
from .lsq import ActivationLSQ, ActivationStatistics, FrozenActivation, LearnedStepSize, WeightLSQ

__all__ = [
    "ActivationLSQ",
    "ActivationStatistics",
    "FixedDtype",
    "FrozenActivation",
    "LearnedStepSize",
    "WeightLSQ",
]
