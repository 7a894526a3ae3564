"""What a resumed run refuses of the checkpoint that it would go on from."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from ..policy import QuantPolicy

START = ("init",)  # keys of a policy that only a start reads


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
