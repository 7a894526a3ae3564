"""joint_lora: train LoRA and step sizes together, so that the deployed weight is Q(W + scaling * B A)."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from .adapters import scaling
from .errors import LayerError, PolicyError, did_you_mean
from .layers import FrozenLinear, QuantLinear, frozen_layers, is_frozen, make_joint_
from .policy import QuantPolicy
from .quantizers import WeightLSQ
from .spec import Init
from .surgery import prepare

GRID = "a joint adapter is rounded with learned step sizes on a symmetric grid"


def joint_lora(
    model: nn.Module,
    policy: QuantPolicy,
    rank: int = 16,
    alpha: float = 32.0,
    targets: Sequence[str] | None = None,
    verbose: bool = True,
) -> nn.Module:
    """Make a model train as the quantized model it will be, by low-rank updates inside the rounding; in place.

    Only the updates and the step sizes learn. ``qat.freeze`` gives the deployed model, whose codes are the training
    forward's.

    Args:
        model: in full precision, or frozen: then its codes are W, which should have more bits than the policy's.
        policy: what the deployed weights are. Of a frozen model only ``policy.weight`` counts: the layers that are
            quantized in it are those that get it.
        rank: r.
        alpha: scaling * r.
        targets: names or globs of the quantized layers that get an update; None for all. The others keep their weight,
            and only their step sizes learn.
        verbose: print ``prepare``'s summary.

    Raises:
        PolicyError: no weight spec, a codebook, an asymmetric grid, a target that matches no quantized linear layer, or
            a rank or alpha with which nothing is learned.
        LayerError: shapes that do not fit.
    """
    scale = scaling(rank, alpha)
    if policy.quantizes_nothing():
        raise PolicyError("a joint adapter is rounded as the policy says, and this one quantizes nothing: policy=lm_w4")
    if is_frozen(model):
        if policy.weight is None or policy.init not in (Init.lsq, Init.mse, Init.minmax):
            raise PolicyError(
                "a joint adapter on a frozen model takes policy.weight, and policy.init=lsq, mse or minmax"
            )
        layers = {name: layer for name, layer in frozen_layers(model) if layer.packed_weight is not None}
        quantizers = {name: _quantizer(name, layer, policy) for name, layer in layers.items()}
        chosen = chosen_layers(layers, targets)
    else:
        prepare(model, policy, verbose)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
        layers = {name: layer for name, layer in layers.items() if layer.weight_quantizer is not None}
        quantizers = {name: layer.weight_quantizer for name, layer in layers.items()}
        chosen = chosen_layers(layers, targets)
    for name in chosen:
        if type(layers[name]) not in (QuantLinear, FrozenLinear):
            raise LayerError(
                f"{name!r}: a {type(layers[name]).__name__} takes no joint adapter: leave it out of targets"
            )
        if not isinstance(quantizers[name], WeightLSQ):
            raise PolicyError(f"{name!r}: {GRID}")
    model.requires_grad_(False)
    for name in chosen:
        make_joint_(layers[name], quantizers[name], rank, scale)
    for quantizer in quantizers.values():
        quantizer.requires_grad_(True)
    return model


def chosen_layers(layers: dict[str, nn.Module], targets: Sequence[str] | None) -> list[str]:
    """Return the names of the layers that targets name, by their last part or as globs; all for None.

    Raises:
        PolicyError: a target that matches none.
    """
    if targets is None:
        return list(layers)
    chosen: dict[str, None] = {}
    for target in targets:
        found = [name for name in layers if fnmatchcase(name, target) or name.endswith(f".{target}")]
        if not found:
            known = did_you_mean(target, [name.rpartition(".")[2] for name in layers])
            raise PolicyError(f"adapter target {target!r} matches no quantized linear layer{known}")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


@torch.no_grad()
def _quantizer(name: str, layer: nn.Module, policy: QuantPolicy) -> WeightLSQ:
    spec = policy.weight
    if spec.codebook is not None or not spec.symmetric:
        raise PolicyError(f"{name!r}: {GRID}")
    return WeightLSQ(spec, layer.packed_weight.dequantize(torch.float32), name, policy.init)
