"""What can be chosen about an init that reads data."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SpecError


@dataclass
class Options:
    """Args.

    damping: GPTQ's first share of the Hessian's mean diagonal to add to it; doubled while it cannot be factorised.
    act_order: GPTQ rounds the columns of the largest inputs first, with step sizes fixed before (static groups).
    steps: of training a block, for SignRound and block-wise LSQ.
    lr: of the same; None for 1/steps (SignRound), or for 0.02 step sizes a step (block-wise LSQ).
    allow_fallback: where a layer was not reached, or too little, or its Hessian cannot be factorised, round it to the
        least squared error, and count and print it. False makes it an error.
    folder: keep finished blocks there, to go on after a kill; None keeps nothing.
    device: where one block at a time is worked on, such as "cuda" for a model in CPU memory; None: where it is.
    """

    damping: float = 0.01
    act_order: bool = True
    steps: int = 200
    lr: float | None = None
    allow_fallback: bool = False
    folder: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise SpecError(f"steps={self.steps!r}: give a whole number, 0 or more")
        for name, value in (("damping", self.damping), ("lr", self.lr)):
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise SpecError(f"{name}={value!r}: give a positive number")
        for name in ("act_order", "allow_fallback"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name}={getattr(self, name)!r}: give true or false")
