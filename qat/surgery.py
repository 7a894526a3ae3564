"""prepare: swap a model's layers for their fake-quant twins as a policy says, and print what was done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import backend
from .adapters import own_modules
from .errors import LayerError, PolicyError, QATError, StateError
from .layers import (
    FAKE_QUANT,
    FrozenLayer,
    FrozenLinear,
    PackedWeight,
    QuantLayer,
    is_frozen,
    is_prepared,
    make_fake_quant_,
    matrix,
    plain_type,
    split_attentions_,
)
from .layers.int8_product import obstacle
from .numerics import parameter_bits, scale_shape
from .policy import QuantPolicy, match_rules
from .quantizers import (
    ActivationLSQ,
    ActivationLSQPlus,
    ActivationMinMax,
    ActivationPACT,
    ActivationRange,
    AsymmetricLSQ,
    DynamicActivation,
    LearnedActivation,
    LearnedStepSize,
    OfWeight,
    Quantizer,
    WeightCodebook,
    WeightLSQ,
    WeightMinMax,
)
from .quantizers.dynamic import BLOCK
from .spec import ActivationQuantizer, Dynamic, Init, QuantSpec, WeightQuantizer
from .wrappers import call_every_layer_, require_materialised, unwrapped

# Left alone unless a rule says otherwise: a table of vectors, and what models with state spaces hold and do not call.
ON_REQUEST = {nn.Embedding, nn.Conv1d}


@dataclass
class Decision:
    """What a policy means for one layer: its specs, or why it is left alone."""

    name: str
    layer: nn.Module
    weight: QuantSpec | None
    activation: QuantSpec | Dynamic | None
    reason: str = ""


def prepare(model: nn.Module, policy: QuantPolicy | dict[str, Any] | str | Path, verbose: bool = True) -> nn.Module:
    """Make a model train as the quantized model it will be; in place.

    Every parameter exists afterwards; weight step sizes are initialised from the weights, activation step sizes, and
    weights whose init reads data, wait for ``qat.calibrate``. Tied weights stay tied and share one quantizer.

    Args:
        model: any module; its ``nn.Linear``, convolutions, transposed ones and transformers' ``Conv1D`` layers can be
            quantized, and ``nn.Embedding`` and ``nn.Conv1d`` layers are where a rule gives them a spec. An
            ``nn.MultiheadAttention`` becomes a ``SplitAttention`` with four linear layers, q_proj, k_proj, v_proj and
            out_proj, whatever the policy says.
        policy: a QuantPolicy; or its fields as a dict, a YAML file, or the name of one that ships ("conv_w4a4").
        verbose: print the summary.

    Returns:
        The same model.

    Raises:
        StateError: no module, or one that is prepared or frozen already.
        PolicyError: no policy, or a rule that matches nothing or asks for what its layer cannot do.
        LayerError: nothing to quantize, shapes that do not fit, a weight with NaN, or an init that does not know a
            layer; every such layer is listed with its fix.
    """
    policy = QuantPolicy.of(policy)
    if is_prepared(model) or is_frozen(model):
        raise StateError("this model is prepared already: prepare a fresh one, or continue with it as it is")
    require_materialised(model)
    undo = split_attentions_(model)
    try:
        decisions = decide(model, policy)
        check_shapes(decisions)
        _require_any(model, policy, decisions)
        _check_init(decisions, policy.init)
    except QATError:
        undo()
        raise
    weight_quantizers: dict[int, OfWeight] = {}
    for decision in decisions:
        if decision.weight is None and decision.activation is None:
            continue
        layer, weight, activation = decision.layer, None, None
        if decision.weight is not None:
            weight = weight_quantizers.get(id(layer.weight))
            if weight is None:
                weight = weight_quantizer(decision, policy.init, policy.weight_quantizer)
                weight_quantizers[id(layer.weight)] = weight
        if isinstance(decision.activation, Dynamic):
            activation = DynamicActivation(decision.activation)
        elif decision.activation is not None:
            activation = activation_quantizer(decision, policy.init, policy.activation_quantizer)
        make_fake_quant_(layer, weight, activation)
    call_every_layer_(model)
    if verbose:
        print(_table(model, decisions))
    return model


def weight_quantizer(decision: Decision, init: Init, kind: WeightQuantizer = WeightQuantizer.lsq) -> OfWeight:
    """Return the quantizer that a decision gives its layer, started from the weight's values."""
    weight = matrix(decision.layer)
    if decision.weight.codebook is not None:
        return WeightCodebook(decision.weight, weight, decision.name)
    if kind is WeightQuantizer.minmax:
        return WeightMinMax(decision.weight, decision.name)
    if not decision.weight.symmetric:
        return AsymmetricLSQ(decision.weight, weight, decision.name)
    # Methods that read data are for matrix products.
    return WeightLSQ(decision.weight, weight, decision.name, init.of_activations if _is_embedding(decision) else init)


def activation_quantizer(decision: Decision, init: Init, kind: ActivationQuantizer) -> LearnedActivation:
    """Return the quantizer that a decision gives its layer's input, which waits for ``qat.calibrate``."""
    spec, device = decision.activation, decision.layer.weight.device
    if kind is ActivationQuantizer.minmax:
        return (ActivationMinMax if spec.symmetric else ActivationRange)(spec, device, decision.name)
    learned = ActivationPACT if kind is ActivationQuantizer.pact else ActivationLSQ
    learned = learned if spec.symmetric else ActivationLSQPlus
    return learned(spec, device, decision.name, init.of_activations)


def decide(model: nn.Module, policy: QuantPolicy) -> list[Decision]:
    """Return what the policy means for each layer that holds a matrix, in definition order."""
    layers = [(name, layer) for name, layer in unwrapped(model).named_modules() if _holds_matrix(layer)]
    adapters = own_modules(model)
    counted = set(FAKE_QUANT) - ON_REQUEST  # as the first or the last layer
    described = [
        (name, type(layer).__name__, plain_type(layer) in counted and id(layer) not in adapters)
        for name, layer in layers
    ]
    winners = match_rules(policy.rules, described)
    decisions = []
    for (name, layer), rule in zip(layers, winners, strict=True):
        weight, activation = policy.specs_of(rule)
        if id(layer) in adapters:
            decisions.append(Decision(name, layer, None, None, "adapter stays in full precision"))
        elif type(layer) is nn.Embedding:
            decisions.append(_decide_embedding(name, layer, weight, rule))
        elif type(layer) is nn.Conv1d and not _asks(rule):
            decisions.append(
                Decision(name, layer, None, None, "Conv1d stays in full precision without a rule of its own")
            )
        elif plain_type(layer) in FAKE_QUANT:
            nothing = weight is None and activation is None
            said = f"rule match={rule['match']!r}" if rule else "policy"
            decisions.append(Decision(name, layer, weight, activation, said if nothing else ""))
        elif _asks(rule):
            raise PolicyError(
                f"the rule with match={rule['match']!r} asks to quantize {name!r}, a {type(layer).__name__}: "
                f"only {_names(FAKE_QUANT)} can be; let the rule match less, or set its weight and activation to null"
            )
        else:
            decisions.append(Decision(name, layer, None, None, f"{type(layer).__name__} stays in full precision"))
    return decisions


def _asks(rule: dict[str, Any] | None) -> bool:
    """Return whether a rule gives a layer a spec."""
    return rule is not None and (rule.get("weight") is not None or rule.get("activation") is not None)


def _decide_embedding(
    name: str, layer: nn.Embedding, weight: QuantSpec | None, rule: dict[str, Any] | None
) -> Decision:
    """Quantize an embedding only where a rule says so: it is a table of vectors, and its input is indices.

    Raises:
        PolicyError: the rule asks to quantize the input.
    """
    if rule is not None and rule.get("activation") is not None:
        raise PolicyError(
            f"the rule with match={rule['match']!r} asks to quantize the input of {name!r}, an Embedding, which is "
            "indices: let the rule match less, or set its activation to null"
        )
    if rule is not None and rule.get("weight") is not None:
        return Decision(name, layer, weight, None)
    reason = f"rule match={rule['match']!r}" if rule and "weight" in rule else "Embedding stays in full precision"
    return Decision(name, layer, None, None, reason)


def summary(model: nn.Module) -> str:
    """Return the table of a prepared model's layers: what each became, and why the others were left alone."""
    return _table(model, _decisions_of(model))


def stored_size(model: nn.Module) -> tuple[float, int]:
    """Return the mean bits of a weight, scales included, and about how many bytes a model's tensors take when stored.

    Args:
        model: plain, prepared or frozen.
    """
    _, bits, weights = _rows(model, _decisions_of(model))
    rest = 0
    for module in unwrapped(model).modules():
        if isinstance(module, LearnedActivation):
            rest += module.scale().nbytes
        elif not isinstance(module, Quantizer | PackedWeight):
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
        elif _holds_matrix(layer):
            decisions.append(Decision(name, layer, None, None, "not quantized"))
    return decisions


def _holds_matrix(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and weight.dim() > 1


def _require_any(model: nn.Module, policy: QuantPolicy, decisions: list[Decision]) -> None:
    """Raise LayerError if the policy quantizes what layers get by default, and the model has no layer for it."""
    if (policy.weight or policy.activation) is None:
        return
    default = set(FAKE_QUANT) - ON_REQUEST
    if any(plain_type(d.layer) in default or d.weight is not None or d.activation is not None for d in decisions):
        return
    kinds = sorted({type(decision.layer).__name__ for decision in decisions})
    raise LayerError(
        f"{type(unwrapped(model)).__name__} has no layer that can be quantized ({_names(default)}; with a rule that "
        f"matches them {_names(ON_REQUEST)}); its layers with weights are {', '.join(kinds) or 'none'}"
    )


def _names(kinds: Iterable[type[nn.Module]]) -> str:
    return ", ".join(plain.__name__ for plain in FAKE_QUANT if plain in kinds)


def check_shapes(decisions: list[Decision]) -> None:
    """Raise one LayerError that lists every layer whose spec does not fit."""
    problems, tied = [], {}
    embeddings = {id(d.layer.weight): d.name for d in decisions if d.weight is not None and _is_embedding(d)}
    for decision in decisions:
        weight = decision.layer.weight
        if decision.weight is None:
            if id(weight) in embeddings:
                problems.append(
                    f"{decision.name!r}: its weight is tied to the embedding {embeddings[id(weight)]!r}, which is "
                    "quantized: give both the same rule"
                )
            continue
        try:
            scale_shape(matrix(decision.layer).shape, decision.weight)
        except LayerError as error:
            problems.append(f"{decision.name!r}: {error}")
        if not weight.is_floating_point():
            problems.append(f"{decision.name!r}: its weight is {weight.dtype}, not a float: it is quantized already")
        elif not _is_finite(weight.detach()):
            problems.append(f"{decision.name!r}: its weight holds NaN or infinity: check where it was loaded from")
        if isinstance(decision.activation, Dynamic):
            problems += _dynamic_problems(decision)
        if _is_embedding(decision) and decision.weight.codebook is not None:
            problems.append(f"{decision.name!r}: an Embedding takes no codebook: set it, or weight, to null")
        if _is_embedding(decision) and not decision.weight.symmetric:
            problems.append(
                f"{decision.name!r}: an Embedding takes no zero points: give it a rule with symmetric: true"
            )
        if _is_embedding(decision) and decision.layer.max_norm is not None:
            problems.append(f"{decision.name!r}: max_norm rescales rows in the forward: set it, or weight, to null")
        first = tied.setdefault(id(weight), decision)
        if first.weight != decision.weight:
            problems.append(
                f"{decision.name!r}: its weight is tied to {first.name!r}, which gets another spec "
                f"({first.weight}, here {decision.weight}): give both the same rule"
            )
    if problems:
        raise LayerError("the policy does not fit these layers:\n  " + "\n  ".join(problems))


def _check_init(decisions: list[Decision], init: Init) -> None:
    """Raise a LayerError that names the layers which an init that reads data does not know."""
    known = (nn.Linear, nn.Conv2d, nn.Embedding)
    quantized = [decision for decision in decisions if decision.weight is not None]
    others = [decision for decision in quantized if plain_type(decision.layer) not in known]
    for what, kind in (
        (f"{' or '.join(sorted({plain_type(d.layer).__name__ for d in others}))} layers", others),
        ("zero points", [decision for decision in quantized if not decision.weight.symmetric]),
    ):
        if init.reads_data and kind:
            names = ", ".join(repr(decision.name) for decision in kind)
            raise LayerError(f"init={init.value} does not know {what} ({names}): use init=mse, or weight: null there")


def _is_finite(weight: Tensor) -> bool:
    """Whether a weight that is in memory holds neither NaN nor infinity; no copy larger than the weight is made."""
    return weight.is_meta or not weight.numel() or bool(weight.abs().amax().isfinite())


def _is_embedding(decision: Decision) -> bool:
    return isinstance(decision.layer, nn.Embedding)


def _dynamic_problems(decision: Decision) -> list[str]:
    kind, layer = decision.activation.value, decision.layer
    if hasattr(layer, "kernel_size"):
        fix = "give it a rule with a spec (bits: 8) or null for its activation"
        return [f"{decision.name!r}: {kind} is for linear layers, not for a {type(layer).__name__}: {fix}"]
    inputs = matrix(layer).shape[1]
    if decision.activation is Dynamic.q8_0 and inputs % BLOCK:
        return [f"{decision.name!r}: q8_0 rounds {BLOCK} inputs at a time, which do not divide its {inputs}"]
    return []


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


def _table(model: nn.Module, decisions: list[Decision]) -> str:
    rows, total_bits, total_weights = _rows(model, decisions)
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    quantized = sum(decision.weight is not None for decision in decisions)
    mean = total_bits / total_weights if total_weights else 0.0
    lines += _cost(model) + _integer_products(model)
    lines.append(
        f"{quantized} of {len(decisions)} layers have quantized weights; {mean:.2f} bits per weight over all "
        f"{total_weights:,} of them"
    )
    return "\n".join(lines)


def _cost(model: nn.Module) -> list[str]:
    """Return a line that says what step sizes take, and what fake quantization runs on."""
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    kinds = sorted({type(quantizer).__name__ for quantizer in quantizers} - {"WeightLSQ", "ActivationLSQ"})
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
    for name, layer in unwrapped(model).named_modules():
        if not isinstance(layer, LearnedStepSize):
            for key, parameter in layer._parameters.items():
                if parameter is not None and parameter.dim() > 1 and key != "weight":
                    note = f"parameter of {type(layer).__name__}, stays in full precision"
                    yield f"{name}.{key}".lstrip("."), parameter, note


def _weight_shape(layer: nn.Module):
    packed = getattr(layer, "packed_weight", None)
    return matrix(layer).shape if packed is None else packed.shape


def _input(decision: Decision) -> str:
    if decision.activation is None:
        return "-"
    if isinstance(decision.activation, Dynamic):
        return f"{decision.activation.value} (dynamic)"
    return str(decision.activation) + (" (sign detected)" if decision.activation.signed is None else "")
