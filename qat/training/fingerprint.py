"""Whether a network is still the one that was saved or measured: callbacks may change it when training is over."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> list[float]:
    """Return the norms of a network's parameters and buffers of floats: of sharded ones this rank's part."""
    of_device: dict[torch.device, list[Tensor]] = {}
    for held in (*model.parameters(), *model.buffers()):
        tensor = held.to_local().detach() if hasattr(held, "to_local") else held.detach()
        if tensor.is_floating_point() and tensor.numel():
            of_device.setdefault(tensor.device, []).append(tensor)
    found = (torch.stack(torch._foreach_norm(part, 2, torch.float64)).tolist() for part in of_device.values())
    return [norm for part in found for norm in part]


def has_changed(strategy: Strategy, model: nn.Module, before: list[float]) -> bool:
    """Return whether a network is another one than that of a fingerprint, on any rank: what follows is for all."""
    return strategy.reduce_boolean_decision(fingerprint(model) != before, all=False)
