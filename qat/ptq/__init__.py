"""Initialisers that read calibration data: GPTQ, GPTAQ, AWQ, SignRound, block-wise LSQ, and SqueezeLLM's codebooks.

``qat.calibrate`` runs them for a model that was prepared with their word as ``init``. Each sets the state that LSQ then
trains, and is a post-training quantization of its own where no training follows.
"""

from .options import Options
from .report import Report
from .sequential import initialise, waiting_layers

__all__ = ["Options", "Report", "initialise", "waiting_layers"]
