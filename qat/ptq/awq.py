"""AWQ: activation-aware scales and clipping (Lin et al. 2023, arXiv:2306.00978).

A layer's input channels are multiplied by s = mean|x|^alpha in the weight and divided by it in whatever makes the
input, which changes nothing until the weight is rounded; alpha is searched. Then each scale's range is searched.

Scales are folded only where that is exact, which is tried and not assumed: with powers of two for s, the unit's output
must not change. alpha = 0 is among the candidates, so that no layer gets worse than by rounding to nearest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..layers import QuantLayer, QuantLinear
from ..quantizers.lsq import weight_step_size
from ..spec import Granularity, Init, QuantSpec
from .error_compensation import fall_back_unreached, gather, relative_error
from .gptq import output_error, rounded_weight
from .moments import Moments
from .options import Options
from .report import Report, set_layer
from .units import Unit, first, floats_of

ALPHAS = [index / 20 for index in range(20)]
SHRINKS = [1 - index / 20 for index in range(10)]  # of max|w|
SEARCH_ROWS = 2048  # inputs of a module whose output judges alpha
NOT_CLIPPED = ("q_", "k_", "query", "key", "qkv")  # in names: a clipped outlier would change every attention score


def quantize_unit(unit: Unit, options: Options, report: Report) -> None:
    """Scale, then clip and round every layer of a unit.

    Raises:
        CalibrationError: NaN, inputs without variety, or a layer that no batch reached.
    """
    unit.find_stages()
    moments = {stage[0]: gather(unit, stage[0]) for stage in unit.stages}
    before = {stage[0]: moments[stage[0]].hessian.clone() for stage in unit.stages}
    scales = {stage[0]: scale_stage(unit, stage, moments[stage[0]], report) for stage in unit.stages}
    for stage in unit.stages:
        for name in stage:
            layer = unit.layers[name]
            weight = layer.weight.detach().float().flatten(1).clone()
            clip_layer(name, layer, moments[stage[0]])
            # Outputs that the layers behind it scaled are compared as they are now: only its inputs are scaled back.
            usual = (weight / scales[stage[0]], before[stage[0]])
            report.losses[name] = relative_error(layer, weight, moments[stage[0]], usual)
    for stage in unit.stages:
        for name in stage:
            unit.layers[name].weight_quantizer.enabled = True
    fall_back_unreached(unit, options, report)


def scale_stage(unit: Unit, stage: list[str], moments: Moments, report: Report) -> Tensor | float:
    """Search the scales of layers that read the same input, and fold them; moments become those of the scaled input.

    Returns:
        What the layers' input channels were multiplied by, (K,); 1 where nothing was folded.
    """
    layers = [unit.layers[name] for name in stage]
    producer = find_producer(unit, stage) if all(isinstance(layer, QuantLinear) for layer in layers) else None
    if producer is None:
        for name in stage:
            report.notes[name] = "only the range was searched, as nothing could scale the input exactly"
        return 1.0
    loss = stage_loss(unit, stage, moments)
    magnitude = moments.magnitude[0]
    candidates = [channel_scales(magnitude, alpha) for alpha in ALPHAS]
    losses = [loss(scales) for scales in candidates]
    best = candidates[min(range(len(losses)), key=losses.__getitem__)]
    fold(producer, layers, best)
    moments.hessian /= best[:, None] * best
    moments.magnitude /= best
    return best


def channel_scales(magnitude: Tensor, alpha: float) -> Tensor:
    """Return s = mean|x|^alpha, (K,), divided by the geometric mean of its extremes; 1 for alpha = 0."""
    scales = magnitude.clamp_min(1e-4) ** alpha
    return scales / (scales.max() * scales.min()).sqrt()


def find_producer(unit: Unit, stage: list[str]) -> nn.Module | None:
    """Return the norm or linear layer that makes a stage's input, if dividing its outputs by s is exact there."""
    layers = [unit.layers[name] for name in stage]
    if any(has_tied(layer, unit.tied) for layer in layers):
        return None
    width, batch = layers[0].in_features, unit.reached[stage[0]]
    expected = floats_of(unit.run(unit.module, batch))
    for candidate in unit.module.modules():
        if candidate in layers or not makes(candidate, width) or has_tied(candidate, unit.tied):
            continue
        order = torch.randperm(width, generator=torch.Generator().manual_seed(0), device="cpu")
        # Powers of two: folding and undoing them is exact.
        scales = torch.exp2((order % 5 - 2).float()).to(layers[0].weight.device)
        fold(candidate, layers, scales)
        found = floats_of(unit.run(unit.module, batch))
        fold(candidate, layers, 1 / scales)
        pairs = zip(found, expected, strict=True)
        if expected and all((now - then).abs().max() <= 1e-5 * then.abs().max() for now, then in pairs):
            return candidate
    return None


def has_tied(module: nn.Module, tied: set[int]) -> bool:
    """Return whether a parameter of a module is also used elsewhere, where folding would be noticed."""
    return any(id(parameter) in tied for parameter in module.parameters(recurse=False))


def makes(module: nn.Module, width: int) -> bool:
    """Return whether a module could make so many channels and be scaled: a linear layer, or an elementwise weight."""
    if isinstance(module, nn.Linear):
        return module.out_features == width
    weight = module._parameters.get("weight")
    return weight is not None and weight.shape == (width,)


def fold(producer: nn.Module, layers: list[QuantLayer], scales: Tensor) -> None:
    """Divide the producer's output channels by s, and multiply the layers' input channels by it."""
    scales = scales.to(producer.weight.dtype)
    producer.weight.div_(scales if producer.weight.dim() == 1 else scales[:, None])
    if getattr(producer, "bias", None) is not None:
        producer.bias.div_(scales)
    for layer in layers:
        layer.weight.mul_(scales)


def stage_loss(unit: Unit, stage: list[str], moments: Moments) -> Callable[[Tensor], float]:
    """Return the function from s to the squared change of what the layers are for.

    For several layers that is the output of the smallest module that holds them all, such as the attention behind
    queries, keys and values; for one layer, or where no such module is called, the layers' own outputs.
    """
    layers = [unit.layers[name] for name in stage]
    weights = [layer.weight.detach().clone() for layer in layers]

    def rounded(scales: Tensor) -> list[Tensor]:
        return [
            rounded_to_nearest(weight * scales, layer.weight_quantizer.spec) / scales
            for weight, layer in zip(weights, layers, strict=True)
        ]

    calls = module_calls(unit, smallest_module(unit.module, layers)) if len(layers) > 1 else []
    if not calls:
        return lambda scales: sum(
            float(output_error(weight.float(), new.float(), moments.hessian[0]))
            for weight, new in zip(weights, rounded(scales), strict=True)
        )

    def outputs() -> list[Tensor]:
        with unit.context():
            return [first(module(*args, **kwargs)) for module, args, kwargs in calls]

    expected = outputs()

    def loss(scales: Tensor) -> float:
        for layer, new in zip(layers, rounded(scales), strict=True):
            layer.weight.copy_(new)
        changes = [(found - output).float() for found, output in zip(outputs(), expected, strict=True)]
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
        return sum(change.square().sum(dtype=torch.float64).item() for change in changes)

    return loss


def rounded_to_nearest(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return the weight rounded with step sizes max|w|/Q_P."""
    return rounded_weight(weight, weight_step_size(weight, spec, Init.minmax), spec).to(weight.dtype)


def smallest_module(root: nn.Module, layers: list[QuantLayer]) -> nn.Module:
    """Return the deepest module that holds all the layers."""
    holding = [
        module for module in root.modules() if all(any(part is layer for part in module.modules()) for layer in layers)
    ]
    return holding[-1]


def module_calls(unit: Unit, module: nn.Module) -> list[tuple[nn.Module, tuple, dict]]:
    """Return (module, args, kwargs) of its calls on the first batches; none if it is the unit itself or not called."""
    calls: list[tuple[nn.Module, tuple, dict]] = []
    if module is unit.module:
        return calls
    handle = module.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
    rows = 0
    try:
        for batch in range(unit.batches):
            unit.run(unit.module, batch)
            rows = sum(
                tensor.numel() // tensor.shape[-1] for _, args, kwargs in calls for tensor in main_input(args, kwargs)
            )
            if rows >= SEARCH_ROWS:
                break
    finally:
        handle.remove()
    return calls


def main_input(args: tuple, kwargs: dict) -> list[Tensor]:
    """Return the first tensor of a call, in a list; an empty list if it has none."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)][:1]


def clip_layer(name: str, layer: QuantLayer, moments: Moments) -> None:
    """Set the step sizes whose groups change the output least, among shares of max|w|/Q_P, and round to nearest."""
    spec = layer.weight_quantizer.spec
    weight = layer.weight.detach().float()
    largest = weight_step_size(weight, spec, Init.minmax)
    step_size = largest
    if not any(part in name.rsplit(".", 1)[-1] for part in NOT_CLIPPED):
        errors = torch.stack([group_errors(weight, largest * share, spec, moments) for share in SHRINKS])
        shares = torch.tensor(SHRINKS, dtype=torch.float32, device=weight.device)[errors.argmin(0)]
        step_size = largest * shares
    set_layer(layer, weight, step_size)


def group_errors(weight: Tensor, step_size: Tensor, spec: QuantSpec, moments: Moments) -> Tensor:
    """Return the squared change of the output by each scale's weights alone, in the scale's shape."""
    error = (rounded_weight(weight, step_size, spec) - weight).flatten(1)
    width = spec.group_size if spec.granularity is Granularity.group else error.shape[1]
    parts = len(moments.hessian)
    error = error.unflatten(1, (-1, width)).unflatten(0, (parts, -1))  # (parts, N / parts, groups, width)
    blocks = moments.hessian.unflatten(2, (-1, width)).unflatten(1, (-1, width))
    blocks = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # (parts, groups, width, width)
    errors = torch.einsum("pngi,pgij,pngj->png", error, blocks, error).flatten(0, 1)
    return errors.sum().view(1, 1) if spec.granularity is Granularity.tensor else errors
