"""SqueezeLLM's levels of a custom codebook (Kim et al. 2023, arXiv:2306.07629, section 4.1), one layer after another.

There k-means weighs each value of a row by the Fisher information of its weight. With the information of a layer taken
as a product of one factor for its inputs and one for its outputs (K-FAC, arXiv:1503.05671, section 3), the outputs' is
the same for a whole row, where it decides nothing: what is left is the mean square of each input, and no backward pass.
"""

from __future__ import annotations

from torch import Tensor

from .. import codebook
from ..errors import CalibrationError
from ..layers import QuantLayer
from ..quantizers.kmeans import kmeans_levels, normal_levels
from .error_compensation import fall_back, fall_back_unreached, gather, total_error
from .moments import Moments
from .options import Options
from .report import Report
from .units import Unit


def quantize_unit(unit: Unit, options: Options, report: Report) -> None:
    """Set the levels of every layer of a unit; each layer's inputs come from layers that are rounded already.

    Raises:
        CalibrationError: a layer that no data reach, or bad data, unless options allow the fallback, k-means in which
            every value of a block counts the same.
    """
    unit.find_stages()
    for stage in unit.stages:
        try:
            moments = gather(unit, stage[0])
        except CalibrationError as error:
            fall_back({name: unit.layers[name] for name in stage}, error, options, report)
            continue
        for name in stage:
            report.losses[name] = set_levels(unit.layers[name], moments)
            unit.layers[name].weight_quantizer.enabled = True
    fall_back_unreached(unit, options, report)


def set_levels(layer: QuantLayer, moments: Moments) -> float:
    """Give a layer the levels of least output error; return that error as a multiple of the one before.

    Args:
        layer: with a custom codebook.
        moments: of its inputs.
    """
    quantizer, weight = layer.weight_quantizer, layer.weight.detach().float().flatten(1)
    quantizer.calibrated()  # the levels that it has are those of plain k-means
    before = total_error(weight, quantizer.quantize(weight).dequantize(), moments.hessian)
    scale = codebook.block_scale(weight, quantizer.shape)
    values = codebook.ratio(weight, scale)
    importance = input_squares(weight, moments).reshape(values.shape) * scale.double().square()[..., None]
    rows = len(quantizer.levels)
    start = normal_levels(quantizer.spec.bits).to(values.device)
    quantizer.set_levels(kmeans_levels(values.reshape(rows, -1), importance.reshape(rows, -1), start))
    after = total_error(weight, quantizer.quantize(weight).dequantize(), moments.hessian)
    return after / before if before else 1.0


def input_squares(weight: Tensor, moments: Moments) -> Tensor:
    """Return the mean square of what each weight (N, K) is multiplied by, float64."""
    squares = moments.hessian.diagonal(dim1=1, dim2=2).double()
    return squares.repeat_interleave(len(weight) // len(squares), 0)
