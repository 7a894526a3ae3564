"""What an init that reads data did to each layer: how well, and where it could not do what was asked."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import some_of
from ..layers import QuantLayer
from ..numerics import dequantize, quantize
from ..quantizers import WeightCodebook
from ..quantizers.lsq import weight_step_size
from ..spec import Init


@dataclass
class Report:
    """Of all layers, in order.

    Attributes:
        init: the method.
        losses: layer -> the squared change of its output on calibration data, as a multiple of round-to-nearest's; of
            methods that train a block, the block's.
        fallbacks: layer -> why it was rounded to the least squared error instead.
        notes: layer -> what else should be known.
    """

    init: Init
    losses: dict[str, float] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def _what(self) -> str:
        return "blocks" if self.init in (Init.signround, Init.blockwise) else "layers"

    @property
    def _compared(self) -> str:
        return "plain k-means'" if self.init is Init.squeezellm else "round-to-nearest's"

    def __str__(self) -> str:
        lines = []
        if self.losses:
            mean, worst = statistics.mean(self.losses.values()), max(self.losses, key=self.losses.get)
            lines.append(
                f"{self.init.value}: {len(self.losses)} {self._what}, output error {mean:.3f} of {self._compared} on "
                f"average, {self.losses[worst]:.3f} in {worst!r}"
            )
        for note in dict.fromkeys(self.notes.values()):
            names = [name for name, said in self.notes.items() if said == note]
            lines.append(f"{self.init.value}: {note}: {some_of(list(map(repr, names)))}")
        if self.fallbacks:
            lines.append(
                f"{self.init.value}: fallbacks: {len(self.fallbacks)}, to the least squared error of the weight"
            )
            lines += [f"  {name!r}: {reason}" for name, reason in self.fallbacks.items()]
        return "\n".join(lines)


def set_layer(layer: QuantLayer, weight: Tensor, step_size: Tensor) -> None:
    """Give a layer its step sizes and the weight that was rounded, so that its codes are the method's.

    The weight stays between grid points, where training goes on from; only where the weight's dtype is too coarse to
    keep a code does it go onto its grid point.

    Args:
        layer: fake-quant.
        weight: float32, in the shape of the layer's weight.
        step_size: (rows, groups) float32.
    """
    quantizer = layer.weight_quantizer
    quantizer.set_step_size(step_size)
    scale = quantizer.scale()
    codes = quantize(weight, scale, quantizer.spec)
    stored = weight.to(layer.weight.dtype)
    grid = dequantize(codes, scale, stored.dtype)
    layer.weight.copy_(torch.where(quantize(stored, scale, quantizer.spec) == codes, stored, grid))


def set_fallback(name: str, layer: QuantLayer, reason: str, report: Report) -> None:
    """Round a layer's weight to the least squared error, or to a codebook's nearest levels, and count it."""
    quantizer = layer.weight_quantizer
    if isinstance(quantizer, WeightCodebook):
        quantizer.calibrated()
        report.fallbacks[name] = f"{reason}; to the nearest levels"
        return
    quantizer.set_step_size(weight_step_size(layer.weight, quantizer.spec, Init.mse))
    report.fallbacks[name] = reason
