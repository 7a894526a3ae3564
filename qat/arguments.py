"""Values that a config or a file gives, against the type hints of what takes them. No torch in here."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}


def wrong_types(target: Callable[..., Any], values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, what to give instead) for every value that cannot be what the target's parameter says.

    Numbers, booleans, texts, null, and lists of them are compared; a hint that says more, or none, takes anything. A
    parameter's default fits in any case.

    Args:
        target: a class or a function.
        values: by the names of its parameters.
    """
    hints, defaults = {}, {}
    for called in [c.__init__ for c in reversed(target.__mro__)] if inspect.isclass(target) else [target]:
        try:  # a class may hand **kwargs to its bases
            hints |= typing.get_type_hints(called)
            defaults |= {name: parameter.default for name, parameter in inspect.signature(called).parameters.items()}
        except (NameError, TypeError, ValueError):  # hints that cannot be evaluated, or a callable without any
            continue
    for name, value in values.items():
        if name not in hints or defaults.get(name, inspect.Parameter.empty) is value:
            continue
        choices = list(_choices(hints[name]))
        if (instead := _words(choices)) and not any(_fits(value, choice) for choice in choices):
            yield name, instead


def _choices(hint: Any) -> Iterator[Any]:
    """Yield the members of a union, however nested."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _choices(member)
    else:
        yield hint


def _fits(value: Any, choice: Any) -> bool:
    origin = typing.get_origin(choice)
    if origin is typing.Literal:
        return value in typing.get_args(choice)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list) and all(
            any(_fits(item, one) for member in typing.get_args(choice) if member is not ... for one in _choices(member))
            for item in value
        )
    if isinstance(value, dict) or origin is not None or not isinstance(choice, type):
        return True
    if choice in (int, float):
        return not isinstance(value, bool) and isinstance(value, int if choice is int else int | float)
    return isinstance(value, choice) or (issubclass(choice, Enum) and isinstance(value, str))


def _words(choices: list[Any]) -> str:
    """Return what a user calls the types; nothing for those that no config file can hold."""
    words = []
    for choice in choices:
        origin = typing.get_origin(choice)
        if origin is typing.Literal:
            words += map(str, typing.get_args(choice))
        elif origin in (list, tuple, Sequence):
            each = _words([one for member in typing.get_args(choice) for one in _choices(member)])
            words += [f"a list, each {each}"] if each else []
        elif choice in WORDS and not (choice is int and float in choices):
            words.append(WORDS[choice])
    return " or ".join(dict.fromkeys(words))
