"""Quantizers: LSQ, LSQ+, PACT and min-max of weights and activations, codebooks, runtimes' rounding of activations."""

from .asymmetric import AsymmetricLSQ
from .codebook import WeightCodebook
from .dynamic import DynamicActivation
from .fixed_dtype import FixedDtype
from .frozen import FrozenActivation
from .lsq import ActivationLSQ, LearnedActivation, LearnedStepSize, LearnedWeight, WeightLSQ
from .lsq_plus import ActivationLSQPlus
from .minmax import ActivationMinMax, ActivationRange, WeightMinMax
from .observer import ActivationStatistics
from .pact import ActivationPACT

OfWeight = WeightLSQ | AsymmetricLSQ | WeightCodebook | WeightMinMax
OfInput = LearnedActivation | DynamicActivation
Quantizer = LearnedStepSize | WeightCodebook | WeightMinMax | DynamicActivation

__all__ = [
    "ActivationLSQ",
    "ActivationLSQPlus",
    "ActivationMinMax",
    "ActivationPACT",
    "ActivationRange",
    "ActivationStatistics",
    "AsymmetricLSQ",
    "DynamicActivation",
    "FixedDtype",
    "FrozenActivation",
    "LearnedActivation",
    "LearnedStepSize",
    "LearnedWeight",
    "OfInput",
    "OfWeight",
    "Quantizer",
    "WeightCodebook",
    "WeightLSQ",
    "WeightMinMax",
]
