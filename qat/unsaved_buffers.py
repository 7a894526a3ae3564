"""Buffers of transformers that no state dict holds, such as rotary frequencies: who opens a model makes them anew.

They are float32 in a bfloat16 model, too. ``model.bfloat16()`` and Lightning's bf16-true round them with the
parameters: positions then turn by other angles in training than in what ships, the more the longer a text is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .errors import some_of
from .outline import parameters_on_meta
from .wrappers import unwrapped

HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def dtypes_kept(model: nn.Module) -> Iterator[None]:
    """Let a model be cast for a ``with`` block, but for these buffers."""
    before = _unsaved(model)
    yield
    for _, module, leaf, buffer in before:
        now = module._buffers[leaf]
        if now.dtype != buffer.dtype:
            module._buffers[leaf] = buffer.to(now.device)


def warn_of_rounded(model: nn.Module) -> None:
    """Warn where these buffers are in half precision, and who opens what is saved of the model will not round them."""
    halves = [(name, buffer) for name, _, _, buffer in _unsaved(unwrapped(model)) if buffer.dtype in HALVES]
    if not halves:
        return
    from .models import architecture_of, build

    architecture = architecture_of(unwrapped(model))
    if architecture is None:
        return
    with parameters_on_meta():
        fresh = {name: buffer.dtype for name, _, _, buffer in _unsaved(build(architecture))}
    if rounded := [name for name, buffer in halves if fresh.get(name, buffer.dtype) != buffer.dtype]:
        some = some_of(list(map(repr, rounded)), 2)
        warnings.warn(
            f"the model's cast has rounded what no file holds ({some}), and who opens what ships makes that anew, in "
            "float32: its positions would not be those of training. Build the model with dtype=torch.bfloat16, as "
            "from_pretrained and from_config take it, in place of model.bfloat16()",
            stacklevel=3,
        )


def _unsaved(model: nn.Module) -> list[tuple[str, nn.Module, str, Tensor]]:
    """Return (name, module, its own name for it, buffer) of each floating-point one."""
    return [
        (f"{prefix}.{leaf}".removeprefix("."), module, leaf, buffer)
        for prefix, module in model.named_modules()
        if type(module).__module__.startswith("transformers")  # and transformers_modules, which is remote code
        for leaf, buffer in module._buffers.items()
        if leaf in module._non_persistent_buffers_set and buffer is not None and buffer.is_floating_point()
    ]
