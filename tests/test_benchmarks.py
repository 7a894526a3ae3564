"""The pieces of the benchmarks run on a CPU, in small; their figures mean nothing here."""

import csv
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from qat.numerics import fake_quantize_gradients, fake_quantized
from qat.spec import QuantSpec

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _package(monkeypatch):
    """Let benchmarks import each other; their folder's parent is on no path here, as it holds kernels/."""
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(ROOT / "benchmarks")]
    monkeypatch.setitem(sys.modules, "benchmarks", package)
    yield
    for name in [name for name in sys.modules if name.startswith("benchmarks.")]:
        del sys.modules[name]


def test_qat_step(tmp_path, monkeypatch, capsys):
    """Nothing is compiled: that takes longer than all the rest."""
    from benchmarks import qat_step

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for command in (["language", "losses"], ["vision", "--profile"]):
        qat_step.main(["--small", "--modes", "eager", "--repeats", "2", "--out", str(tmp_path), "--parts", *command])
    printed = capsys.readouterr().out
    with (tmp_path / "language.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["variant"] for row in rows} == {"plain", "qat", "LSQ in torch", "torchao"}
    assert all(float(row["time ratio"]) > 0 for row in rows if row["variant"] != "torchao")
    assert {row["what"]: row["time bar"] for row in rows if row["time bar"]} == {"W4 g128": "1.05", "W4A8": "1.1"}
    assert len((tmp_path / "losses.md").read_text().splitlines()) == 9
    assert all((tmp_path / f"{part}.md").read_text() in printed for part in ("language", "vision", "losses"))


def test_cpu_step(monkeypatch, capsys):
    from benchmarks import cpu_step

    monkeypatch.setattr(cpu_step, "DECODER", {"hidden": 128, "layers": 1, "mlp": 128, "vocabulary": 64, "heads": 4})
    monkeypatch.setattr(sys, "argv", ["cpu_step", "--steps", "1", "--threads", str(torch.get_num_threads())])
    cpu_step.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(rows) == 9
    assert all(row[-1] == "installed" or float(row[-1]) > 0 for row in rows)


def test_adapters(tmp_path, monkeypatch, capsys):
    """Each variant in this process, in place of one of its own."""
    pytest.importorskip("peft")
    from benchmarks import adapters

    def here(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        adapters.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    variants = ["bf16 LoRA, peft", "NF4, qat", "joint int4 g128 on 8 bits, qat"]
    command = ["adapters", "--small", "--steps", "3", "--out", str(tmp_path), "--variants", *variants]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(adapters, "measured_alone", here)
    adapters.main()
    rows = json.loads((tmp_path / "adapters.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == variants
    assert all(row["tokens/s"] > 0 and row["estimate GB"] > 0 for row in rows), rows


def test_a_variant_is_measured_in_a_process_of_its_own(tmp_path):
    from benchmarks.adapters import measured_alone

    (tmp_path / "found").write_text('{"ms": 3}')
    assert measured_alone("json.tool", "--compact", str(tmp_path / "found")) == {"ms": 3}
    assert "No module named nothing" in measured_alone("nothing")["problem"]


def test_the_straightforward_peer_is_lsq():
    """It computes what we compute, so that only the cost is compared."""
    from benchmarks.peers import straightforward_lsq

    layer = straightforward_lsq(nn.Sequential(nn.Linear(256, 8, bias=False)), lambda name: True, False)[0]
    step_size, spec = layer.step_size.detach().squeeze(-1), QuantSpec(bits=4, group_size=128)
    x, grad = torch.eye(256), torch.randn(256, 8)
    y = layer(x)
    torch.testing.assert_close(y.T, fake_quantized(layer.weight.detach(), step_size, spec))
    y.backward(grad)
    g = 1 / (128 * 7) ** 0.5
    expected = fake_quantize_gradients(grad.T.contiguous(), layer.weight.detach(), step_size, spec, g)
    torch.testing.assert_close(layer.weight.grad, expected[0])
    torch.testing.assert_close(layer.step_size.grad.squeeze(-1), expected[1])
