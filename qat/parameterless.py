"""Device and dtype of a transformers model that is quantized to its last parameter, by which transformers tells them.

``generate`` asks for both. OLMo's norms have no weights, and its head may be its embedding: nothing is left to ask.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .layers import FrozenLayer


def _told_by_frozen_layers(name: str) -> property:
    """Return a property of transformers' models that a frozen layer answers where no parameter does."""
    plain = getattr(PreTrainedModel, name)

    def read(self: nn.Module) -> Any:
        try:
            return plain.fget(self)
        except StopIteration:
            like = next((layer.like for layer in self.modules() if isinstance(layer, FrozenLayer)), None)
            if like is None:
                raise
            return getattr(like, name)

    return property(read, doc=plain.__doc__)


PreTrainedModel.device = _told_by_frozen_layers("device")
PreTrainedModel.dtype = _told_by_frozen_layers("dtype")
