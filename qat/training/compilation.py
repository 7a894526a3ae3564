"""torch.compile in a training run: networks whole, or their repeated block and the loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import TrainingError, did_you_mean
from ..ptq.units import repeated
from .losses import training_loss

BLOCKS = "blocks"  # our own mode


class Compilation:
    """Compiles what a run trains with, while it trains.

    Args:
        mode: of ``torch.compile``; "blocks" for the block that a model repeats and the loss, which takes seconds where
            the whole takes minutes; None for none.

    Attributes:
        loss: ``training_loss``, compiled while blocks are.

    Raises:
        TrainingError: an unknown mode.
    """

    def __init__(self, mode: str | None) -> None:
        if mode not in (None, BLOCKS):
            check_compile_mode(mode)
        self._mode, self._blocks, self.loss = mode, [], training_loss

    def start(self, networks: Iterable[nn.Module]) -> str | None:
        """Compile networks at their first forward, in place; return what to say of it, None where nothing is."""
        if self._mode is None:
            return None
        by_block = self._mode == BLOCKS
        parts = [part for network in networks for part in (repeated(network) if by_block else [network])]
        for part in parts:
            part.compile(mode="default" if by_block else self._mode, dynamic=False)
        if by_block:
            self.loss, self._blocks = torch.compile(training_loss, dynamic=False), parts
            return "the repeated block and the loss, at the first step"
        return "the network, at the first step, which may take minutes"

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """Return the repeated blocks of a network that will be compiled, by itself or as a part of the whole."""
        return [] if self._mode is None else repeated(network)

    def begin_step(self) -> None:
        """Let CUDA graphs reuse the memory of the step before."""
        if self._mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()

    def pause(self) -> None:
        """Run blocks eagerly: in validation other shapes would each compile another graph."""
        if self._blocks:
            torch.compiler.set_stance("force_eager")

    def go_on(self) -> None:
        """Run compiled blocks again."""
        if self._blocks:
            torch.compiler.set_stance("default")

    def stop(self) -> None:
        """Leave the blocks as they were."""
        for block in self._blocks:
            block._compiled_call_impl = None
        self.loss, self._blocks = training_loss, []


def check_compile_mode(name: str) -> None:
    """Raise TrainingError unless ``torch.compile`` knows a mode of that name."""
    modes = torch._inductor.list_mode_options()
    if name not in modes:
        raise TrainingError(f"compile_mode={name!r} is unknown{did_you_mean(name, [*modes, BLOCKS])}")
