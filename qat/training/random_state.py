"""The state of the random numbers that training may draw: torch's on the CPU, numpy's and Python's, as plain values."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states, which a checkpoint can hold."""
    name, keys, *rest = np.random.get_state()
    return {"cpu": torch.get_rng_state(), "numpy": (name, keys.tolist(), *rest), "python": random.getstate()}


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from states; from those that are there, as a checkpoint of an older version has torch's alone."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"].cpu())
    if "numpy" in state:
        np.random.set_state(state["numpy"])
    if "python" in state:
        random.setstate(state["python"])
