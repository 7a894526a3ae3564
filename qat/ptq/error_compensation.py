"""GPTQ and GPTAQ on the layers of a unit: in the order they run in, each on inputs behind those that are rounded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import codebook
from ..double_quantization import nest
from ..errors import CalibrationError
from ..layers import QuantLayer
from ..quantizers import WeightCodebook
from ..quantizers.lsq import weight_step_size
from ..spec import Granularity, Init
from .gptq import Factor, factorize, gptq, gptq_to_levels, output_error, rounded_weight
from .moments import Moments
from .options import Options
from .report import Report, set_fallback, set_layer
from .units import Layers, Unit

AfterLayer = Callable[[str, Tensor, Tensor, Factor], None]


def quantize_unit(unit: Unit, options: Options, report: Report, after_layer: AfterLayer | None = None) -> None:
    """Quantize every layer of a unit; layers that read the same input share its moments.

    Args:
        unit, options, report: see there.
        after_layer: called with each linear layer's name, its weight (N, K) before, that as it is rounded now, and the
            factor of its inputs.

    Raises:
        CalibrationError: a layer that cannot be quantized with this data, unless options allow the fallback.
    """
    unit.find_stages()
    for stage in unit.stages:
        moments = gather(unit, stage[0], asymmetric=report.init is Init.gptaq)
        try:
            moments.require_rows(stage[0])
            factors = factors_of(moments, options)
        except CalibrationError as error:
            fall_back({name: unit.layers[name] for name in stage}, error, options, report)
            continue
        damping = max(factor.damping for factor in factors)
        for name in stage:
            if damping > options.damping:
                report.notes[name] = f"the Hessian was damped by {damping:g} instead of {options.damping:g}"
            layer = unit.layers[name]
            weight = layer.weight.detach().float().flatten(1).clone()
            report.losses[name] = quantize_layer(layer, weight, moments, factors, options.act_order)
            layer.weight_quantizer.enabled = True
            if after_layer is not None:
                after_layer(name, weight, layer.weight_quantizer.quantize(layer.weight).dequantize(), factors[0])
    fall_back_unreached(unit, options, report)


def gather(unit: Unit, name: str, asymmetric: bool = False) -> Moments:
    """Return the moments of what a layer gets over all batches.

    Raises:
        CalibrationError: NaN, infinity, or inputs without variety.
    """
    moments, layer = Moments(), unit.layers[name]
    unquantized = unit.inputs(name, twin=True) if asymmetric else None
    for inputs in unit.inputs(name):
        references = next(unquantized) if asymmetric else [None] * len(inputs)
        for x, reference in zip(inputs, references, strict=True):
            moments.update(layer, x, reference)
    return moments.finish(name)


def factors_of(moments: Moments, options: Options) -> list[Factor]:
    """Return a factor for each of a convolution's groups; a linear layer has one."""
    differences = [None] * len(moments.hessian) if moments.difference is None else moments.difference
    pairs = zip(moments.hessian, differences, strict=True)
    return [factorize(hessian, options.damping, options.act_order, difference) for hessian, difference in pairs]


def quantize_layer(
    layer: QuantLayer, weight: Tensor, moments: Moments, factors: list[Factor], act_order: bool
) -> float:
    """Quantize one layer of a weight (N, K) float32; return its output error as a multiple of round-to-nearest's."""
    spec = layer.weight_quantizer.spec
    if isinstance(layer.weight_quantizer, WeightCodebook):
        set_codes(layer, weight, factors)
        return relative_error(layer, weight, moments)
    shared = weight_step_size(weight, spec, Init.mse) if spec.granularity is Granularity.tensor else None
    parts = weight.chunk(len(factors))
    pairs = [gptq(part, factor, spec, act_order, shared) for part, factor in zip(parts, factors, strict=True)]
    compensated, step_size = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
    set_layer(layer, compensated.view(layer.weight.shape), step_size if shared is None else shared)
    return relative_error(layer, weight, moments)


def set_codes(layer: QuantLayer, weight: Tensor, factors: list[Factor]) -> None:
    """Give a layer with a codebook the weight of GPTQ's codes."""
    quantizer, parts = layer.weight_quantizer, len(factors)
    scale = codebook.block_scale(weight, quantizer.shape)
    shipped = scale if quantizer.scale_levels is None else nest(scale, quantizer.scale_levels).values()
    rows = [each.expand(len(weight), -1).chunk(parts) for each in (scale, shipped)]
    values = [
        gptq_to_levels(part, factor, quantizer.levels[0], *scales)[1]
        for part, factor, *scales in zip(weight.chunk(parts), factors, *rows, strict=True)
    ]
    layer.weight.copy_(torch.cat(values).view(layer.weight.shape))
    quantizer.calibrated()


def relative_error(
    layer: QuantLayer, weight: Tensor, moments: Moments, usual: tuple[Tensor, Tensor] | None = None
) -> float:
    """Return the output error of a layer that is set, as a multiple of round-to-nearest's.

    Args:
        layer: rounded.
        weight: its weight before, (N, K) float32.
        moments: of its inputs.
        usual: the weight to round to nearest, and its inputs' Hessian, where both were scaled since.
    """
    spec = layer.weight_quantizer.spec
    plain, hessian = usual or (weight, moments.hessian)
    if isinstance(layer.weight_quantizer, WeightCodebook):
        nearest = layer.weight_quantizer.quantize(plain).dequantize()
    else:
        nearest = rounded_weight(plain, weight_step_size(plain, spec, Init.minmax), spec)
    rounded = layer.weight_quantizer.quantize(layer.weight).dequantize().flatten(1)
    error = total_error(weight, rounded, moments.hessian)
    nearest_error = total_error(plain, nearest, hessian)
    return error / nearest_error if nearest_error else 1.0


def total_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Return the squared change of the output, summed over a convolution's groups."""
    parts = zip(weight.chunk(len(hessian)), rounded.chunk(len(hessian)), hessian, strict=True)
    return float(sum(output_error(*part) for part in parts))


def fall_back(layers: Layers, error: CalibrationError, options: Options, report: Report) -> None:
    """Round layers from their weights alone where options allow it, else raise.

    Raises:
        CalibrationError: the one given, where options do not allow it.
    """
    if not options.allow_fallback:
        raise CalibrationError(
            f"{error}; or let such layers be rounded to the least squared error: allow_fallback=true"
        ) from None
    for name, layer in layers.items():
        set_fallback(name, layer, str(error), report)
        layer.weight_quantizer.enabled = True


def fall_back_unreached(unit: Unit, options: Options, report: Report) -> None:
    """Do the same for layers that no batch reached.

    Raises:
        CalibrationError: as ``fall_back``.
    """
    reached = {name for stage in unit.stages for name in stage}
    for name in unit.layers:
        if name not in reached:
            error = CalibrationError(
                f"no calibration batch reached {name!r}: give batches that run it, or skip it by a rule"
            )
            fall_back({name: unit.layers[name]}, error, options, report)
