"""Adapters that peft puts on a quantized model: they train beside the codes, and ship so, in peft's own folder.

The base of a LoRA layer is the quantized layer itself, so y = Q(W) x + B A x in training is what a runtime computes
that opens the exported base and the adapter. Merging B A into codes would round again, which nobody trained: it is
refused.
No peft is imported here; its modules are recognised by where their class comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from .errors import ArtifactError, StateError

if TYPE_CHECKING:
    from .quantized_model import QuantizedModel

FOLDER = "adapter"
CONFIG = "adapter_config.json"  # by which peft knows its folders


def wrapping_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield peft's layers that wrap another one, which is their ``base_layer``, by name."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.") and "base_layer" in module._modules:
            yield name, module


def own_modules(model: nn.Module) -> set[int]:
    """Return the ids of the modules that belong to adapters, such as the matrices A and B of LoRA."""
    return {
        id(module)
        for _, wrapper in wrapping_layers(model)
        for child_name, child in wrapper.named_children()
        if child_name != "base_layer"
        for module in child.modules()
    }


def require_unmerged(model: nn.Module) -> None:
    """Raise StateError if an adapter is merged into a weight that is to be rounded."""
    for name, wrapper in wrapping_layers(model):
        merged = list(getattr(wrapper, "merged_adapters", []))
        if merged:
            raise StateError(
                f"the adapter {merged[0]!r} is merged into {name!r}, whose codes were trained without it: call "
                "unmerge_adapter() to ship it beside, or merge_and_unload() before qat.prepare and train on"
            )


def split(model: nn.Module) -> tuple[nn.Module, Callable[[str], str | None], Callable[[Path], None] | None]:
    """Return the model without peft's wrapper, its own names, and what writes the adapter.

    Returns:
        The network; a function from a name in it to the name without peft, None for what belongs to an adapter; and a
        function that writes peft's folder, None if there is no adapter.

    Raises:
        StateError: the adapter is of a kind that cannot lie beside, or is merged.
    """
    wrappers = dict(wrapping_layers(model))
    peft = type(model).__module__.startswith("peft.")
    if not wrappers and not peft:
        return model, lambda name: name, None
    if not peft:
        raise StateError(
            f"{next(iter(wrappers))!r} holds an adapter that was put into the model: use peft.get_peft_model, whose "
            "result knows how to save it"
        )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.") and "original_module" in module._modules:
            raise StateError(f"{name!r} is trained whole (modules_to_save): leave it out, and give it a rule instead")
    if not wrappers:
        raise StateError("only adapters that wrap layers, such as LoRA, can lie beside a quantized model")
    require_unmerged(model)
    base = model.get_base_model()
    inside = [f"{name}." for name, _ in wrapping_layers(base)]

    def plain(name: str) -> str | None:
        for prefix in inside:
            if name.startswith(prefix) and not f"{name}.".startswith(f"{prefix}base_layer."):
                return None
        return ".".join(part for part in name.split(".") if part != "base_layer")

    return base, plain, model.save_pretrained


def stored(folder: Path | None) -> list[str]:
    """Return the names of peft's folders in a folder; one of several adapters holds them in folders of their own."""
    if folder is None:
        return []
    return sorted(
        {file.relative_to(folder).parts[0] for deep in ("*", "*/*") for file in folder.glob(f"{deep}/{CONFIG}")}
    )


def folders(model: QuantizedModel) -> list[str]:
    """Return the names of the adapters' folders that lie beside a model's files, or will."""
    return stored(model.files) + ([] if model.adapter is None else [FOLDER])


def refuse_beside(model: QuantizedModel, method: str) -> None:
    """Raise ArtifactError if a model has an adapter, for formats whose runtimes open none of peft's."""
    for name in folders(model):
        raise ArtifactError(
            f"{model.source} has an adapter beside it ({name!r}), which runtimes of {method} do not open: use --to "
            "compressed-tensors or bitsandbytes and peft, or merge it before qat.prepare and train on"
        )
