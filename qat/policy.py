"""QuantPolicy: which layers are quantized, and how. No torch in here, so that configs are checked in milliseconds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from .errors import PolicyError, QATError, did_you_mean
from .spec import ActivationQuantizer, Dynamic, Init, QuantSpec, WeightQuantizer, as_member

if TYPE_CHECKING:
    from torch import nn

RULE_KEYS = ("match", "weight", "activation")
FIRST, LAST = "@first", "@last"


@dataclass
class QuantPolicy:
    """What every layer gets, and the rules that say otherwise.

    Args:
        weight: the spec of every weight; None leaves weights alone.
        activation: the spec of every layer's input (granularity "tensor"); None leaves inputs alone. In Python, in
            rules and in files read without Hydra also a word of ``dynamic``.
        rules: ordered; the last rule that matches a layer wins. Each is a dict with ``match`` and ``weight`` and/or
            ``activation``. ``match`` is a layer's name, a glob ("*.mlp.*"), a regular expression ("re:.*[qk]_proj"), a
            layer type ("Conv2d"), or "@first" / "@last" for the first and last layer in definition order. ``weight``
            and ``activation`` are None, a QuantSpec, or a dict whose fields override the policy's own. An embedding is
            quantized only where a rule gives it a weight, as {"match": "Embedding", "weight": {"bits": 8}} does.
        init: how step sizes start: a word of ``qat.spec.Init``, such as "lsq", "mse" or "gptq".
        dynamic: "int8_token" or "q8_0": the input of every linear layer with a quantized weight is rounded to int8 as
            ExecuTorch or llama.cpp round it at run time. A key of its own, since a typed config node that holds specs
            holds no word.
        weight_quantizer: "lsq", or "minmax" for step sizes that follow the weight's range at every forward.
        activation_quantizer: "lsq" (LSQ+ where the activation has ``symmetric=False``), "pact", or "minmax" for a step
            size that follows the range of the training batches.

    Raises:
        PolicyError, SpecError: an unknown key, or a value out of range.
    """

    weight: Optional[QuantSpec] = None  # noqa: UP045  OmegaConf 2.3 reads Optional, not "| None"
    activation: Optional[QuantSpec] = None  # noqa: UP045
    rules: list[Any] = field(default_factory=list)
    init: Init = Init.lsq
    dynamic: Optional[Dynamic] = None  # noqa: UP045
    weight_quantizer: WeightQuantizer = WeightQuantizer.lsq
    activation_quantizer: ActivationQuantizer = ActivationQuantizer.lsq

    def __post_init__(self) -> None:
        self.init = as_member(Init, "init", self.init)
        self.weight_quantizer = as_member(WeightQuantizer, "weight_quantizer", self.weight_quantizer)
        quantizer = as_member(ActivationQuantizer, "activation_quantizer", self.activation_quantizer)
        self.activation_quantizer = quantizer
        if self.weight_quantizer is WeightQuantizer.minmax and self.init.reads_data:
            raise PolicyError(
                f"init={self.init.value} sets step sizes, which weight_quantizer=minmax takes from the weight at every "
                "forward: use weight_quantizer=lsq"
            )
        self.weight = _spec(self.weight, QuantSpec())
        if self.dynamic is not None:
            self.dynamic = as_member(Dynamic, "dynamic", self.dynamic)
            if self.activation not in (None, self.dynamic):
                raise PolicyError(f"activation and dynamic={self.dynamic.value} both round inputs: set one to null")
        self.activation = _input(self.activation, QuantSpec(granularity="tensor"))
        if isinstance(self.activation, Dynamic):
            self.activation, self.dynamic = None, self.activation
        if self.dynamic is not None and self.weight is None and not self.rules:
            self.specs_of({"activation": self.dynamic})
        if self.dynamic is None or self.weight is not None:
            self.specs_of(None)
        for rule in self.rules:
            _check_rule(rule)
            try:
                self.specs_of(rule)
            except QATError as error:
                raise type(error)(f"the rule with match={str(rule['match'])!r}: {error}") from None

    def specs_of(self, rule: dict[str, Any] | None) -> tuple[QuantSpec | None, QuantSpec | Dynamic | None]:
        """Return the (weight, activation) specs that a layer gets from a rule, or from the policy if None.

        Raises:
            PolicyError: the rule or the policy asks for what no layer can have.
        """
        weight, activation = self.weight, self.activation
        if rule is not None:
            if "weight" in rule:
                weight = _spec(rule["weight"], self.weight or QuantSpec())
            if "activation" in rule:
                activation = _input(rule["activation"], self.activation or QuantSpec(granularity="tensor"))
        if self.dynamic is not None and weight is not None and "activation" not in (rule or {}):
            activation = self.dynamic
        if isinstance(activation, Dynamic) and weight is None:
            raise PolicyError(f"{activation.value} rounds the inputs of layers with quantized weights: set weight too")
        if weight is not None and weight.signed is False:
            raise PolicyError("weights are always signed: drop signed=False from the weight spec")
        if isinstance(activation, QuantSpec) and activation.granularity != "tensor":
            raise PolicyError(f"activations take granularity='tensor', not {activation.granularity.value!r}")
        for spec in (weight, activation):
            if spec is activation and isinstance(spec, QuantSpec) and spec.codebook is not None:
                raise PolicyError("activations take no codebook: drop it, or give weights one")
            if isinstance(spec, QuantSpec) and spec.zero_point_dtype:
                if spec is activation:
                    raise PolicyError("activations have no real zero points: drop their zero_point_dtype")
                if self.weight_quantizer is WeightQuantizer.minmax:
                    raise PolicyError("weight_quantizer=minmax has no real zero points: drop zero_point_dtype")
        if isinstance(activation, QuantSpec) and not activation.symmetric:
            if activation.signed is False:
                raise PolicyError("an activation with symmetric=False has its own zero: drop signed=False")
            if self.activation_quantizer is ActivationQuantizer.pact:
                raise PolicyError("PACT learns no offset: drop symmetric=False, or use activation_quantizer=lsq")
        return weight, activation

    def quantizes_nothing(self) -> bool:
        """Return whether this policy means full-precision training."""
        return self.weight is None and self.activation is None and not self.rules

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""

        def plain(spec: Any) -> Any:
            if isinstance(spec, Dynamic):
                return spec.value
            return spec.to_dict() if isinstance(spec, QuantSpec) else spec

        rules = [{key: plain(value) for key, value in rule.items()} for rule in self.rules]
        return {
            "weight": plain(self.weight),
            "activation": plain(self.activation),
            "rules": rules,
            "init": self.init.value,
            "dynamic": plain(self.dynamic),
            "weight_quantizer": self.weight_quantizer.value,
            "activation_quantizer": self.activation_quantizer.value,
        }

    @classmethod
    def of(cls, value: Any) -> QuantPolicy:
        """Return a policy as it is, or build one from plain values, a YAML file, or the bare name of one that ships.

        Raises:
            PolicyError: what is given is none of these, or no policy is in it.
        """
        if isinstance(value, dict):
            return cls.from_dict(value)
        if isinstance(value, str | Path):
            return cls.from_yaml(value)
        if not isinstance(value, cls):
            fix = ": wrap it, QuantPolicy(weight=spec)" if isinstance(value, QuantSpec) else ""
            raise PolicyError(f"expected a QuantPolicy, got {type(value).__name__}{fix}")
        return value

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantPolicy:
        """Build a policy from plain values; PolicyError names an unknown key."""
        known = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in known:
                raise PolicyError(f"unknown key {key!r} in the policy{did_you_mean(str(key), known)}")
        return cls(**{**values, "rules": list(values.get("rules") or [])})

    @classmethod
    def from_yaml(cls, path: str | Path) -> QuantPolicy:
        """Read a policy file, or one that ships with the package by its bare name ("conv_w4a4").

        Raises:
            PolicyError: no such file, or what is in it is no policy.
        """
        from omegaconf import OmegaConf
        from yaml import YAMLError

        path = Path(path)
        shipped = Path(__import__("qat.conf").conf.__file__).parent / "policy"
        if not path.exists() and (shipped / f"{path}.yaml").exists():
            path = shipped / f"{path}.yaml"
        if not path.is_file():
            names = sorted(file.stem for file in shipped.glob("*.yaml"))
            raise PolicyError(f"no policy file {str(path)!r}{did_you_mean(str(path), names)}")
        try:
            values = OmegaConf.to_container(OmegaConf.load(path))
        except YAMLError as error:
            raise PolicyError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise PolicyError(f"{path} does not hold a policy: expected the keys weight, activation, rules")
        values.pop("defaults", None)  # Hydra's own key
        return cls.from_dict(values)


@dataclass
class Decision:
    """What a policy means for one layer: its specs, or why it is left alone."""

    name: str
    layer: nn.Module
    weight: QuantSpec | None
    activation: QuantSpec | Dynamic | None
    reason: str = ""


def match_rules(
    rules: Sequence[dict[str, Any]], layers: Sequence[tuple[str, str, bool]]
) -> list[dict[str, Any] | None]:
    """Return the rule that wins for each layer, or None.

    Args:
        rules: a policy's.
        layers: (name, type name, quantizable) in definition order; "@first" and "@last" count the quantizable ones.

    Raises:
        PolicyError: a rule that matches no layer.
    """
    winners: list[dict[str, Any] | None] = [None] * len(layers)
    quantizable = [name for name, _, can in layers if can]
    for rule in rules:
        pattern, matched = str(rule["match"]), False
        for index, (name, kind, _) in enumerate(layers):
            if _matches(pattern, name, kind, quantizable):
                winners[index], matched = rule, True
        if not matched:
            names = [kind for _, kind, _ in layers] + [name for name, _, _ in layers]  # of which there are many more
            raise PolicyError(f"the rule with match={pattern!r} matched no layer{did_you_mean(pattern, names)}")
    return winners


def _matches(pattern: str, name: str, kind: str, quantizable: list[str]) -> bool:
    if pattern in (FIRST, LAST):
        return bool(quantizable) and name == quantizable[0 if pattern == FIRST else -1]
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return pattern == kind or fnmatchcase(name, pattern)


def _spec(value: Any, base: QuantSpec) -> QuantSpec | None:
    if value is None or isinstance(value, QuantSpec):
        return value
    if not isinstance(value, dict):
        raise PolicyError(f"{value!r} is no spec: give null, or fields such as {{bits: 4, group_size: 128}}")
    return base.override(value)


def _input(value: Any, base: QuantSpec) -> QuantSpec | Dynamic | None:
    return as_member(Dynamic, "activation", value) if isinstance(value, str) else _spec(value, base)


def _check_rule(rule: Any) -> None:
    if not isinstance(rule, dict) or "match" not in rule or len(rule) < 2:
        raise PolicyError(f"{rule!r} is no rule: give match, and weight and/or activation")
    for key in rule:
        if key not in RULE_KEYS:
            raise PolicyError(f"unknown key {key!r} in the rule {rule!r}{did_you_mean(str(key), RULE_KEYS)}")
    if str(rule["match"]).startswith("re:"):
        try:
            re.compile(str(rule["match"])[3:])
        except re.error as error:
            raise PolicyError(f"the rule with match={rule['match']!r} is no regular expression: {error}") from None
    elif str(rule["match"]).startswith("@") and rule["match"] not in (FIRST, LAST):
        raise PolicyError(f"match={rule['match']!r} is unknown{did_you_mean(rule['match'], (FIRST, LAST))}")
