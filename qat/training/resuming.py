"""What a resumed run refuses of the checkpoint that it would go on from, and what it takes from its own overrides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..errors import CheckpointError
from ..policy import QuantPolicy

START = ("init",)  # keys of a policy that only a start reads
PARTS = ("qat", "rng", "loops", "optimizer_states")  # of a checkpoint that training can go on from
OF_STATE = ("amsgrad", "centered")  # options of an optimizer without which it has kept less
OF_SPEED = ("fused", "foreach", "capturable", "differentiable")  # and those that go with how it keeps its state


def require_training_state(checkpoint: dict[str, Any]) -> None:
    """Raise CheckpointError where a checkpoint is not one of ours, or was saved for its weights alone."""
    missing = [part for part in PARTS if part not in checkpoint]
    if missing:
        raise CheckpointError(
            f"the checkpoint to resume has no {missing[0]}: it is not of python -m qat.train, or holds weights alone; "
            "one of ours can start another run with name=OTHER init_from=CHECKPOINT"
        )


def options_of(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the options of an optimizer's groups, sequences as lists."""
    return [{key: _plain(value) for key, value in group.items() if key != "params"} for group in groups]


def require_same_optimizer(stored: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
    """Raise CheckpointError where a checkpoint has the state of another optimizer, which would not be understood."""
    for before, after in zip(stored, now, strict=False):
        theirs, ours = before.keys() - after.keys(), after.keys() - before.keys()
        changed = [key for key in OF_STATE if before.get(key, after.get(key)) != after.get(key, before.get(key))]
        if (theirs and ours) or changed:  # a newer torch may have more options, and no fewer
            differs = changed[0] if changed else f"{sorted(theirs)[0]}, and not {sorted(ours)[0]}"
            raise CheckpointError(
                f"the run to resume has another optimizer (with {differs}): resume with the optim it had, or start "
                "another from it with name=OTHER init_from=CHECKPOINT"
            )


def take_options(optimizer: Optimizer, scheduler: LambdaLR | None, asked: list[dict[str, Any]]) -> list[str]:
    """Give a restored optimizer the options of this run's overrides; return what changed, for people.

    torch restores options with the state, and the learning rate that the schedule starts from: a lower optim.lr, which
    a diverged run is told to take, would change nothing.
    """
    changed: dict[str, list[str]] = {}
    for at, (group, options) in enumerate(zip(optimizer.param_groups, asked, strict=True)):
        for key, value in options.items():
            if key in ("lr", *OF_SPEED) or key not in group or (was := _plain(group[key])) == value:
                continue  # the learning rate now follows from the initial one
            what = f"{'lr' if key == 'initial_lr' else key} {was} -> {value}"
            changed.setdefault(what, []).append(str(group.get("name", at)))
            group[key] = value
            if key == "initial_lr" and scheduler is not None:
                scheduler.base_lrs[at] = value
                group["lr"] = value * scheduler.lr_lambdas[at](scheduler.last_epoch)
    return [f"{what} ({', '.join(names)})" for what, names in changed.items()]


def take_order(stored: dict[str, Any], now: dict[str, Any], within: bool) -> list[str]:
    """Return how the order of training examples has changed since a checkpoint, for people.

    Args:
        stored, now: ``order()`` of a loader; {} of a checkpoint that does not say.
        within: it was saved within an epoch, whose batches that were read are skipped by their number.

    Raises:
        CheckpointError: the seed is another one.
    """
    seed = "data.seed"
    if stored.get(seed) != now.get(seed) and seed in stored:
        raise CheckpointError(
            f"the run to resume has {seed}={stored[seed]}, and this one {now[seed]}: resume with that, or with the "
            f"seed={stored[seed]} that it follows, or start another run with name=OTHER"
        )
    changed = [f"{key} {stored[key]} -> {value}" for key, value in now.items() if stored.get(key, value) != value]
    missed = ": of this epoch some examples come twice, or not at all" if within else ""
    return [f"{', '.join(changed)}{missed}; to go on to the bit, resume with what it had"] if changed else []


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def require_same_policy(stored: dict[str, Any], policy: QuantPolicy) -> None:
    """Raise CheckpointError where a checkpoint has another policy: its step sizes would go on, on another grid."""
    before, now = QuantPolicy.from_dict(stored).to_dict(), policy.to_dict()
    changed = [key for key in now if now[key] != before[key] and key not in START]
    if changed:
        was, is_now = before[changed[0]], now[changed[0]]
        raise CheckpointError(
            f"the run to resume has policy.{changed[0]}={was}, and this one {is_now}: resume with the overrides it "
            "had, or start another from it with name=OTHER init_from=CHECKPOINT"
        )


def other_model(error: RuntimeError) -> CheckpointError:
    """Return the error for a state dict that torch finds not to fit, with the first thing that does not."""
    found = str(error).split("\n\t")
    first = found[min(1, len(found) - 1)].split(". ")[0].strip()
    return CheckpointError(
        f"the run to resume has another model ({first:.200}): resume with the overrides it had, or start another with "
        "name=OTHER"
    )
