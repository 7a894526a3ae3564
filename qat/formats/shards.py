"""Write safetensors a shard at a time, in the layout that transformers and its kin read."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ArtifactError
from .stored_tensors import DTYPES

SHARD_BYTES = 4 * 2**30
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors and writes a shard when ``shard_bytes`` is reached; memory holds one shard at most.

    Each shard's header carries the metadata, sorted: the same tensors give the same bytes.

    Use as ``writer.add(name, tensor)`` any number of times, then ``writer.close()``.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES, metadata: dict[str, str] | None = None) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._metadata = {"format": "pt", **(metadata or {})}
        self._held: dict[str, Tensor] = {}
        self._places: set[int] = set()  # of what is held, in memory
        self._held_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor under a name that is new.

        Raises:
            ArtifactError: safetensors has no such dtype.
        """
        if tensor.dtype not in DTYPES.values():
            raise ArtifactError(f"{name!r} is {tensor.dtype}, which safetensors does not store: cast it")
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.shard_bytes:
            self._flush()
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        self._held[name] = tensor.clone() if size and place in self._places else tensor  # safetensors takes no views
        self._places.add(place)
        self._held_bytes += size
        self._total_bytes += size

    def close(self) -> list[str]:
        """Write what is left and the index, if there are several shards; return the tensor files' names.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.folder / SINGLE)
            return [SINGLE]
        names = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
        for index, name in enumerate(names):
            self._part(index).rename(self.folder / name)
        weight_map = {tensor: name for name, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1))
        return names

    def _part(self, index: int) -> Path:
        return self.folder / f"part-{index}"

    def _flush(self) -> None:
        file = self._part(len(self._shards))
        try:
            save_file(self._held, file, metadata=self._metadata)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        _sort_metadata(file)
        self._shards.append(list(self._held))
        self._held, self._places, self._held_bytes = {}, set(), 0


def _sort_metadata(file: Path) -> None:
    """Sort the metadata in a file's header in place: safetensors writes a hash map's order, another in each process."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()  # as long as theirs
        stream.seek(8)
        stream.write(text.ljust(length))
