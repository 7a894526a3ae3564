"""Our own artifact: config.json and safetensors, every file's length and SHA-256 in the config.

config.json holds the architecture (a transformers config at the top level, or a builder of ours under "architecture")
and, under "quantization_config", the layers' specs and what is tied. A layer NAME with a quantized weight stores
the parts of ``qat.stored_weight`` as ``NAME.packed_weight.PART``. One with a quantized input stores
``NAME.activation_quantizer.scale`` and, if asymmetric, ``NAME.activation_quantizer.zero_point``, unless it is rounded
as a runtime rounds it, which only the spec says. Nothing in it is executable: names are looked up in fixed tables only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .. import __version__
from ..errors import ArtifactError
from ..numerics import QuantizedTensor
from ..quantized_model import QuantizedLayer, QuantizedModel
from ..stored_weight import NAMES, layouts, misfit, parts_of, tensor_of
from .companions import copy_companions
from .digests import Digests, sha256
from .native_config import CONFIG, METHOD, VERSION, architecture_in, checksum, entries_of, parse, read_text
from .shards import ShardWriter
from .stored_tensors import Selected, StoredTensors

NOT_OURS = (LookupError, TypeError, ValueError, AttributeError)  # what a config of other keys and kinds ends in
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
            for part, tensor in parts_of(model.quantized(name)).items():
                shards.add(f"{name}.packed_weight.{part}", tensor)
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
    config = {**entries_of(model.architecture), "quantization_config": description}
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
        text = read_text(path)
        try:
            config = parse(text, path)
            tensors = _open_files(path, config["quantization_config"]["files"])
        except NOT_OURS as error:
            raise ArtifactError(f"{path / CONFIG} is none that this package writes: {error!r}") from error
        except ArtifactError:
            if read_text(path) == text:
                raise
            continue  # a mixture of two artifacts, the second of which is just being put in place
        digests = Digests(path, config["quantization_config"]["files"])
        if read_text(path) == text:  # so that both have opened the files that it describes
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


def _described(
    path: Path, config: dict[str, Any], tensors: StoredTensors, device: torch.device | str
) -> QuantizedModel:
    description = config["quantization_config"]
    layers = {name: QuantizedLayer.from_dict(values) for name, values in description["layers"].items()}
    _check_ties(layers, description["tied"], tensors)
    inside = set()
    for name, layer in layers.items():
        if layer.weight is not None and layer.tied is None:
            inside |= {f"{name}.packed_weight.{part}" for part in NAMES}
        if layer.has_activation_scale:
            inside |= {f"{name}.activation_quantizer.{part}" for part in ("scale", "zero_point")}

    def tensor(name: str) -> Tensor:
        if name not in tensors:
            raise ArtifactError(f"{path} holds no tensor {name!r}: convert the checkpoint again")
        return tensors[name]

    def stored(name: str) -> dict[str, Tensor]:
        spec, shape = layers[name].weight, layers[name].shape
        parts = {part: tensor(f"{name}.packed_weight.{part}") for part in layouts(spec, shape)}
        if (problem := misfit(parts, spec, shape)) is not None:
            raise ArtifactError(f"{path} is damaged in the layer {name!r}: {problem}")
        return parts

    def quantized(name: str) -> QuantizedTensor:
        parts = {part: value.to(device) for part, value in stored(name).items()}
        return tensor_of(parts, replace(layers[name].weight), layers[name].shape)

    return QuantizedModel(
        architecture_in(config),
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
