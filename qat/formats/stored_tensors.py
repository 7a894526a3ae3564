"""The tensors of safetensors files as mappings, read when asked for."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BF16": torch.bfloat16}
DTYPES |= {f"F{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)}
DTYPES |= {
    f"{kind[0].upper()}{bits}": getattr(torch, f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}

DTYPES["C64"] = torch.complex64

_turn = threading.Lock()


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, read when asked for.

    Threads may read side by side. The files stay open, so that an artifact which is replaced meanwhile goes on being
    read whole. They are read and not mapped, as ``safe_open`` does it, so that what has been converted does not stay in
    memory. ``metadata`` is the files' own, merged.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files, self.metadata = {}, {}
        for file in files:
            with safe_open(file, "pt"):
                pass  # its header and its length are right
            stream = file.open("rb")
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
            self.metadata.update(header.pop("__metadata__", {}))
            self._files.update({name: (stream, 8 + length, entry) for name, entry in header.items()})

    def __getitem__(self, name: str) -> Tensor:
        stream, start, entry = self._files[name]
        begin, end = entry["data_offsets"]
        data = torch.empty(end - begin, dtype=torch.uint8, device="cpu")  # whatever torch's default device is
        _read(stream, memoryview(data.numpy()), start + begin)
        return data.view(DTYPES[entry["dtype"]]).view(entry["shape"])

    def __del__(self) -> None:
        """Close the files, of which Python would warn."""
        for stream in {stream for stream, _, _ in getattr(self, "_files", {}).values()}:
            stream.close()

    def header(self, name: str) -> tuple[list[int], str]:
        """Return a tensor's shape and its dtype as safetensors names it, without reading it."""
        entry = self._files[name][2]
        return entry["shape"], entry["dtype"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _read(stream: BinaryIO, target: memoryview, start: int) -> None:
    """Fill ``target`` from a place in a file, whose position threads would share."""
    if not hasattr(os, "preadv"):  # Windows
        with _turn:
            stream.seek(start)
            stream.readinto(target)
        return
    while len(target) and (count := os.preadv(stream.fileno(), [target], start)):
        target, start = target[count:], start + count
    if len(target):
        raise OSError(f"{stream.name} has become shorter while it was read")


class Selected(Mapping[str, Tensor]):
    """A mapping's view of some of its names."""

    def __init__(self, tensors: Mapping[str, Tensor], names: list[str]) -> None:
        self._tensors, self._names = tensors, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
