"""lora: adapters of peft on a base that is quantized here, started at zero, by LoftQ or by PiSSA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

import torch
from torch import Tensor, nn

from .adapters import import_peft
from .errors import PolicyError, StateError
from .freezing import frozen_at_once
from .layers import PackedWeight, is_frozen, is_prepared, make_frozen_, matrix
from .lora_product import use_lora_product_
from .numerics import QuantizedTensor
from .policy import QuantPolicy
from .spec import QuantSpec, as_member
from .surgery import check_shapes, decide, weight_quantizer


class Start(StrEnum):
    """Where A and B start.

    zero: B = 0, so that the model starts as its base.
    loftq: B A and the codes together approximate the weight: Q = q(W - B A), B A = SVD_r(W - Q) in turns (LoftQ,
        arXiv:2310.08659, algorithm 1).
    pissa: B A = SVD_r(W), and the codes hold the rest (QPiSSA, arXiv:2404.02948, section 4).
    """

    zero = "zero"
    loftq = "loftq"
    pissa = "pissa"


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

    Raises:
        StateError: the model is prepared, or frozen where it should not be, or peft is not installed.
        PolicyError, LayerError: a policy that does not fit, or targets that peft refuses.
    """
    peft, start = import_peft(), as_member(Start, "start", start)
    quantizes = policy is not None and not policy.quantizes_nothing()
    if is_prepared(model):
        raise StateError("this model trains its own weights: freeze it first, or use qat.joint_lora")
    if is_frozen(model) and (quantizes or start is not Start.zero):
        raise StateError(f"this base is frozen: policy and start={start.value} take a model in full precision")
    if start is not Start.zero and not quantizes:
        raise PolicyError(f"start={start.value} splits weights between codes and adapter: give a policy")
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    if quantizes and start is Start.zero:
        frozen_at_once(model, policy)
    elif quantizes:
        starts = _split_weights(model, policy, rank, iterations if start is Start.loftq else 0)
    targets = targets if isinstance(targets, str) else list(targets)
    options = {"target_modules": targets, "lora_dropout": dropout, "use_dora": dora}
    try:
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, **options))
    except ValueError as error:
        raise PolicyError(f"peft refuses this adapter: {error} Other layers: adapter.targets=[q_proj,v_proj]") from None
    for name, (a, b) in starts.items():
        layer = wrapped.get_base_model().get_submodule(name)
        if not hasattr(layer, "lora_A"):
            raise PolicyError(f"{name!r} is quantized and no target: start={start.value} takes part of its weight away")
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b * (rank / alpha))
    return use_lora_product_(wrapped)


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
        a, b = _best_of_rank(weight, rank)
        return quantize(weight - b @ a), a, b
    rest = weight
    for _ in range(iterations):
        codes = quantize(rest)
        a, b = _best_of_rank(weight - codes.dequantize(torch.float32), rank)
        rest = weight - b @ a
    return codes, a, b


def _best_of_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of the least squared error, the singular values shared evenly."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _split_weights(model: nn.Module, policy: QuantPolicy, rank: int, iterations: int) -> dict[str, tuple]:
    decisions = [decision for decision in decide(model, policy) if decision.weight is not None]
    check_shapes(decisions)
    starts = {}
    for decision in decisions:
        layer, weight = decision.layer, matrix(decision.layer)
        if isinstance(decision.activation, QuantSpec) or type(layer) is not nn.Linear:
            raise PolicyError(f"{decision.name!r}: only linear layers without an activation spec can be split")

        def quantize(rest: Tensor, decision=decision, layer=layer) -> QuantizedTensor:
            layer.weight.data = rest.to(layer.weight.dtype)
            return weight_quantizer(decision, policy.init).quantize(matrix(layer))

        tensor, *starts[decision.name] = split_weight(weight.detach().clone(), quantize, rank, iterations)
        make_frozen_(layer, PackedWeight.from_tensor(tensor), None)
    return starts
