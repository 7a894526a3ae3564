"""config.json of our own artifact: what it says of the architecture, its version, and a checksum of all of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import ArtifactError

VERSION = 1
METHOD = "qat"
CONFIG = "config.json"


def checksum(config: dict[str, Any]) -> str:
    """Return the SHA-256 of a config without the checksum itself."""
    description = {key: value for key, value in config["quantization_config"].items() if key != "checksum"}
    canonical = json.dumps({**config, "quantization_config": description}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def entries_of(architecture: dict[str, Any] | None) -> dict[str, Any]:
    """Return an architecture's entries: a transformers config lies at the top level, where transformers looks."""
    if architecture is not None and "transformers" in architecture:
        return {key: value for key, value in architecture["transformers"].items() if key != "quantization_config"}
    return {"architecture": architecture}


def architecture_in(config: dict[str, Any]) -> dict[str, Any] | None:
    """Undo ``entries_of``."""
    if "architecture" in config:
        return config["architecture"]
    return {"transformers": {key: value for key, value in config.items() if key != "quantization_config"}}


def read_text(path: Path) -> str:
    """Return the config of the artifact in a folder, as it is now.

    Raises:
        ArtifactError: there is no such folder, or no config in it that can be read.
    """
    if not path.is_dir():
        raise ArtifactError(f"there is no artifact at {path}: give the folder that python -m qat.convert wrote")
    try:
        return (path / CONFIG).read_text(encoding="utf-8")
    except FileNotFoundError:
        fix = f"; it is a run's folder: give {path / 'artifact'}" if (path / "last.ckpt").exists() else ""
        if fix and not (path / "artifact").exists():
            fix += f", which python -m qat.convert {path / 'last.ckpt'} --out {path / 'artifact'} makes"
        raise ArtifactError(f"{path} is no artifact: it has no {CONFIG}{fix}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path / CONFIG} cannot be read: {error}; convert the checkpoint again") from None


def parse(text: str, path: Path) -> dict[str, Any]:
    """Return what ``read_text`` has read, checked.

    Raises:
        ArtifactError: it is another tool's, of a newer version, or damaged.
    """
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
