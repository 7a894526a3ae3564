"""The rule by which a frozen layer with int8 inputs multiplies integers, and the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import backend
from ..quantizers import DynamicActivation, FrozenActivation
from ..spec import Dynamic
from .packed import PackedWeight

if TYPE_CHECKING:
    from qat.kernels.int4_layout import Int4Weight

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def fits(
    x: Tensor, activation: FrozenActivation | DynamicActivation, weight: PackedWeight | None, bias: Tensor | None
) -> bool:
    """Return whether ``qat.kernels.int8_linear`` computes the layer.

    That is where ``qat.backend.set_int8_products`` asks for it and x has as many tokens, where the kernels take the
    weight (``PackedWeight.row_sums``), and where x becomes int8, for each token or by a trained scale. llama.cpp's q8_0
    has a scale for each 32 inputs, too few for integer sums to pay.
    """
    least = backend.int8_products()
    if least is None or weight is None or weight.row_sums is None or backend.batch_invariant():
        return False
    if isinstance(activation, DynamicActivation) and (activation.spec != Dynamic.int8_token or not activation.enabled):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return x.dtype in _FLOATS and x.numel() >= least * weight.columns


def obstacle(activation: FrozenActivation | DynamicActivation, weight: PackedWeight) -> str | None:
    """Return why a layer will not multiply integers, however many tokens it gets; None if it may."""
    if activation.spec is Dynamic.q8_0:
        return "q8_0 has a scale for each 32 inputs"
    if weight.spec.bits != 4 or not weight.spec.holds_integers:
        return f"its weight is {weight.spec}"
    if weight.spec.group_size is not None and weight.spec.group_size % 64:
        return f"groups of {weight.spec.group_size}: a multiple of 64 would"
    if weight.row_sums is None:
        return "its weight is not on a GPU with Triton, or has more than 32768 inputs"
    return None


def int8_linear(
    x: Tensor,
    activation: FrozenActivation | DynamicActivation,
    weight: Int4Weight,
    sums: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the product in ``dtype`` of x (..., K), not rounded yet, with a weight whose row sums are ``sums``."""
    from qat.kernels.int8_linear import int8_linear  # loads Triton

    grid = None, 8, True, None
    if isinstance(activation, FrozenActivation):
        spec = activation.spec
        grid = activation.scale, spec.bits, spec.signed is not False, activation.zero_point
    return int8_linear(x, weight, sums, *grid, bias, dtype)
