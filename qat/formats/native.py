"""Our own artifact: config.json and safetensors, every file's length and SHA-256 in the config.

config.json holds the architecture (a transformers config at the top level, or a builder of ours under "architecture")
and, under "quantization_config", the layers' specs and what is tied. A layer NAME with a quantized weight stores
``NAME.packed_weight.packed`` (uint8, see ``qat.packing``), ``NAME.packed_weight.scale``, if asymmetric
``NAME.packed_weight.zero_point`` and, of a custom codebook, ``NAME.packed_weight.levels``; of ``nf4_double`` the parts
``NAME.packed_weight.scale_codes``, ``_factor``, ``_offset`` and ``_levels`` instead of the scale. One with a quantized
input stores ``NAME.activation_quantizer.scale`` and, if asymmetric, ``NAME.activation_quantizer.zero_point``, unless it
is rounded as a runtime rounds it, which only the spec says. Nothing in it is executable: names are looked up in fixed
tables only.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .. import __version__
from ..double_quantization import PARTS, NestedScale
from ..errors import ArtifactError
from ..numerics import QuantizedTensor
from ..packing import pack, unpack
from ..quantized_model import QuantizedLayer, QuantizedModel
from ..spec import Codebook
from .companions import copy_companions
from .digests import Digests, sha256
from .shards import ShardWriter
from .stored_tensors import Selected, StoredTensors

VERSION = 1
NOT_OURS = (LookupError, TypeError, ValueError, AttributeError)  # what a config of other keys and kinds ends in
METHOD = "qat"
CONFIG = "config.json"
SHARD_BYTES = 2**29  # files are checked side by side


def write(model: QuantizedModel, folder: Path) -> list[str]:
    """Write a model into an empty folder, a shard at a time; its tokenizer, generation files and adapters go with it.

    Returns:
        No notes: nothing about our own runtime needs saying.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    copy_companions(model, folder)
    shards = ShardWriter(folder, SHARD_BYTES)
    for name, layer in model.layers.items():
        if layer.weight is not None and layer.tied is None:
            tensor = model.quantized(name)
            shards.add(
                f"{name}.packed_weight.packed", pack(tensor.codes.flatten(1), tensor.spec.bits, -tensor.spec.q_n)
            )
            if tensor.nested is None:
                shards.add(f"{name}.packed_weight.scale", tensor.scale)
            for part in PARTS if tensor.nested is not None else ():
                shards.add(f"{name}.packed_weight.scale_{part}", getattr(tensor.nested, part))
            if tensor.zero_point is not None:
                shards.add(f"{name}.packed_weight.zero_point", tensor.zero_point)
            if tensor.spec.codebook is Codebook.custom:
                shards.add(f"{name}.packed_weight.levels", tensor.levels)
        if layer.has_activation_scale:
            shards.add(f"{name}.activation_quantizer.scale", model.activation_scale(name))
            if not layer.activation.symmetric:
                shards.add(f"{name}.activation_quantizer.zero_point", model.activation_zero_point(name))
    for name in model.dense:
        shards.add(name, model.dense[name])
    names = shards.close()
    sums = dict(zip(names, sha256([folder / name for name in names]), strict=True))
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sums[name]} for name in names}
    description = {
        "quant_method": METHOD,
        "version": VERSION,
        "qat_version": __version__,
        "layers": {name: layer.to_dict() for name, layer in model.layers.items()},
        "tied": model.tied,
        "example": model.example,
        "files": files,
    }
    config = {**_architecture_entries(model.architecture), "quantization_config": description}
    description["checksum"] = checksum(config)
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    return []


def read(path: Path, device: torch.device | str = "cpu") -> QuantizedModel:
    """Check a folder and open it; tensors are read when asked for.

    Args:
        path: the folder.
        device: where quantized tensors are unpacked, and stay.

    Raises:
        ArtifactError: no artifact, a damaged one, or one from a newer version.
    """
    with reading(path, device) as model:
        return model


@contextmanager
def reading(path: Path, device: torch.device | str = "cpu") -> Iterator[QuantizedModel]:
    """Open a folder for a ``with`` block, at whose end it has been checked: its tensors are read meanwhile.

    What the block made of them is right if it ends without an error.

    Raises:
        ArtifactError: as ``read``; of a damaged file also in the place of an error from inside the block.
    """
    model, digests = _opened(path, device)
    try:
        yield model
    finally:
        digests.check()


def _opened(path: Path, device: torch.device | str) -> tuple[QuantizedModel, Digests]:
    for _ in range(5):
        text = _config_text(path)
        try:
            config = _parse(text, path)
            tensors = _open_files(path, config["quantization_config"]["files"])
        except NOT_OURS as error:
            raise ArtifactError(f"{path / CONFIG} is none that this package writes: {error!r}") from error
        except ArtifactError:
            if _config_text(path) == text:
                raise
            continue  # a mixture of two artifacts, the second of which is just being put in place
        digests = Digests(path, config["quantization_config"]["files"])
        if _config_text(path) == text:  # so that both have opened the files that it describes
            try:
                return _described(path, config, tensors, device), digests.start()
            except NOT_OURS as error:
                digests.close()
                raise ArtifactError(f"{path / CONFIG} is none that this package writes: {error!r}") from error
        digests.close()
    raise ArtifactError(f"{path} is being rewritten again and again: wait for its writer to finish")


def verify(folder: Path, model: QuantizedModel) -> list[tuple[str, str]]:
    """Read an artifact back and compare every code, scale, zero point and other tensor; return the rows of a table.

    Raises:
        ArtifactError: anything differs.
    """
    stored = read(folder)
    if stored.layers != model.layers or set(stored.dense) != set(model.dense):
        raise ArtifactError(f"{folder} holds other layers or tensors than its source")
    codes = 0
    for name, layer in model.layers.items():
        pairs = []
        if layer.weight is not None and layer.tied is None:
            here, there = model.quantized(name), stored.quantized(name)
            pairs = [(here.codes, there.codes), (here.scale, there.scale), (here.zero_point, there.zero_point)]
            pairs.append((here.levels, there.levels))
            codes += here.codes.numel()
        if layer.has_activation_scale:
            pairs.append((model.activation_scale(name), stored.activation_scale(name)))
            if not layer.activation.symmetric:
                pairs.append((model.activation_zero_point(name), stored.activation_zero_point(name)))
        if not all(a is b or torch.equal(a.cpu(), b) for a, b in pairs):
            raise ArtifactError(f"{folder} differs from its source in the layer {name!r}")
    for name in model.dense:
        if not torch.equal(model.dense[name].cpu(), stored.dense[name]):
            raise ArtifactError(f"{folder} differs from its source in the tensor {name!r}")
    return [("codes", f"0 of {codes:,} differ"), ("scales and other tensors", "equal to the bit")]


def is_artifact(folder: Path) -> bool:
    """Return whether a folder holds an artifact of ours, damaged or not."""
    try:
        return json.loads((folder / CONFIG).read_text())["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return (folder / CONFIG).is_file() and any(folder.glob("*.safetensors"))


def checksum(config: dict[str, Any]) -> str:
    """Return the SHA-256 of a config without the checksum itself."""
    description = {key: value for key, value in config["quantization_config"].items() if key != "checksum"}
    canonical = json.dumps({**config, "quantization_config": description}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _described(
    path: Path, config: dict[str, Any], tensors: StoredTensors, device: torch.device | str
) -> QuantizedModel:
    description = config["quantization_config"]
    layers = {name: QuantizedLayer.from_dict(values) for name, values in description["layers"].items()}
    _check_ties(layers, description["tied"], tensors)
    inside = set()
    for name, layer in layers.items():
        if layer.weight is not None and layer.tied is None:
            parts = ("packed", "scale", "zero_point", "levels", *(f"scale_{part}" for part in PARTS))
            inside |= {f"{name}.packed_weight.{part}" for part in parts}
        if layer.has_activation_scale:
            inside |= {f"{name}.activation_quantizer.{part}" for part in ("scale", "zero_point")}

    def tensor(name: str) -> Tensor:
        if name not in tensors:
            raise ArtifactError(f"{path} holds no tensor {name!r}: convert the checkpoint again")
        return tensors[name]

    def stored(name: str) -> dict[str, Tensor]:
        spec = layers[name].weight
        double = spec.codebook is Codebook.nf4_double
        names = ["packed", *((f"scale_{part}" for part in PARTS) if double else ["scale"])]
        names += ["zero_point"] * (not spec.symmetric) + ["levels"] * (spec.codebook is Codebook.custom)
        return {part: tensor(f"{name}.packed_weight.{part}") for part in names}

    def quantized(name: str) -> QuantizedTensor:
        layer, parts = layers[name], {part: value.to(device) for part, value in stored(name).items()}
        spec, columns = replace(layer.weight), math.prod(layer.shape[1:])
        codes = unpack(parts["packed"], spec.bits, columns, -spec.q_n).view(layer.shape)
        if spec.codebook is Codebook.nf4_double:
            nested = NestedScale(*(parts[f"scale_{part}"] for part in PARTS))
            return QuantizedTensor(codes, nested.values(), spec, None, None, nested)
        return QuantizedTensor(codes, parts["scale"], spec, parts.get("zero_point"), parts.get("levels"))

    return QuantizedModel(
        _architecture(config),
        layers,
        quantized,
        lambda name: tensor(f"{name}.activation_quantizer.scale"),
        Selected(tensors, [name for name in tensors if name not in inside]),
        description["tied"],
        f"the artifact {path}",
        description.get("example"),
        path,
        activation_zero_point=lambda name: tensor(f"{name}.activation_quantizer.zero_point"),
        stored=stored,
        device=device,
    )


def _check_ties(layers: dict[str, QuantizedLayer], tied: dict[str, str], tensors: StoredTensors) -> None:
    """Raise KeyError where a layer or a tensor shares what is not there: the layer that owns a weight comes first."""
    owners = set()
    for name, layer in layers.items():
        if layer.tied is None:
            owners.add(name)
        elif layer.tied not in owners:
            raise KeyError(layer.tied)
    for owner in tied.values():
        if owner not in tensors:
            raise KeyError(owner)


def _architecture_entries(architecture: dict[str, Any] | None) -> dict[str, Any]:
    """A transformers config lies at the top level, where transformers looks for it."""
    if architecture is not None and "transformers" in architecture:
        return {key: value for key, value in architecture["transformers"].items() if key != "quantization_config"}
    return {"architecture": architecture}


def _architecture(config: dict[str, Any]) -> dict[str, Any] | None:
    if "architecture" in config:
        return config["architecture"]
    return {"transformers": {key: value for key, value in config.items() if key != "quantization_config"}}


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
        method, version, stored = (description.get(key) for key in ("quant_method", "version", "checksum"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{path / CONFIG} is damaged or not ours: convert the checkpoint again") from None
    if method != METHOD:
        raise ArtifactError(f"{path} is a {method!r} model, not an artifact of this package")
    if isinstance(version, int) and version > VERSION:
        raise ArtifactError(
            f"{path} has artifact version {version}, this package reads up to {VERSION}: upgrade it "
            f"(the artifact was written by version {description.get('qat_version')})"
        )
    if version != VERSION or stored != checksum(config):
        raise ArtifactError(f"{path / CONFIG} is damaged (its checksum does not match): convert the checkpoint again")
    return config


def _open_files(path: Path, files: dict[str, dict[str, Any]]) -> StoredTensors:
    for name, expected in files.items():
        if Path(name).name != name:
            raise ArtifactError(f"{path / CONFIG} names a file outside its folder: {name!r}")
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"{file} is missing: convert the checkpoint again")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise ArtifactError(
                f"{file} has {size} bytes instead of {expected['bytes']}: it was cut short or changed; copy it again "
                "or convert the checkpoint again"
            )
    try:
        return StoredTensors([path / name for name in files])
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; copy it again or convert the checkpoint again") from None
