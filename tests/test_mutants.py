"""Mutants themselves: one whose text is gone is no mutant. They are in test_mutants_of_*.py."""

import pytest
from mutants import Mutant, must_notice, mutated


def test_a_mutant_whose_text_is_gone_fails(monkeypatch):
    with pytest.raises(AssertionError, match=r"occurs 0 times in qat.packing: bring the mutant along"):
        mutated(monkeypatch, "qat.packing", ["text that is not there"], [""])


def test_a_mutant_that_no_check_notices_fails(monkeypatch):
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        must_notice(monkeypatch, Mutant("survives", "qat.packing", "return packed\n", "return packed  # same\n", id))
