"""What the test_mutants_* files share: each check of the core can fail.

It is made to, on a copy of the module under test with one line made wrong. A mutant is a module's source with one
substitution, executed under the module's own package. Its text must occur exactly once: when the source moves on, the
mutant fails until it is brought along. Unchanged copies pass every check.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

TESTS = Path(__file__).parent


class Mutant(NamedTuple):
    """A wrong line, and the check that notices."""

    wrong: str
    module: str
    text: str | tuple[str, ...]
    replacement: str | tuple[str, ...]
    check: Callable[[types.ModuleType], None]


def load_checks(name):
    """Import tests/<name>.py, which is in no package. A property that fails is not made to fail more simply."""
    spec = importlib.util.spec_from_file_location(f"checks_of_{name}", TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    profile = hypothesis.settings.get_current_profile_name()
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutants", hypothesis.settings.default, phases=phases)
    hypothesis.settings.load_profile("mutants")
    try:
        spec.loader.exec_module(module)
    finally:
        hypothesis.settings.load_profile(profile)
    return module


def mutated(monkeypatch, name, texts=(), replacements=()):
    """Return a copy of a module, executed with its text substituted."""
    original = importlib.import_module(name)
    source = Path(original.__file__).read_text()
    for text, replacement in zip(texts, replacements, strict=True):
        assert source.count(text) == 1, f"{text!r} occurs {source.count(text)} times in {name}: bring the mutant along"
        source = source.replace(text, replacement)
    copy = types.ModuleType(f"{name}_mutant")
    copy.__package__, copy.__file__ = original.__package__, original.__file__
    monkeypatch.setitem(sys.modules, copy.__name__, copy)  # dataclasses look their module up
    exec(compile(source, f"{name} (mutant)", "exec"), copy.__dict__)
    return copy


def must_notice(monkeypatch, mutant):
    """Fail unless the mutant's check fails on it."""
    one = isinstance(mutant.text, str)
    texts, replacements = ([mutant.text], [mutant.replacement]) if one else (mutant.text, mutant.replacement)
    module = mutated(monkeypatch, mutant.module, texts, replacements)
    with pytest.raises((AssertionError, pytest.fail.Exception)):  # the latter where pytest.raises sees no error
        mutant.check(module)


def modules(mutants):
    """Return the names of the modules that are mutated."""
    return sorted({mutant.module for mutant in mutants})


def must_pass(monkeypatch, module, mutants):
    """Fail unless an unchanged copy of a module passes every check of its mutants."""
    copy = mutated(monkeypatch, module)
    for check in {mutant.check for mutant in mutants if mutant.module == module}:
        check(copy)
