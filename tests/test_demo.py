"""recipes/demo.py: its commands compose, its table reads well; the whole of it runs in the slow tests."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_training_command_composes(demo, tmp_path):
    for arguments in demo.train_commands(["trainer.max_epochs=1"]).values():
        command = [sys.executable, *arguments, "--cfg", "job"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("max_epochs: 0" in done.stdout) is ("policy.init=minmax" in arguments)


def test_every_model_has_a_folder_of_its_own(demo):
    folders = [demo.BASELINE.parent, *map(demo.folder, demo.QUANTIZED)]
    assert len(set(folders)) == len(folders)


def test_table(demo):
    rows = [
        demo.Row("full precision", 0.985, 243_000, 32),
        demo.Row("W4A4 trained", 0.98, 39_952, 4.1, 0.98, 60_688, 0),
    ]
    assert demo.table(rows).splitlines() == [
        "model           in training  shipped  bytes on disk  bits/weight  codes that differ",
        "full precision        98.5%        -        243,000        32.00                  -",
        "W4A4 trained          98.0%    98.0%         39,952         4.10        0 of 60,688",
    ]


def test_a_failing_command_ends_the_demo(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        demo.main(["optim.no_such_key=1"])
    assert stopped.value.code == 1


@pytest.mark.slow
def test_demo_keeps_its_promise(tmp_path):
    """One epoch each, twice: a second run starts afresh."""
    for _ in range(2):
        command = [sys.executable, RECIPE, "trainer.max_epochs=1"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()[-4:]
    assert [row[:12] for row in rows] == ["W4A4 rounded", "W4A4 trained", "W2A2 rounded", "W2A2 trained"]
    for row in rows:
        training, shipped = row.split()[2:4]
        assert training == shipped and " 0 of " in row
