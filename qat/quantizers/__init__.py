"""Quantizers: the learned step size (LSQ) of weights and activations, and runtimes' own rounding of activations."""

from .dynamic import DynamicActivation
from .fixed_dtype import FixedDtype
from .lsq import ActivationLSQ, ActivationStatistics, FrozenActivation, LearnedStepSize, WeightLSQ

__all__ = [
    "ActivationLSQ",
    "ActivationStatistics",
    "DynamicActivation",
    "FixedDtype",
    "FrozenActivation",
    "LearnedStepSize",
    "WeightLSQ",
]
