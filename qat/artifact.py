"""The artifact: a folder with config.json and model.safetensors, written atomically, checked when read.

config.json holds the architecture (a transformers config, or a builder of ours under "architecture") and, under
"quantization_config", the layers' specs, which names are tied, and the length and SHA-256 of the tensor file. Nothing
in it is executable: names are looked up in fixed tables only.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import __version__
from .atomic import atomic_folder
from .checkpoint import load_state
from .errors import ArtifactError, StateError
from .layers import FROZEN, PackedWeight, frozen_layers, make_frozen_, plain_type, quant_layers
from .quantizers import FrozenActivation
from .spec import QuantSpec

VERSION = 1
METHOD = "qat"
CONFIG, TENSORS = "config.json", "model.safetensors"


def save(model: nn.Module, out: str | Path) -> None:
    """Write a frozen model as an artifact folder; an artifact that stands there is replaced in one step.

    Raises:
        StateError: the model is not frozen.
        ArtifactError: ``out`` is no artifact and not empty, or the disk is full or read-only; nothing is changed then.
    """
    from .models import architecture_of

    if any(True for _ in quant_layers(model)):
        raise StateError("this model still trains: call qat.freeze(model) before qat.save")
    if not any(True for _ in frozen_layers(model)):
        raise StateError("nothing to save: call qat.prepare(model, policy), train, and qat.freeze(model) first")
    tensors, tied = _untie(model.state_dict())
    with atomic_folder(out, is_artifact) as folder:
        _save_tensors(tensors, folder / TENSORS)
        description = {
            "quant_method": METHOD,
            "version": VERSION,
            "qat_version": __version__,
            "layers": {name: _describe(layer) for name, layer in frozen_layers(model)},
            "tied": tied,
            "files": {TENSORS: {"bytes": (folder / TENSORS).stat().st_size, "sha256": _sha256(folder / TENSORS)}},
        }
        config = {**_architecture_entries(architecture_of(model)), "quantization_config": description}
        description["checksum"] = _checksum(config)
        (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def load(path: str | Path, model: nn.Module | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """Read an artifact folder into a frozen model in eval mode.

    Args:
        path: the folder.
        model: an untrained instance of the architecture, swapped in place and filled; needed where the artifact does
            not name an architecture that this package or transformers can build.
        device: where the model goes.

    Raises:
        ArtifactError: no artifact, a damaged one, one from a newer version, or one of another model.
    """
    config, tensors = _read(Path(path))
    description = config["quantization_config"]
    if model is None:
        model = _build(config, path)
    elif any(True for _ in quant_layers(model)) or any(True for _ in frozen_layers(model)):
        raise StateError("load fills a plain model: give it a fresh instance, neither prepared nor frozen")
    packed: dict[str, PackedWeight] = {}
    for name, entry in description["layers"].items():
        layer = _layer(model, name, entry, path)
        weight = None
        if entry["weight"] is not None:
            # Layers that share packed codes share the module, too.
            owner = description["tied"].get(f"{name}.packed_weight.packed", f"{name}.packed_weight.packed")
            if owner not in packed:
                with torch.device("meta"):
                    packed[owner] = PackedWeight(QuantSpec.from_dict(entry["weight"]), entry["shape"])
            weight = packed[owner]
        activation = entry["activation"]
        make_frozen_(layer, weight, activation and FrozenActivation(QuantSpec.from_dict(activation)))
    for name, owner in description["tied"].items():
        tensors[name] = tensors[owner]
    load_state(model, tensors, f"the artifact {path}", ArtifactError)
    return model.to(device).eval()


def is_artifact(folder: Path) -> bool:
    """Return whether a folder holds an artifact of ours, damaged or not."""
    try:
        return json.loads((folder / CONFIG).read_text())["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return (folder / CONFIG).is_file() and (folder / TENSORS).is_file()


def _describe(layer: nn.Module) -> dict[str, Any]:
    packed, activation = layer.packed_weight, layer.activation_quantizer
    return {
        "type": plain_type(layer).__name__,
        "shape": list(layer.weight.shape if packed is None else packed.shape),
        "weight": None if packed is None else packed.spec.to_dict(),
        "activation": None if activation is None else activation.spec.to_dict(),
    }


def _untie(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into tensors stored once and {name: the name that holds its tensor}."""
    owners: dict[tuple, str] = {}
    tensors, tied = {}, {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in owners:
            tied[name] = owners[key]
        else:
            owners[key] = name
            tensors[name] = tensor.contiguous()
    return tensors, tied


def _architecture_entries(architecture: dict[str, Any] | None) -> dict[str, Any]:
    """A transformers config lies at the top level, where transformers looks for it."""
    if architecture is None:
        return {"architecture": None}
    if "transformers" in architecture:
        return {key: value for key, value in architecture["transformers"].items() if key != "quantization_config"}
    return {"architecture": architecture}


def _build(config: dict[str, Any], path: str | Path) -> nn.Module:
    from .models import build

    if "architecture" not in config:
        return build({"transformers": {key: value for key, value in config.items() if key != "quantization_config"}})
    if config["architecture"] is None:
        raise ArtifactError(f"{path} does not name its architecture: use qat.load(path, model=YourModel())")
    return build(config["architecture"])


def _layer(model: nn.Module, name: str, entry: dict[str, Any], path: str | Path) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ArtifactError(f"{path} does not fit {type(model).__name__}: that has no layer {name!r}") from None
    if type(layer) not in FROZEN or type(layer).__name__ != entry["type"]:
        raise ArtifactError(
            f"{path} does not fit {type(model).__name__}: {name!r} is a {type(layer).__name__}, not a {entry['type']}"
        )
    if list(layer.weight.shape) != entry["shape"]:
        raise ArtifactError(
            f"{path} does not fit {type(model).__name__}: the weight of {name!r} is {list(layer.weight.shape)} there "
            f"and {entry['shape']} in the artifact"
        )
    return layer


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config and tensors of one and the same artifact, also while another is being put in its place."""
    for _ in range(5):
        text = _config_text(path)
        try:
            config = _parse(text, path)
            tensors = _load_tensors(path, config["quantization_config"]["files"])
        except ArtifactError:
            if _config_text(path) == text:
                raise
            continue
        if _config_text(path) == text:
            return config, tensors
    raise ArtifactError(f"{path} is being rewritten again and again: wait for its writer to finish")


def _config_text(path: Path) -> str:
    if not path.is_dir():
        raise ArtifactError(f"there is no artifact at {path}: give the folder that python -m qat.convert wrote")
    try:
        return (path / CONFIG).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"{path} is no artifact: it has no {CONFIG}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path / CONFIG} cannot be read: {error}; convert the checkpoint again") from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
        description = config["quantization_config"]
        method, version, checksum = (description.get(key) for key in ("quant_method", "version", "checksum"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{path / CONFIG} is damaged or not ours: convert the checkpoint again") from None
    if method != METHOD:
        raise ArtifactError(f"{path} is a {method!r} model, not an artifact of this package")
    if isinstance(version, int) and version > VERSION:
        raise ArtifactError(
            f"{path} has artifact version {version}, this package reads up to {VERSION}: upgrade it "
            f"(the artifact was written by version {description.get('qat_version')})"
        )
    if version != VERSION or checksum != _checksum(config):
        raise ArtifactError(f"{path / CONFIG} is damaged (its checksum does not match): convert the checkpoint again")
    return config


def _checksum(config: dict[str, Any]) -> str:
    description = {key: value for key, value in config["quantization_config"].items() if key != "checksum"}
    canonical = json.dumps({**config, "quantization_config": description}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error


def _load_tensors(path: Path, files: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, expected in files.items():
        if Path(name).name != name:
            raise ArtifactError(f"{path / CONFIG} names a file outside its folder: {name!r}")
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"{file} is missing: convert the checkpoint again")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise ArtifactError(
                f"{file} has {size} bytes instead of {expected['bytes']}: it was cut short or changed; copy it "
                "again or convert the checkpoint again"
            )
        if _sha256(file) != expected["sha256"]:
            raise ArtifactError(f"{file} is damaged (its SHA-256 does not match): copy it again or convert again")
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file} cannot be read: {error}") from None
    return tensors
