"""Gradient checkpointing of transformers models: what blocks keep is computed again in the backward."""

from __future__ import annotations

from torch import nn

from ..errors import TrainingError
from ..ptq.units import repeated


def checkpoint_gradients(model: nn.Module, blocks: bool | int) -> None:
    """Let blocks of a transformers model be computed again in the backward: all of them, or the first so many.

    What the last ones keep is the first that the backward is done with.

    Raises:
        TrainingError: a model that does not support it, or a number of blocks that it does not have.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise TrainingError(
            f"gradient_checkpointing={blocks}: {type(model).__name__} does not support it: leave it false"
        )
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its newer name
    enable({"use_reentrant": False})
    model.config.use_cache = False
    if blocks is True:
        return
    found = [block for block in repeated(model) if hasattr(block, "gradient_checkpointing")]
    if not isinstance(blocks, int) or not 1 <= blocks <= len(found):
        raise TrainingError(
            f"gradient_checkpointing={blocks}: give true, false, or a number of blocks from 1 to {len(found)}"
        )
    for block in found[blocks:]:
        block.gradient_checkpointing = False
