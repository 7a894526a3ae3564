"""Whether a network is still the one that was saved or measured: callbacks may change it when training is over."""

from __future__ import annotations

import torch
from torch import nn


def fingerprint(model: nn.Module) -> list[float]:
    """Return the norms of a network's parameters and buffers of floats, with one transfer from the device."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    tensors = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not tensors:
        return []
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(tensors)])
    return norms.tolist()
