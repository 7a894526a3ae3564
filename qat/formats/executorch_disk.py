"""Tensors of a program in files, mapped: ExecuTorch's compiler wants them all at once, and reads each for a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
        file, self._count = self._folder / str(self._count), self._count + 1
        tensor.numpy().tofile(file)
        return torch.from_file(str(file), shared=False, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)

    def keep_(self, module: nn.Module) -> nn.Module:
        """Put a lowered layer's codes and weights into files, in place; return it."""
        for owner in module.modules():
            for store in (owner._parameters, owner._buffers):
                for name, tensor in store.items():
                    if hasattr(tensor, "qdata"):  # torchao's
                        tensor.qdata = self.keep(tensor.qdata)
                    elif tensor is not None:
                        kept = self.keep(tensor)
                        store[name] = nn.Parameter(kept, False) if isinstance(tensor, nn.Parameter) else kept
        return module

    def floats(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return float tensors in float32, and others as they are, each put into a file when it is asked for."""
        return _Mapped(tensors, lambda tensor: self.keep(tensor.float() if tensor.is_floating_point() else tensor))


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
