"""save and load: a frozen model as an artifact folder, written atomically and checked when read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from .ahead import compiled_ahead
from .atomic import atomic_folder
from .errors import StateError
from .formats import native
from .frozen_model import from_model, to_model
from .inputs import Inputs, described, example_like, misfit, tensors, unbound
from .unchanged import unchanged_on_error
from .wrappers import unwrapped


def save(
    model: nn.Module, out: str | Path, companions: str | Path | None = None, example: Inputs | None = None
) -> None:
    """Write a frozen model as an artifact folder; an artifact that stands there is replaced in one step.

    Args:
        model: frozen; an adapter of peft's on it goes into a folder of its own, ``adapter``.
        out: the folder.
        companions: a folder whose tokenizer and generation config go along.
        example: a batch of inputs, whose shapes, dtypes and ranges are kept: what ``python -m qat.convert out --to onnx
            --model package.module:function`` traces a network of the user's own with. Of a forward of several arguments
            a tuple of tensors, or a dict of them by name; the first axis of each is the batch.

    Raises:
        StateError: the model is not frozen, or the example is no batch or not what its forward takes.
        ArtifactError: ``out`` is no artifact and not empty, the model's state dict holds what no artifact does, or the
            disk is full or read-only; nothing is changed then.
    """
    quantized = from_model(model)
    if example is not None:
        if (what := misfit(example)) is not None:
            none = any(part is None for part in tensors(example))
            raise StateError(
                f"example={what}: give a batch of inputs, a tensor such as torch.randn(1, 3, 32, 32), or a tuple of "
                "them or a dict by argument, each with the same batch as first axis"
                + ("; leave out what is None, in a dict" if none else "")
            )
        if (what := unbound(unwrapped(model), example)) is not None:
            raise StateError(
                f"example={described(example)}: {what}; give its arguments in their order in a tuple, or by name in a "
                "dict"
            )
        quantized.example = example_like(example)
    quantized.files = None if companions is None else Path(companions)
    with atomic_folder(out, native.is_artifact) as folder:
        native.write(quantized, folder)


def load(
    path: str | Path,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    tokens: Iterable[int] = (),
) -> nn.Module:
    """Read an artifact folder into a frozen model in eval mode.

    Args:
        path: the folder.
        model: an untrained instance of the architecture, swapped in place and filled; needed where the artifact does
            not name an architecture that this package or transformers can build. It may lie on the meta device, unless
            it has buffers of its own that no state dict holds; otherwise its tensors stay in memory until it is filled.
        device: where the model goes, and its codes before they are unpacked.
        tokens: numbers of tokens, batch times length, of calls to come, whose kernels are compiled while the model is
            read: ``(1, 512)`` for a prompt of 512 and what follows one by one. On NVIDIA GPUs, for 4-bit linear layers.

    Raises:
        StateError: the given model is prepared or frozen.
        ArtifactError: no artifact, a damaged one, one from a newer version, or one of another model. Files are checked
            while they are read; a given model is then as it was.
    """
    with (
        unchanged_on_error(model),
        native.reading(Path(path), device) as quantized,
        compiled_ahead(quantized, tokens, device),
    ):
        model = to_model(quantized, model).to(device)
    return model
