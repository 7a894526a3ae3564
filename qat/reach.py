"""check: the layers that a forward does not reach, and weights that it takes past their layer's fake quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .calibration import run_inputs
from .errors import StateError
from .layers import is_prepared, quant_layers
from .modes import in_eval_mode
from .wrappers import unwrapped


def check(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None = None) -> list[str]:
    """Run a batch, and say what of it is not as it will ship; the model runs in eval mode without gradients.

    A fake-quant layer rounds in its own forward. ``F.linear(x, layer.weight)`` anywhere else takes the weight as it is,
    while the frozen layer's is rounded: training and what ships differ. What only makes one number of a weight, such as
    its norm, is no such use; nor is that of an embedding in full precision whose weight a quantized head shares, as
    the embedding keeps it.

    Args:
        model: a prepared and calibrated model.
        batch: what ``forward`` takes; one example is enough.
        forward: how to run it; default ``model(batch)``, with ``batch[0]`` of a tuple or list, as in ``calibrate``.

    Returns:
        A line a finding, with the layers' names and what to do; none where there is nothing to say.

    Raises:
        StateError: the model is not prepared, or does not take a dict, or a step size was never initialised.
    """
    if not is_prepared(model):
        raise StateError("nothing to check: call qat.prepare(model, policy) first")
    layers = dict(quant_layers(model))
    watch = _Watch(layers)
    hooks = []
    watched = ((name, module) for name, module in unwrapped(model).named_modules() if watch.has_weight_of(name, module))
    for name, layer in watched:
        hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: watch.enter(name)))
        hooks.append(layer.register_forward_hook(lambda *_, name=name: watch.leave(name), always_call=True))
    try:
        with in_eval_mode(model), torch.no_grad(), watch:
            (forward or run_inputs)(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    lines = [
        f"{name!r}: its weight is used past its fake quantization, in {operator}, so that training does not see what "
        "ships: call the layer, or leave it in full precision with a rule"
        for name, operator in watch.past.items()
    ]
    missing = [name for name in layers if name not in watch.reached and name not in watch.past]
    if missing:
        lines.append(f"not reached by the batch: {', '.join(missing)}; they learn from other batches, if at all")
    return lines


class _Watch(TorchDispatchMode):
    """Sees every operator, and which layers' forwards it runs in.

    Attributes:
        reached: names of layers that were called.
        past: layer name -> the first operator that took its weight outside the forward of any layer that has it.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.reached: set[str] = set()
        self.past: dict[str, str] = {}
        self._layers, self._inside = layers, []
        self._owners: dict[int, list[str]] = {}
        for name, layer in layers.items():
            weight = layer._parameters.get("weight")  # codes of a frozen base give a new tensor at each look
            if layer.weight_quantizer is not None and weight is not None:
                self._owners.setdefault(id(weight), []).append(name)

    def has_weight_of(self, name: str, module: nn.Module) -> bool:
        """Return whether a module is one of the layers, or has the weight of one as its own, which it then may take."""
        if name in self._layers:
            return True
        shared = [self._owners[id(each)] for each in module._parameters.values() if id(each) in self._owners]
        for names in shared:
            names.append(name)
        return bool(shared)

    def enter(self, name: str) -> None:
        """Begin a layer's forward."""
        self.reached.add(name)
        self._inside.append(name)

    def leave(self, name: str) -> None:
        """End it."""
        self._inside.remove(name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        used = {id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)} & self._owners.keys()
        if used and any(isinstance(value, Tensor) and value.numel() > 1 for value in tree_leaves(result)):
            for names in (self._owners[key] for key in used):
                if not set(names) & set(self._inside):
                    self.past.setdefault(names[0], str(func.overloadpacket))
        return result
