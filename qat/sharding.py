"""FSDP2: step sizes in groups of their own."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .errors import LayerError
from .layers import quant_layers
from .quantizers import AsymmetricLSQ, LearnedStepSize, WeightLSQ


def shard_step_sizes(model: nn.Module, **options: Any) -> nn.Module:
    """Shard each step size by itself, before ``fully_shard`` takes the blocks that hold them; in place.

    FSDP2 wants one dtype in a group, and step sizes are float32: a model with bf16 weights needs this, one in float32
    does not. It takes a small all-gather for every step size. Weights must arrive as they are stored: a policy that
    casts them (``MixedPrecisionPolicy(param_dtype=...)``) is refused in the forward, since what trains would not be
    what ships; use bf16 weights, or autocast. FSDP2 leaves buffers alone: each rank's batch norm has statistics of
    its own batches.

        qat.shard_step_sizes(model)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)

    Args:
        model: prepared, and calibrated.
        options: for ``fully_shard``, such as mesh.

    Raises:
        LayerError: a weight with zero points.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # slow to import

    for name, layer in quant_layers(model):
        if isinstance(layer.weight_quantizer, AsymmetricLSQ):
            raise LayerError(f"{name!r}: a weight with zero points is not sharded: train it with DDP")
        if isinstance(layer.weight_quantizer, WeightLSQ):
            layer.weight_quantizer.stored_dtype = layer.weight.dtype
    for quantizer in list(model.modules()):
        if isinstance(quantizer, LearnedStepSize):
            fully_shard(quantizer, reshard_after_forward=False, **options)
            if hasattr(quantizer, "rounding"):  # which layers call in place of forward
                register_fsdp_forward_method(quantizer, "rounding")
    return model


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that ``fully_shard`` took."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and there if anything is sharded
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free what forwards without a backward have gathered: FSDP2 keeps the outermost module's weights for one."""
    for module in sharded_modules(model):
        module.reshard()
