"""Quantizers: the learned step size (LSQ)."""

from .fixed_dtype import FixedDtype
from .lsq import ActivationLSQ, Init, WeightLSQ, minmax_step_size, lsq_step_size

__all__ = ["ActivationLSQ", "FixedDtype", "Init", "WeightLSQ", "lsq_step_size", "minmax_step_size"]
