"""lora: adapters of peft on a base that is quantized here, started at zero, by LoftQ, PiSSA or CLoQ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters import import_peft, scaling
from .calibration import run_inputs
from .decisions import check_shapes, decide
from .errors import PolicyError, StateError
from .freezing import freeze, frozen_at_once
from .layers import PackedWeight, is_frozen, is_prepared, make_frozen_, matrix
from .lora_product import use_lora_product_
from .low_rank import best_for_inputs, best_of_rank
from .numerics import QuantizedTensor
from .policy import Decision, QuantPolicy
from .ptq import Options
from .spec import Init, QuantSpec, as_member
from .surgery import prepare, weight_quantizer

if TYPE_CHECKING:
    from .ptq.gptq import Factor


class Start(StrEnum):
    """Where A and B start.

    zero: B = 0, so that the model starts as its base.
    loftq: B A and the codes together approximate the weight: Q = q(W - B A), B A = SVD_r(W - Q) in turns (LoftQ,
        arXiv:2310.08659, algorithm 1).
    pissa: B A = SVD_r(W), and the codes hold the rest (QPiSSA, arXiv:2404.02948, section 4).
    cloq: GPTQ chooses the codes, and B A is what brings each layer's output nearest to what it was, on the same
        calibration data (CLoQ, arXiv:2501.18475).
    """

    zero = "zero"
    loftq = "loftq"
    pissa = "pissa"
    cloq = "cloq"


def lora(
    model: nn.Module,
    policy: QuantPolicy | None = None,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    dora: bool = False,
    start: Start = Start.zero,
    iterations: int = 5,
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    options: Options | None = None,
) -> nn.Module:
    """Return peft's model of a base whose codes stay, with LoRA on its linear layers.

    Args:
        model: frozen, or in full precision.
        policy: quantizes a model in full precision first, each weight rounded once; None, or one that quantizes
            nothing, leaves the base as it is.
        rank, alpha, dropout, targets: of ``peft.LoraConfig``.
        dora: train magnitudes and directions apart (arXiv:2402.09353).
        start: where the adapter starts. All but "zero" take a model in full precision and a policy.
        iterations: of LoftQ.
        batches, forward, options: CLoQ's calibration data, as ``qat.calibrate`` takes them.

    Raises:
        StateError: the model is prepared, or frozen where it should not be, or peft is not installed.
        PolicyError, LayerError: a policy that does not fit, targets that peft refuses, or a rank or alpha with which
            nothing is learned.
        CalibrationError: data that GPTQ cannot work with.
    """
    peft, start, scale = import_peft(), as_member(Start, "start", start), scaling(rank, alpha)
    quantizes = policy is not None and not policy.quantizes_nothing()
    if is_prepared(model):
        raise StateError("this model trains its own weights: freeze it first, or use qat.joint_lora")
    if is_frozen(model) and (quantizes or start is not Start.zero):
        raise StateError(f"this base is frozen: policy and start={start.value} take a model in full precision")
    if start is not Start.zero and not quantizes:
        raise PolicyError(f"start={start.value} splits weights between codes and adapter: give a policy")
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    if start is Start.cloq:
        if batches is None:
            raise StateError("start=cloq reads calibration data: give batches")
        if options is not None and options.folder is not None:
            raise StateError(f"start=cloq keeps no finished blocks: leave the folder {options.folder!r} out")
        starts = _fit_to_data(model, policy, rank, list(batches), forward, options)
    elif quantizes and start is Start.zero:
        frozen_at_once(model, policy)
    elif quantizes:
        starts = _split_weights(model, policy, rank, iterations if start is Start.loftq else 0)
    try:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            use_dora=dora,
        )
        wrapped = peft.get_peft_model(model, config)
    except ValueError as error:
        raise PolicyError(f"peft refuses this adapter: {error} Other layers: adapter.targets=[q_proj,v_proj]") from None
    _fill_(wrapped.get_base_model(), starts, start, 1 / scale)
    return use_lora_product_(wrapped)


@torch.no_grad()
def _fill_(base: nn.Module, starts: dict[str, tuple[Tensor, Tensor]], start: Start, by: float) -> None:
    """Put (A, B) of each layer into its adapter, B times ``by``: peft multiplies the product by the inverse."""
    for name, (a, b) in starts.items():
        layer = base.get_submodule(name)
        if not hasattr(layer, "lora_A"):
            if start is Start.cloq:  # whose codes stand alone
                continue
            raise PolicyError(f"{name!r} is quantized and no target: start={start.value} takes part of its weight away")
        layer.lora_A["default"].weight[: len(a)] = a  # a small layer's rank may be less than r: the rest starts at zero
        layer.lora_B["default"].weight[:, : len(a)] = b * by


@torch.no_grad()
def split_weight(
    weight: Tensor, quantize: Callable[[Tensor], QuantizedTensor], rank: int, iterations: int
) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """Return (codes, A, B) with weight about equal to codes + B A.

    Args:
        weight: (N, K).
        quantize: makes codes of a weight.
        rank: r; A is (r, K) and B (N, r), float32.
        iterations: of LoftQ; 0 for QPiSSA, where B A is the best approximation of the weight itself.
    """
    weight = weight.float()
    if not iterations:
        a, b = best_of_rank(weight, rank)
        return quantize(weight - b @ a), a, b
    rest = weight
    for _ in range(iterations):
        codes = quantize(rest)
        a, b = best_of_rank(weight - codes.dequantize(torch.float32), rank)
        rest = weight - b @ a
    return codes, a, b


def _decisions(model: nn.Module, policy: QuantPolicy) -> list[Decision]:
    """Return what is decided on the layers that are quantized, each of which is to be split."""
    decisions = [decision for decision in decide(model, policy) if decision.weight is not None]
    check_shapes(decisions)
    for decision in decisions:
        if isinstance(decision.activation, QuantSpec) or type(decision.layer) is not nn.Linear:
            raise PolicyError(
                f"{decision.name!r}: only linear layers without an activation spec can be split between codes and "
                "adapter: leave it out by a rule with weight null, or take adapter.start=zero"
            )
    return decisions


def _split_weights(model: nn.Module, policy: QuantPolicy, rank: int, iterations: int) -> dict[str, tuple]:
    """Split every weight into what is frozen and what starts the adapter; return each layer's A and B."""
    starts = {}
    for decision in _decisions(model, policy):
        layer, weight = decision.layer, matrix(decision.layer)

        def quantize(rest: Tensor, decision=decision, layer=layer) -> QuantizedTensor:
            layer.weight.data = rest.to(layer.weight.dtype)
            return weight_quantizer(decision, policy.init).quantize(matrix(layer))

        tensor, *starts[decision.name] = split_weight(weight.detach().clone(), quantize, rank, iterations)
        make_frozen_(layer, PackedWeight.from_tensor(tensor), None)
    return starts


def _fit_to_data(
    model: nn.Module,
    policy: QuantPolicy,
    rank: int,
    batches: list[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    options: Options | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Quantize a model by GPTQ and freeze it; return each layer's A and B."""
    from .ptq import initialise

    _decisions(model, policy)
    starts = {}

    def fit(name: str, weight: Tensor, rounded: Tensor, factor: Factor) -> None:
        a, b = best_for_inputs((weight - rounded)[:, factor.order], factor.inverse, rank)
        starts[name] = a[:, factor.order.argsort()], b

    prepare(model, replace(policy, init=Init.gptq))
    print(initialise(model, batches, forward or run_inputs, options, fit))
    freeze(model)
    return starts
