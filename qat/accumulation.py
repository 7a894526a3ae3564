"""Gradient accumulation: round each weight once for all micro-batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .layers import quant_layers
from .quantizers import LearnedWeight


def weight_quantizers(model: nn.Module) -> list[LearnedWeight]:
    """Return a prepared model's weight quantizers with step sizes, each once."""
    quantizers = (layer.weight_quantizer for _, layer in quant_layers(model))
    return list(dict.fromkeys(quantizer for quantizer in quantizers if isinstance(quantizer, LearnedWeight)))


@contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Keep each rounded weight from its first use on, forward and backward, until the context ends.

    It takes one copy of the weights in the compute dtype. Leave the context before the optimizer steps: a weight that
    changes in place, or another one in its place, is rounded again, but FSDP2 gathers a changed weight without a trace.
    In a compiled model nothing is kept.

        with qat.kept_weights(model):
            for batch in micro_batches:
                loss(model(batch)).backward()
        optimizer.step()
    """
    quantizers = weight_quantizers(model)
    for quantizer in quantizers:
        quantizer.kept = {}
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.kept = None
