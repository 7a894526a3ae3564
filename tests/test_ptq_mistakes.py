"""Data, models and options that the starts which read calibration data refuse, or fall back on."""

import sys

import pytest
import torch
from ptq_models import QUICK, READ_DATA, language_model, mlp, prepared, tokens
from torch import nn

import qat
from qat.errors import CalibrationError, SpecError, StateError
from qat.models import build
from qat.ptq import Options


@pytest.mark.parametrize("init", READ_DATA)
@pytest.mark.parametrize("data", [[], [torch.zeros(0, 16, dtype=torch.long)]])
def test_no_data(init, data):
    with pytest.raises(CalibrationError, match="got no data: give it at least one batch"):
        qat.calibrate(prepared(language_model(), init), data)


@pytest.mark.parametrize("init", READ_DATA)
def test_one_token_repeated(init):
    with pytest.raises(CalibrationError, match="one token, 7, repeated"):
        qat.calibrate(prepared(language_model(), init), [torch.full((4, 16), 7)])


@pytest.mark.parametrize("init", ["gptq", "gptaq", "awq"])
def test_inputs_without_variety(init):
    x = torch.randn(1, 32) * torch.randn(100, 1)
    with pytest.raises(CalibrationError, match="all 100 calibration inputs of '0' are multiples of one vector"):
        qat.calibrate(prepared(mlp(), init), [x])


@pytest.mark.parametrize("init", READ_DATA)
def test_nan(init):
    x = torch.randn(64, 32)
    x[5, 3] = float("nan")
    with pytest.raises(CalibrationError, match=r"NaN or infinity.*check the data and the model"):
        qat.calibrate(prepared(mlp(), init), [x])


@pytest.mark.parametrize("init", ["gptq", "gptaq"])
def test_too_little_data(init, capsys):
    x = [torch.randn(9, 32)]
    with pytest.raises(CalibrationError, match=r"9 calibration rows reached '0', which has 32 inputs.*allow_fallback"):
        qat.calibrate(prepared(mlp(), init), x)
    model = prepared(mlp(), init)
    qat.calibrate(model, x, options=Options(allow_fallback=True))
    printed = capsys.readouterr().out
    assert (
        f"{init}: fallbacks: 3, to the least squared error of the weight" in printed
        and "'0': 9 calibration rows" in printed
    )
    assert torch.equal(model[0].weight_quantizer.step_size, prepared(mlp(), "mse")[0].weight_quantizer.step_size)


class Rare(nn.Module):
    """A layer that no batch reaches."""

    def __init__(self):
        super().__init__()
        self.often, self.rare = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.often(x)


@pytest.mark.parametrize("init", READ_DATA)
def test_a_layer_that_is_never_reached(init, capsys):
    x = [torch.randn(64, 32)]
    with pytest.raises(CalibrationError, match=r"no calibration batch reached 'rare'.*allow_fallback=true"):
        qat.calibrate(prepared(Rare(), init), x, options=QUICK)
    model = prepared(Rare(), init)
    qat.calibrate(model, x, options=Options(steps=8, allow_fallback=True))
    assert "fallbacks: 1, to the least squared error of the weight\n  'rare'" in capsys.readouterr().out
    assert not model.rare.weight_quantizer.waits_for_data


@pytest.mark.parametrize("init", READ_DATA)
def test_a_weight_that_an_embedding_shares(init, capsys):
    """It is refused, or rounded where it is: the embedding does not move, and nothing is folded into it."""

    def tied():
        torch.manual_seed(0)
        sizes = {"vocabulary": 64, "width": 32, "depth": 2, "heads": 2, "context": 16}
        return build({"builder": "gpt", "args": {**sizes, "tie_embeddings": True}})

    message = r"the weight of 'lm_head' is also that of 'tokens'.*leave 'lm_head' out by a rule"
    with pytest.raises(CalibrationError, match=message):
        qat.calibrate(prepared(tied(), init), tokens(), options=QUICK)
    model = prepared(tied(), init)
    qat.calibrate(model, tokens(), options=Options(steps=8, allow_fallback=True))
    assert "fallbacks: 1" in capsys.readouterr().out
    assert torch.equal(model.tokens.weight, tied().tokens.weight)
    assert not model.lm_head.weight_quantizer.waits_for_data and model.lm_head.weight_quantizer.enabled


def test_nothing_rounds_to_nearest_before_calibration():
    model = prepared(mlp(), "gptq")
    with pytest.raises(StateError, match=r"'0' was never initialised: init=gptq reads data: run qat.calibrate"):
        model(torch.randn(2, 32))
    with pytest.raises(StateError, match="never initialised"):
        qat.freeze(model)


@pytest.mark.parametrize("wrong", [{"damping": 0}, {"steps": -1}, {"steps": 1.5}, {"act_order": "yes"}, {"lr": "fast"}])
def test_options_are_checked(wrong):
    with pytest.raises(SpecError, match=next(iter(wrong))):
        Options(**wrong)


def test_a_wrong_option_is_one_line(tmp_path, monkeypatch, capsys):
    from qat import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qat.training.command_line.TRACEBACK_WANTED", False)
    command = "experiment=topics_w4 policy.init=gptq callbacks.calibration.options.damping=-1"
    monkeypatch.setattr(sys, "argv", ["train", *command.split()])
    with pytest.raises(SystemExit):
        train.main()
    assert "damping=-1: give a positive number" in capsys.readouterr().err
