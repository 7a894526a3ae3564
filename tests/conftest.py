"""What every test relies on: Triton's interpreter where there is no GPU, few threads, fixed seeds, no network."""

import os
import random
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy
import pytest
import torch
from packaging.version import Version

# One thread: tests have small tensors, and on a busy machine OpenMP threads wait for each other (203 s against 37 s for
# test_train.py on two busy cores). Subprocesses inherit what stands here.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not (torch.cuda.is_available() or torch.xpu.is_available()):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported: torch has not imported it yet

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    from triton import language
    from triton.runtime import interpreter

    def _patch_once(function: Callable, patch: Callable = interpreter._patch_lang) -> object:
        """Let the interpreter put its operations into ``triton.language`` for a kernel, not for all that it calls."""
        seen = [value for value in function.__globals__.values() if value is language or value is language.core]
        if seen and not any(language.core.is_builtin(module.load) for module in seen):
            return SimpleNamespace(restore=lambda: None)
        return patch(function)

    interpreter._patch_lang = _patch_once  # which took a quarter of the time of a kernel's test

TRITON_3_6 = find_spec("triton") is not None and version("triton").startswith("3.6.")
IN_CI = bool(os.environ.get("CI"))
hypothesis.settings.register_profile(
    "qat", deadline=None, max_examples=25, derandomize=IN_CI, print_blob=not IN_CI, database=None
)
hypothesis.settings.load_profile("qat")


def pytest_report_header() -> str:
    """Say which torch runs, and whether kernels are interpreted."""
    kernels = "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled"
    if kernels == "interpreted" and TRITON_3_6 and Version(numpy.__version__) >= Version("2.4"):
        kernels += ", but not by Triton 3.6 with NumPy 2.4 and later: pip install 'numpy<2.4', or their tests fail"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, Triton kernels are {kernels}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qat.training.command_line.TRACEBACK_WANTED", False)
    # Hydra composes each config once more to look for hydra.mode in it, which takes half of the time of a mistake.
    monkeypatch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda *_, **__: None)

    def run(command: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train", *command.split()])
        import_module("qat.train").main()

    return run


@pytest.fixture
def verify_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``qat.convert --verify`` compare in this process: another one takes seconds to import torch."""

    def run(command: list[str]) -> SimpleNamespace:
        assert command[:3] == [sys.executable, "-m", "qat.verify"]
        return SimpleNamespace(returncode=import_module("qat.verify").main(command[3:]))

    monkeypatch.setattr("qat.convert.subprocess", SimpleNamespace(run=run))


@pytest.fixture
def fails(train: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Run a command that is expected to fail, and return its one line."""

    def run(command: str) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            train(command)
        assert stopped.value.code == 1
        line = capfd.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1, line
        return line

    return run
