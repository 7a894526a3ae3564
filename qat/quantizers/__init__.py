"""Quantizers: the learned step size (LSQ) of weights and activations, codebooks, runtimes' rounding of activations."""

from .asymmetric import AsymmetricLSQ
from .codebook import WeightCodebook
from .dynamic import DynamicActivation
from .fixed_dtype import FixedDtype
from .lsq import ActivationLSQ, ActivationStatistics, FrozenActivation, LearnedStepSize, WeightLSQ

__all__ = [
    "ActivationLSQ",
    "ActivationStatistics",
    "AsymmetricLSQ",
    "DynamicActivation",
    "FixedDtype",
    "FrozenActivation",
    "LearnedStepSize",
    "WeightCodebook",
    "WeightLSQ",
]
