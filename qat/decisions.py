"""What a policy means for each layer of a model, and whether that can be done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import Tensor, nn

from .adapters import own_modules
from .errors import LayerError, PolicyError, some_of
from .layers import FAKE_QUANT, matrix, plain_type
from .numerics import scale_shape
from .policy import FIRST, LAST, Decision, QuantPolicy, match_rules
from .quantizers.dynamic import BLOCK
from .spec import Codebook, Dynamic, Init, QuantSpec
from .table import holds_matrix
from .wrappers import MAKE_PARAMETERS, computed_weights, unwrapped

# Left alone unless a rule says otherwise: a table of vectors, and what models with state spaces hold and do not call.
ON_REQUEST = {nn.Embedding, nn.Conv1d}


def decide(model: nn.Module, policy: QuantPolicy) -> list[Decision]:
    """Return what the policy means for each layer that holds a matrix, in definition order.

    Raises:
        PolicyError: a rule matches nothing, or asks to quantize a layer that cannot be.
        LayerError: a rule asks for the first or last layer of a model in which none can be quantized.
    """
    layers = [(name, layer) for name, layer in unwrapped(model).named_modules() if holds_matrix(layer)]
    adapters = own_modules(model)
    counted = set(FAKE_QUANT) - ON_REQUEST  # as the first or the last layer
    described = [
        (name, type(layer).__name__, plain_type(layer) in counted and id(layer) not in adapters and _holds_any(layer))
        for name, layer in layers
    ]
    try:
        winners = match_rules(policy.rules, described)
    except PolicyError as error:
        if {FIRST, LAST} & {str(rule["match"]) for rule in policy.rules} and not any(can for _, _, can in described):
            _refuse_all(model, [layer for _, layer in layers])
        raise PolicyError(f"{error}{_of_computed(model)}") from None
    decisions = []
    for (name, layer), rule in zip(layers, winners, strict=True):
        weight, activation = policy.specs_of(rule)
        if id(layer) in adapters:
            decisions.append(Decision(name, layer, None, None, "adapter stays in full precision"))
        elif not _holds_any(layer):
            decisions.append(Decision(name, layer, None, None, "its weight is empty"))
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
                f"the rule with match={rule['match']!r} asks to quantize {name!r}, a {_kind(layer)}: "
                f"only {_names(FAKE_QUANT)} can be; let the rule match less, or set its weight and activation to null"
            )
        else:
            decisions.append(Decision(name, layer, None, None, f"{_kind(layer)} stays in full precision"))
    return decisions


def _kind(layer: nn.Module) -> str:
    """Return the name of a layer's type, and of the plain type that it extends, whose forward may not be its own."""
    plain = next((plain.__name__ for plain in FAKE_QUANT if isinstance(layer, plain)), None)
    return type(layer).__name__ + (f" (a subclass of {plain})" if plain else "")


def _holds_any(layer: nn.Module) -> bool:
    """Return whether a layer's weight has elements: ``nn.Linear(0, n)`` and ``nn.Linear(n, 0)`` have none."""
    return layer.weight.numel() > 0


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


def require_any(model: nn.Module, policy: QuantPolicy, decisions: list[Decision]) -> None:
    """Raise LayerError if the policy quantizes what layers get by default, and not one layer of the model.

    A rule with match="*" that leaves all of them out is taken at its word.
    """
    if (policy.weight or policy.activation) is None or any(d.weight or d.activation for d in decisions):
        return
    if decisions and {decision.reason for decision in decisions} == {"rule match='*'"}:
        return
    layers = [decision.layer for decision in decisions]
    if not any(plain_type(layer) in set(FAKE_QUANT) - ON_REQUEST for layer in layers):
        _refuse_all(model, layers)
    reasons: dict[str, list[str]] = {}
    for decision in decisions:
        reasons.setdefault(decision.reason, []).append(repr(decision.name))
    said = "; ".join(f"{some_of(names, 2)}: {reason}" for reason, names in reasons.items())
    raise LayerError(f"the policy quantizes no layer of {type(unwrapped(model)).__name__} ({said}): change its rules")


def _refuse_all(model: nn.Module, layers: list[nn.Module]) -> NoReturn:
    default = set(FAKE_QUANT) - ON_REQUEST
    kinds = sorted({_kind(layer) for layer in layers})
    raise LayerError(
        f"{type(unwrapped(model)).__name__} has no layer that can be quantized ({_names(default)}; with a rule that "
        f"matches them {_names(ON_REQUEST)}); its layers with weights are {', '.join(kinds) or 'none'}"
        + _of_computed(model)
    )


def _of_computed(model: nn.Module) -> str:
    names = ", ".join(computed_weights(model))
    return f"; weights computed at each forward are not seen ({names}): {MAKE_PARAMETERS}" if names else ""


def _names(kinds: Iterable[type[nn.Module]]) -> str:
    return ", ".join(plain.__name__ for plain in FAKE_QUANT if plain in kinds)


def check_shapes(decisions: list[Decision]) -> None:
    """Raise one LayerError that lists every layer whose spec does not fit."""
    problems, tied = [], {}
    embeddings = {id(d.layer.weight): d.name for d in decisions if d.weight is not None and is_embedding(d)}
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
        if is_embedding(decision) and decision.weight.codebook is not None:
            problems.append(f"{decision.name!r}: an Embedding takes no codebook: set it, or weight, to null")
        if is_embedding(decision) and not decision.weight.symmetric:
            problems.append(
                f"{decision.name!r}: an Embedding takes no zero points: give it a rule with symmetric: true"
            )
        if is_embedding(decision) and decision.layer.max_norm is not None:
            problems.append(f"{decision.name!r}: max_norm rescales rows in the forward: set it, or weight, to null")
        first = tied.setdefault(id(weight), decision)
        if first.weight != decision.weight:
            problems.append(
                f"{decision.name!r}: its weight is tied to {first.name!r}, which gets another spec "
                f"({first.weight}, here {decision.weight}): give both the same rule"
            )
    if problems:
        raise LayerError("the policy does not fit these layers:\n  " + "\n  ".join(problems))


def check_init(decisions: list[Decision], init: Init) -> None:
    """Raise a LayerError that names the layers which an init does not know: HQQ, or one that reads data."""
    quantized = [decision for decision in decisions if decision.weight is not None]
    if init is Init.hqq and (rest := [each for each in quantized if each.weight.zero_point_dtype is None]):
        fix = "use weight.symmetric=false weight.zero_point_dtype=float16"
        _refuse(init, "grids without real zero points", rest, fix)
    if not init.reads_data:
        return
    known = (nn.Linear, nn.Conv2d, nn.Embedding)
    others = [decision for decision in quantized if plain_type(decision.layer) not in known]
    books = [decision for decision in quantized if decision.weight.codebook is not None]
    custom = [decision for decision in books if decision.weight.codebook is Codebook.custom]
    if init is Init.squeezellm:
        rest = [decision for decision in quantized if decision not in custom and not is_embedding(decision)]
        grids = "grids but custom codebooks", rest, "use weight.codebook=custom"
    elif init in (Init.gptq, Init.gptaq):
        grids = "custom codebooks", custom, "use init=mse"
    else:
        grids = "codebooks", books, "use init=mse"
    for what, unknown, fix in (
        (f"{' or '.join(sorted({plain_type(d.layer).__name__ for d in others}))} layers", others, "use init=mse"),
        grids,
        ("zero points", [decision for decision in quantized if not decision.weight.symmetric], "use init=mse"),
    ):
        if unknown:
            _refuse(init, what, unknown, fix)


def _refuse(init: Init, what: str, unknown: list[Decision], fix: str) -> NoReturn:
    names = some_of([repr(decision.name) for decision in unknown], 8)
    raise LayerError(f"init={init.value} does not know {what} ({names}): {fix}, or weight: null there")


def _is_finite(weight: Tensor) -> bool:
    """Whether a weight that is in memory holds neither NaN nor infinity; no copy larger than the weight is made."""
    return weight.is_meta or not weight.numel() or bool(weight.abs().amax().isfinite())


def is_embedding(decision: Decision) -> bool:
    """Return whether a decision is on an embedding, a table of vectors."""
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
