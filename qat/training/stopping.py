"""SIGTERM where a run has several ranks: all of them stop after the same step, which is saved."""

from __future__ import annotations

import signal
from types import FrameType

from lightning.pytorch import Trainer


def agree_on_sigterm(trainer: Trainer) -> None:
    """Let a SIGTERM that any rank gets be known to all of them from the start of the next batch on.

    Lightning broadcasts it from within the signal's handler, in between what the other ranks exchange at that moment:
    they end in an error, or wait for one another, and what was not saved yet is lost. Its own broadcast at the start of
    each batch, of what rank 0 knows, would then end the run before its last step is saved. This one takes its place.
    """
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    if trainer.world_size == 1 or not hasattr(loop, "_broadcast_sigterm_tensor"):
        return
    before, came = connector._original_handlers.get(signal.SIGTERM), []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if callable(before):
            before(number, frame)

    def agree() -> None:
        if trainer.strategy.reduce_boolean_decision(bool(came), all=False):
            connector.received_sigterm = True

    signal.signal(signal.SIGTERM, note)
    loop._broadcast_sigterm_tensor = agree
