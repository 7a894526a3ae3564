"""summary: what a model's layers became, with shapes, specs, bits per weight, and why others were left alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from . import backend
from .layers import FrozenLayer, FrozenLinear, PackedWeight, QuantLayer, matrix, quant_layers
from .layers.int8_product import obstacle
from .numerics import parameter_bits
from .policy import Decision
from .quantizers import LearnedActivation, LearnedStepSize, Quantizer
from .spec import Dynamic
from .wrappers import MAKE_PARAMETERS, computed_weights, unwrapped


def summary(model: nn.Module) -> str:
    """Return the table of a prepared model's layers: what each became, and why the others were left alone."""
    return table(model, _decisions_of(model))


def stored_size(model: nn.Module) -> tuple[float, int]:
    """Return the mean bits of a weight, scales included, and about how many bytes a model's tensors take when stored.

    Args:
        model: plain, prepared or frozen.
    """
    _, bits, weights = _rows(model, _decisions_of(model))
    rest, quantizing = 0, _quantizing(model)
    for module in unwrapped(model).modules():
        if isinstance(module, LearnedActivation):
            rest += module.scale().nbytes
        elif module not in quantizing and not isinstance(module, PackedWeight):
            saved = {name: value for name, value in module._buffers.items() if value is not None}
            saved = [value for name, value in saved.items() if name not in module._non_persistent_buffers_set]
            rest += sum(value.nbytes for value in saved)
            rest += sum(p.nbytes for p in module._parameters.values() if p is not None and p.dim() < 2)
    return (bits / weights if weights else 0.0), math.ceil(bits / 8) + rest


def _decisions_of(model: nn.Module) -> list[Decision]:
    decisions = []
    for name, layer in unwrapped(model).named_modules():
        if isinstance(layer, QuantLayer | FrozenLayer):
            weight = getattr(layer, "packed_weight", None) or getattr(layer, "weight_quantizer", None)
            activation = layer.activation_quantizer
            specs = [None if part is None else part.spec for part in (weight, activation)]
            decisions.append(Decision(name, layer, *specs))
        elif holds_matrix(layer):
            decisions.append(Decision(name, layer, None, None, "not quantized"))
    return decisions


def holds_matrix(layer: nn.Module) -> bool:
    """Return whether a layer has a weight of two axes or more as a parameter of its own."""
    weight = layer._parameters.get("weight")
    return weight is not None and weight.dim() > 1


def _rows(model: nn.Module, decisions: list[Decision]) -> tuple[list[tuple[str, ...]], float, int]:
    """Return the table's rows, and the bits and the number of all weights, those that are tied once."""
    rows = [("layer", "shape", "weight", "input", "bits/weight", "")]
    names: dict[int, str] = {}
    total_bits = total_weights = 0
    for decision in decisions:
        shape = _weight_shape(decision.layer)
        weights = shape.numel()
        if decision.weight is None:
            bits = decision.layer.weight.element_size() * 8.0
        else:
            bits = decision.weight.bits + parameter_bits(shape, decision.weight) / weights
        note = decision.reason
        key = id(getattr(decision.layer, "packed_weight", None) or decision.layer.weight)
        if key in names:
            note = f"{note + ', ' if note else ''}weight tied to {names[key]}"
        else:
            names[key] = decision.name
            total_bits, total_weights = total_bits + bits * weights, total_weights + weights
        spec = "-" if decision.weight is None else str(decision.weight)
        rows.append((decision.name, "x".join(map(str, shape)), spec, _input(decision), f"{bits:.2f}", note))
    for name, other, note in _other_matrices(model):
        bits = other.element_size() * 8.0
        rows.append((name, "x".join(map(str, other.shape)), "-", "-", f"{bits:.2f}", note))
        total_bits, total_weights = total_bits + bits * other.numel(), total_weights + other.numel()
    return rows, total_bits, total_weights


def table(model: nn.Module, decisions: list[Decision]) -> str:
    """Return the table of a model and what was decided for its layers."""
    rows, total_bits, total_weights = _rows(model, decisions)
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    quantized = sum(decision.weight is not None for decision in decisions)
    mean = total_bits / total_weights if total_weights else 0.0
    if computed := computed_weights(model):
        lines.append(
            f"weights computed at each forward stay in full precision ({', '.join(computed)}): to quantize them, "
            + MAKE_PARAMETERS
        )
    lines += _cost(model) + _integer_products(model)
    lines.append(
        f"{quantized} of {len(decisions)} layers have quantized weights; {mean:.2f} bits per weight over all "
        f"{total_weights:,} of them"
    )
    return "\n".join(lines)


def _cost(model: nn.Module) -> list[str]:
    """Return a line that says what step sizes take, and what fake quantization runs on."""
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    fused = {"WeightLSQ", "ActivationLSQ", "AsymmetricLSQ", "ActivationLSQPlus"}
    kinds = sorted({type(quantizer).__name__ for quantizer in quantizers} - fused)
    lines = [f"with {', '.join(kinds)}, in torch's operators"] if kinds else []
    learned = (quantizer for quantizer in quantizers if isinstance(quantizer, LearnedStepSize))
    steps = {id(quantizer.step_size): quantizer.step_size for quantizer in learned}.values()
    if not steps:
        return lines
    count, taken = sum(step.numel() for step in steps), sum(step.numel() * step.element_size() for step in steps)
    return [
        *lines,
        f"{count:,} step sizes take {taken / 1e6:.2f} MB, their gradients as much and AdamW's state twice as much; "
        f"fake quantization runs in {backend.path(next(iter(steps)).device)}",
    ]


def _integer_products(model: nn.Module) -> list[str]:
    """Return a line that says which frozen layers multiply integers, where ``backend.set_int8_products`` is on."""
    tokens, found = backend.int8_products(), {}
    for name, layer in model.named_modules():
        if (
            isinstance(layer, FrozenLinear)
            and layer.packed_weight is not None
            and layer.activation_quantizer is not None
        ):
            found[name] = obstacle(layer.activation_quantizer, layer.packed_weight)
    if tokens is None or not found:
        return []
    fit = sum(reason is None for reason in found.values())
    reasons = [f"  not {name}: {reason}" for name, reason in found.items() if reason is not None]
    return [f"from {tokens} tokens on, {fit} of {len(found)} layers with int8 inputs multiply integers", *reasons]


def _other_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yield (name, parameter, what it is) of matrices that are no layer's plain weight, such as a parametrized one."""
    quantizing = _quantizing(model)
    for name, layer in unwrapped(model).named_modules():
        if layer not in quantizing:
            for key, parameter in layer._parameters.items():
                if parameter is not None and parameter.dim() > 1 and key != "weight":
                    note = f"parameter of {type(layer).__name__}, stays in full precision"
                    yield f"{name}.{key}".lstrip("."), parameter, note


def _quantizing(model: nn.Module) -> set[nn.Module]:
    """Return the modules that quantize in a prepared model, ours and the user's own: none of them ships."""
    parts = [(layer.weight_quantizer, layer.activation_quantizer) for _, layer in quant_layers(model)]
    return {module for pair in parts for part in pair if part is not None for module in part.modules()}


def _weight_shape(layer: nn.Module):
    packed = getattr(layer, "packed_weight", None)
    return matrix(layer).shape if packed is None else packed.shape


def _input(decision: Decision) -> str:
    if decision.activation is None:
        return "-"
    if isinstance(decision.activation, Dynamic):
        return f"{decision.activation.value} (dynamic)"
    return str(decision.activation) + (" (sign detected)" if decision.activation.signed is None else "")
