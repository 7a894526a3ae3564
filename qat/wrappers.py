"""What torch puts around a model, and shortcuts past the forwards of a model's layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .errors import LayerError, StateError


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside what torch puts around one: its layers' names are its own.

    That is DataParallel, DistributedDataParallel, the AveragedModel of torch.optim.swa_utils, and torch.compile.

    Raises:
        StateError: it is no module.
    """
    require_module(model)
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's; its class is in a part of torch that is slow to import
            model = model._orig_mod
        else:
            return model


def require_module(model: Any) -> None:
    """Raise StateError for what is no module, and say what to do about a class or a builder."""
    if not isinstance(model, nn.Module):
        name = getattr(model, "__name__", None)
        fix = f"call it: {name}()" if name and callable(model) else "build the model first"
        raise StateError(f"expected a torch.nn.Module, got {name or type(model).__name__}: {fix}")


def require_materialised(model: nn.Module) -> None:
    """Raise LayerError for lazy layers, whose weights do not exist before the first forward, and for compiled ones."""
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        what = f"its part {scripted[0]!r}" if scripted[0] else "this model"
        raise LayerError(f"{what} is a ScriptModule, which torch has compiled: give the model it was made from")
    names = [name for name, module in model.named_modules() if _is_lazy(module)]
    if names:
        raise LayerError(f"lazy layers have no weights yet ({', '.join(names)}): run one batch through the model first")


MAKE_PARAMETERS = (
    "make parameters of them with torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), with "
    "torch.nn.utils.remove_weight_norm(layer) or with torch.nn.utils.prune.remove(layer, 'weight'), whichever made them"
)


def computed_weights(model: nn.Module) -> list[str]:
    """Return the layers whose weight is no parameter: parametrized ones, and those that a hook sets before a forward.

    Such hooks are those of weight_norm and spectral_norm of old, and of pruning.
    """
    return [
        name
        for name, layer in unwrapped(model).named_modules()
        if "weight" in layer._modules.get("parametrizations", ()) or isinstance(layer.__dict__.get("weight"), Tensor)
    ]


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params()


def call_every_layer_(model: nn.Module) -> None:
    """Keep a model from what it does past its layers in eval mode.

    ``nn.TransformerEncoder`` has a fused forward there, which reads weights and calls no layer, and transformers' RWKV
    divides some weights in place, against overflow in fp16, by powers of two that it takes off the hidden states again.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # one of the conditions of its fast path
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which only the fast path takes
        elif getattr(module, "layers_are_rescaled", None) is not None:
            if module.layers_are_rescaled:  # it ran in eval mode
                was, module.training = module.training, True
                module._rescale_layers()
                module.training = was
            module.config.rescale_every = 0
