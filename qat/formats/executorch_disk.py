"""A program's tensors in files: those that ExecuTorch's compiler reads, mapped, and those that it has made of them.

The compiler wants all tensors at once, and reads each for a moment. What it makes of them it keeps until the program is
written; its serialiser takes a file in the place of bytes (``FileBackedData``, since 1.5), but its own backends hand it
bytes, so two names in its modules are replaced while a program is lowered.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LEAST_BYTES = 2**16  # below, a tensor stays in memory


class OnDisk:
    """A folder whose files hold tensors, for as long as it is there."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a tensor whose values are read from a file when they are used; a small one as it is."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.nbytes < LEAST_BYTES:
            return tensor
        file = self._next()
        tensor.numpy().tofile(file)
        return torch.from_file(str(file), shared=False, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)

    def keep_bytes(self, content: Any) -> Any:
        """Return bytes as ExecuTorch's ``FileBackedData``; few bytes, or what lies in a file already, as it is."""
        from executorch.exir._serialize._cord import FileBackedData

        if not isinstance(content, bytes) or len(content) < LEAST_BYTES:
            return content
        file = self._next()
        file.write_bytes(content)
        give_back()
        return FileBackedData(str(file))

    def keep_(self, module: nn.Module) -> nn.Module:
        """Put a lowered layer's codes and weights into files, in place; return it."""
        for owner in module.modules():
            for store in (owner._parameters, owner._buffers):
                for name, tensor in store.items():
                    if hasattr(tensor, "qdata"):  # torchao's
                        for part in ("qdata", "scale", "zero_point"):
                            setattr(tensor, part, self.keep(getattr(tensor, part)))
                    elif tensor is not None:
                        kept = self.keep(tensor)
                        store[name] = nn.Parameter(kept, False) if isinstance(tensor, nn.Parameter) else kept
        give_back()
        return module

    def floats(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return float tensors in float32, and others as they are, each put into a file when it is asked for."""
        return _Mapped(tensors, lambda tensor: self.keep(tensor.float() if tensor.is_floating_point() else tensor))

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """While it is open, put into files what ExecuTorch makes of a program's constants.

        XNNPACK's constants go to a ``NamedDataStore`` of its module, the others to a ``Buffer`` of the emitter's. The
        program can be written for as long as the folder is there.
        """
        from executorch.backends.xnnpack import xnnpack_preprocess
        from executorch.exir.emit import _emitter

        disk, buffer = self, _emitter.Buffer

        class Store(xnnpack_preprocess.NamedDataStore):
            def add_named_data(self, key: str, data: Any, *args: Any, **kwargs: Any) -> None:
                super().add_named_data(key, disk.keep_bytes(data), *args, **kwargs)

        before = xnnpack_preprocess.NamedDataStore
        xnnpack_preprocess.NamedDataStore = Store
        _emitter.Buffer = lambda storage: buffer(storage=disk.keep_bytes(storage))
        try:
            yield
        finally:
            xnnpack_preprocess.NamedDataStore, _emitter.Buffer = before, buffer

    def _next(self) -> Path:
        self._count += 1
        return self._folder / str(self._count)


class _Mapped(Mapping[str, Tensor]):
    def __init__(self, tensors: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]) -> None:
        self._tensors, self._function = tensors, function

    def __getitem__(self, name: str) -> Tensor:
        return self._function(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def share_when_copied_(program: Any) -> None:
    """Let copies of a ``torch.export.ExportedProgram`` have its own tensors.

    ExecuTorch copies the tensors of every part that a backend takes before it compiles the first, and writes into none.
    """
    for tensor in [*program.state_dict.values(), *program.constants.values()]:
        if isinstance(tensor, Tensor):
            tensor.__deepcopy__ = lambda memo, tensor=tensor: tensor


def give_back() -> None:
    """Return freed memory to the system; glibc keeps blocks below 32 MiB, which came to 100 MB for each large layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
