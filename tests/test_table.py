"""The summary: every matrix is in it, with what it takes and why it was left alone, as prepare printed it.

``check_*`` takes the modules under test, so that the mutants' tests can show that it fails on a wrong one.
"""

import contextlib
import io

import pytest
import torch
from small_networks import POLICY, W4, Net, Tied, bits_of, prepare, row_of
from torch import nn

import qat.surgery
import qat.table
from qat import QuantPolicy


def check_table(surgery):
    """Layer, shape, specs, bits per weight and reason; the totals count a tied weight once."""
    model = Net()
    policy = QuantPolicy(
        weight=W4, activation={"bits": 8}, rules=[{"match": "head", "weight": None, "activation": None}]
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        surgery.prepare(model, policy)
    text = printed.getvalue()
    bits = 4 + 16 / 27
    assert row_of(text, "conv") == ["conv", "8x3x3x3", "int4 channel", "int8 tensor (sign detected)", f"{bits:.2f}"]
    assert row_of(text, "fc") == ["fc", "16x8", "int4 channel", "int8 tensor (sign detected)", "6.00"]
    assert row_of(text, "head") == ["head", "4x16", "-", "-", "32.00", "rule match='head'"]
    assert row_of(text, "embed") == ["embed", "10x8", "-", "-", "32.00", "Embedding stays in full precision"]
    mean = (216 * bits + 128 * 6 + (64 + 80) * 32) / (216 + 128 + 64 + 80)
    assert (
        text.splitlines()[-1]
        == f"2 of 4 layers have quantized weights; {mean:.2f} bits per weight over all 488 of them"
    )


def check_summary(table):
    model = prepare(Net(), QuantPolicy(weight=W4, rules=[{"match": "head", "weight": None}]))
    text = table.summary(model)
    assert row_of(text, "conv") == ["conv", "8x3x3x3", "int4 channel", "-", f"{4 + 16 / 27:.2f}"]
    assert row_of(text, "fc") == ["fc", "16x8", "int4 channel", "-", "6.00"]
    assert row_of(text, "head") == ["head", "4x16", "-", "-", "32.00", "not quantized"]
    bits, size = table.stored_size(model)
    assert bits == pytest.approx((216 * 4 + 8 * 16 + 128 * 6 + (64 + 80) * 32) / 488)
    assert size >= 488 * bits / 8


def test_table():
    check_table(qat.surgery)


def test_summary():
    check_summary(qat.table)


def test_a_quantizer_of_ones_own_takes_what_it_ships():
    class Own(nn.Module):
        def __init__(self, spec):
            super().__init__()
            self.spec, self.step_size, self.bias = spec, nn.Parameter(torch.ones(16, 1)), nn.Parameter(torch.ones(99))

    model = prepare(Net(), QuantPolicy(weight=W4))
    ours = qat.table.summary(model), qat.table.stored_size(model)
    model.fc.weight_quantizer = Own(model.fc.weight_quantizer.spec)
    text, size = qat.table.summary(model), qat.table.stored_size(model)
    assert size == ours[1]
    assert text.splitlines()[:-2] == ours[0].splitlines()[:-2]


def test_a_subclass_of_linear_is_listed_as_left_alone(capsys):
    """Whoever holds such a layer may read its weight without calling it."""
    model = nn.ModuleList([nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8), nn.Linear(8, 8)])
    qat.prepare(model, POLICY)
    assert (
        row_of(capsys.readouterr().out, "0")[-1]
        == "NonDynamicallyQuantizableLinear (a subclass of Linear) stays in full precision"
    )
    assert bits_of(model).keys() == {"1"}


def test_every_matrix_is_in_the_summary(capsys):
    """Matrices that are no layer's plain weight too: nothing is skipped in silence."""

    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict(
        {
            "normed": torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
            "attention": Own(8, 2),
            "lstm": nn.LSTM(4, 3),
            "fc": nn.Linear(8, 8),
        }
    )
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    qat.prepare(model, POLICY)
    text = capsys.readouterr().out
    for name in ("attention.in_proj_weight", "lstm.weight_hh_l0", "normed.parametrizations.weight.original1"):
        cells = row_of(text, name)
        assert cells[-1].endswith("stays in full precision") and "32.00" in cells
        assert row_of(qat.summary(model), name) == cells
    assert text.splitlines()[-1].endswith(f"over all {total:,} of them")


def test_prepare_prints_what_summary_says(capsys):
    policy = QuantPolicy(weight=W4, activation={"bits": 8, "signed": True})
    model = qat.prepare(Net(), policy)
    printed = capsys.readouterr().out.splitlines()
    again = qat.summary(model).splitlines()
    assert printed[-1] == again[-1]
    for name in ("conv", "fc", "head"):
        assert row_of("\n".join(printed), name) == row_of("\n".join(again), name)
    assert row_of(qat.summary(qat.freeze(qat.prepare(Net(), POLICY, verbose=False))), "fc")[:3] == [
        "fc",
        "16x8",
        "int4 channel",
    ]
    assert capsys.readouterr().out == ""


def test_the_summary_says_what_step_sizes_take():
    """One a channel of fc and head, one a group of 3 of conv, and one an input; a frozen model has none."""
    policy = QuantPolicy(weight=W4, activation={"bits": 8}, rules=[{"match": "conv", "weight": {"group_size": 3}}])
    model = qat.prepare(Net(), policy, verbose=False)
    count = sum(p.numel() for name, p in model.named_parameters() if name.endswith("step_size"))
    assert count == 8 * 9 + 16 + 4 + 3
    (line,) = (line for line in qat.summary(model).splitlines() if "step sizes" in line)
    assert line.startswith(f"{count} step sizes take {4e-6 * count:.2f} MB") and "torch reference on cpu" in line
    assert "step sizes" not in qat.summary(qat.freeze(qat.prepare(Net(), POLICY, verbose=False)))


def test_ties_in_the_summary():
    text = qat.summary(prepare(Tied()))
    assert row_of(text, "b")[-1] == "weight tied to a"
    assert row_of(text, "head")[-1] == "weight tied to embed"
