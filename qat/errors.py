"""The errors we raise on purpose. Each message names the thing that is wrong and what to type instead."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class QATError(Exception):
    """Base of every error this package raises on purpose."""


class SpecError(QATError, ValueError):
    """A QuantSpec that cannot exist."""


class PolicyError(QATError, ValueError):
    """A policy or one of its rules that cannot be honoured for this model."""


class LayerError(QATError, ValueError):
    """A layer that cannot be quantized as asked."""


class StateError(QATError, RuntimeError):
    """A model in the wrong state: prepared twice, a scale never initialised, not prepared at all."""


class CheckpointError(QATError, RuntimeError):
    """A training checkpoint that cannot be read or does not fit."""


class ArtifactError(QATError, RuntimeError):
    """An artifact that cannot be written or read, is damaged, or does not fit the model."""


class DataError(QATError, RuntimeError):
    """Data that is missing or not what was promised."""


class CalibrationError(QATError, RuntimeError):
    """Calibration data from which a layer cannot be quantized as asked."""


class ModelError(QATError, ValueError):
    """An architecture that cannot be built."""


class TrainingError(QATError, RuntimeError):
    """A training run that cannot go on."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, or the known words where none is close."""
    known = list(dict.fromkeys(known))
    close = get_close_matches(word, known, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {some_of(list(map(repr, known)), 30)})" if known else ""


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first of some names for a message, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(said: BaseException | str) -> str:
    """Return the first line of what an error or a text says, or the error's class where it says nothing."""
    return (str(said).strip() or type(said).__name__).splitlines()[0]


def one_line(error: QATError | PermissionError) -> str:
    """Return what a command prints of an error of ours, or of a path that its user may not use."""
    if isinstance(error, PermissionError) and not isinstance(error, QATError):
        return f"{error.filename}: {error.strerror}; let this user in, or give another path"
    return str(error)
