"""The pieces of the benchmarks run on a CPU, in small; their figures mean nothing here."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qat.numerics import fake_quantize_gradients, fake_quantized
from qat.spec import QuantSpec

ROOT = Path(__file__).parents[1]


def load(name):
    """Import benchmarks/<name>.py, whose folder is on no path here."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_qat_step(tmp_path):
    command = [sys.executable, "-m", "benchmarks.qat_step", "--small", "--parts", "language", "vision", "losses"]
    command += ["--modes", "eager", "--profile", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "language.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["variant"] for row in rows} == {"plain", "qat", "LSQ in torch", "torchao"}
    assert all(float(row["time ratio"]) > 0 for row in rows if row["variant"] != "torchao")
    assert {row["what"]: row["time bar"] for row in rows if row["time bar"]} == {"W4 g128": "1.05", "W4A8": "1.1"}
    assert len((tmp_path / "losses.md").read_text().splitlines()) == 9
    assert all((tmp_path / f"{part}.md").read_text() in done.stdout for part in ("language", "vision", "losses"))


def test_adapters(tmp_path):
    pytest.importorskip("peft")
    variants = ["bf16 LoRA, peft", "NF4, qat", "joint int4 g128 on 8 bits, qat"]
    command = [sys.executable, "-m", "benchmarks.adapters", "--small", "--steps", "3", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--variants", *variants], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "adapters.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == variants
    assert all(row["tokens/s"] > 0 and row["estimate GB"] > 0 for row in rows), rows


def test_the_straightforward_peer_is_lsq():
    """It computes what we compute, so that only the cost is compared."""
    layer = load("peers").straightforward_lsq(nn.Sequential(nn.Linear(256, 8, bias=False)), lambda name: True, False)[0]
    step_size, spec = layer.step_size.detach().squeeze(-1), QuantSpec(bits=4, group_size=128)
    x, grad = torch.eye(256), torch.randn(256, 8)
    y = layer(x)
    torch.testing.assert_close(y.T, fake_quantized(layer.weight.detach(), step_size, spec))
    y.backward(grad)
    g = 1 / (128 * 7) ** 0.5
    expected = fake_quantize_gradients(grad.T.contiguous(), layer.weight.detach(), step_size, spec, g)
    torch.testing.assert_close(layer.weight.grad, expected[0])
    torch.testing.assert_close(layer.step_size.grad.squeeze(-1), expected[1])
