"""qa_lora: adapters that train zero points, so that they are part of the codes' own format when training ends."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .adapters import scaling
from .errors import LayerError, StateError
from .freezing import frozen_at_once
from .joint_lora import chosen_layers
from .layers import FrozenLinear, frozen_layers, is_frozen, make_qa_lora_
from .policy import QuantPolicy
from .spec import Granularity


def qa_lora(
    model: nn.Module,
    policy: QuantPolicy | None = None,
    rank: int = 16,
    alpha: float = 32.0,
    targets: Sequence[str] | None = None,
) -> nn.Module:
    """Make a frozen model train low-rank updates of its zero points; in place.

    ``qat.freeze`` gives the deployed model: the base's codes and scales, with zero points in float16. Its weights are
    the training forward's to the bit. Our own artifact holds such zero points; other formats refuse them by name.

    Args:
        model: frozen, or in full precision.
        policy: quantizes a model in full precision first, each weight rounded once.
        rank: r.
        alpha: scaling * r.
        targets: names or globs of the layers; None for all that are quantized.

    Raises:
        StateError: there is nothing frozen, and no policy.
        PolicyError: a target that matches no layer, a rank or alpha with which nothing is learned, or a policy that
            waits for data.
        LayerError: a layer whose codes have no zero point: a codebook, or one scale for the whole weight.
    """
    scale = scaling(rank, alpha)
    if policy is not None and not policy.quantizes_nothing():
        frozen_at_once(model, policy)
    if not is_frozen(model):
        raise StateError("QA-LoRA trains zero points of codes: give a frozen model, or a policy such as lm_w4")
    layers = {name: layer for name, layer in frozen_layers(model) if layer.packed_weight is not None}
    names = chosen_layers(layers, targets)
    for name in names:
        spec = layers[name].packed_weight.spec
        if type(layers[name]) is not FrozenLinear:
            raise LayerError(f"{name!r}: a {type(layers[name]).__name__} takes no QA-LoRA: leave it out of targets")
        if spec.codebook is not None or spec.granularity is Granularity.tensor:
            raise LayerError(f"{name!r}: {spec} has no zero points to train: use groups or channels on an even grid")
    model.requires_grad_(False)
    for name in names:
        make_qa_lora_(layers[name], rank, scale)
    return model
