"""Eval mode for a while."""

import pytest
from torch import nn

import qat.modes


def check_each_module_gets_its_mode_back(modes):
    """Inside, all of a model is in eval mode; behind it each part is in its own, also behind an error."""
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with modes.in_eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError), modes.in_eval_mode(model):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before


def test_each_module_gets_its_mode_back():
    check_each_module_gets_its_mode_back(qat.modes)
