"""Adapters that peft puts on a quantized model: they train beside the codes, and ship so, in peft's own folder.

The base of a LoRA layer is the quantized layer itself, so y = Q(W) x + B A x in training is what a runtime computes
that opens the exported base and the adapter. Merging B A into codes would round again, which nobody trained: peft's own
merge is refused, and ``qat.merge`` says what it costs. Beside peft's files lies base.json, a hash of the codes that the
adapter was trained on: ``load_adapter`` refuses others.
No peft is imported here; its modules are recognised by where their class comes from.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn

from .errors import ArtifactError, PolicyError, StateError
from .lora_product import use_lora_product_

if TYPE_CHECKING:
    from .quantized_model import QuantizedModel

FOLDER = "adapter"
CONFIG = "adapter_config.json"  # by which peft knows its folders
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
BASE = "base.json"
SETS = ("target_modules", "exclude_modules")  # of peft's config, which it writes in another order in each process


def scaling(rank: int, alpha: float) -> float:
    """Return alpha / rank, which B A is multiplied by.

    Raises:
        PolicyError: no such update would be learned.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise PolicyError(f"adapter.rank={rank}: give a whole number of 1 or more")
    if not 0 < alpha < math.inf:
        raise PolicyError(f"adapter.alpha={alpha}: give a number above 0, such as {2 * rank}")
    return alpha / rank


def _is_pefts(module: nn.Module) -> bool:
    return any(part.__module__.startswith("peft.") for part in type(module).__mro__)


def wrapping_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield peft's layers that wrap another one, which is their ``base_layer``, by name."""
    for name, module in model.named_modules():
        if _is_pefts(module) and "base_layer" in module._modules:
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
    peft = _is_pefts(model)
    if not wrappers and not peft:
        return model, lambda name: name, None
    if not peft:
        raise StateError(
            f"{next(iter(wrappers))!r} holds an adapter that was put into the model: use peft.get_peft_model, whose "
            "result knows how to save it"
        )
    for name, module in model.named_modules():
        if _is_pefts(module) and "original_module" in module._modules:
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

    return base, plain, lambda folder: save_adapter(model, folder)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write a peft model's adapters in peft's own format, and the hash of the base they were trained on.

    The same adapters are the same bytes.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    digest = fingerprint(model)
    for file in folder.rglob(CONFIG):
        config = json.loads(file.read_text(encoding="utf-8"))
        config |= {key: sorted(config[key]) for key in SETS if isinstance(config.get(key), list)}
        file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        if digest:
            (file.parent / BASE).write_text(json.dumps({"sha256": digest}) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, folder: str | Path, trainable: bool = False, any_base: bool = False) -> nn.Module:
    """Return peft's model of a base and an adapter that was trained on it.

    Args:
        model: the base: frozen, or in full precision where the adapter was trained on such a one.
        folder: of the adapter, as ``save_adapter`` or peft wrote it.
        trainable: go on training it.
        any_base: take the adapter whatever it was trained on, such as one of another package, which says nothing of it.

    Raises:
        ArtifactError: there is no adapter, or it is damaged, or it was trained on other codes.
        StateError: peft is not installed.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ArtifactError(f"{folder} holds no adapter of peft: there is no {CONFIG}")
    if not any((folder / name).is_file() for name in WEIGHTS):  # which peft would look for on the Hub
        raise ArtifactError(f"{folder} holds no weights of an adapter: there is no {WEIGHTS[0]}")
    peft, expected, here = import_peft(), _trained_on(folder), fingerprint(model)
    if expected != here and not any_base:
        there = (
            "on a base it does not name (peft alone saved it, as HF's Trainer does)"
            if expected is None
            else f"on codes {expected[:12]}"
        )
        raise ArtifactError(
            f"the adapter {folder} was trained {there}, and this base has codes {str(here)[:12]}: "
            "open the base that it was trained on; any_base=True (--any-base) takes it all the same"
        )
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"the adapter {folder} is damaged, or fits another model: {reason[:200]}") from error
    return use_lora_product_(adapted)


def _trained_on(folder: Path) -> str | None:
    """Return the hash of the base that an adapter names; None where it names none."""
    try:
        named = json.loads((folder / BASE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ArtifactError(f"{folder / BASE} is damaged: {error}") from None
    if not isinstance(named, dict) or not isinstance(named.get("sha256"), str):
        raise ArtifactError(f"{folder / BASE} is damaged: it names no base")
    return named["sha256"]


def fingerprint(model: nn.Module) -> str | None:
    """Return the SHA-256 of a frozen model's codes, scales, zero points and levels by layer; None if it has none.

    Adapters, layer names that peft lengthens, device and compute dtype do not enter.
    """
    from .layers import frozen_layers

    digest, seen = hashlib.sha256(), 0
    for name, layer in frozen_layers(model):
        if layer.packed_weight is None:
            continue
        plain = ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer")
        for part, value in layer.packed_weight.state_dict().items():
            digest.update(f"{plain}.{part} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            seen += 1
    return digest.hexdigest() if seen else None


def import_peft():
    """Return peft; StateError says how to install it."""
    try:
        import peft

        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft asks for it
    except ImportError:
        raise StateError("adapters need peft: pip install 'qat-lsq[hf]'") from None
    return peft


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
