"""Every command ends quietly where its output is read no further, as by ``| head -1``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qat.broken_pipe import ends_quietly

ROOT = Path(__file__).parents[1]
COMMANDS = [path for folder in ("qat", "benchmarks", "recipes") for path in (ROOT / folder).rglob("*.py")]
COMMANDS = [path for path in COMMANDS if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")]
OURS = [path.stem for path in COMMANDS if path.parent.name == "qat"]


def unread(*words, cwd, unbuffered=False):
    """Run python with an output that nobody reads; return its exit status and what it said beside."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    if unbuffered:
        environment["PYTHONUNBUFFERED"] = "1"
    done = subprocess.run([sys.executable, *words], stdout=writer, stderr=subprocess.PIPE, env=environment, cwd=cwd)
    os.close(writer)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("command", OURS)
def test_help_that_nobody_reads(command, tmp_path):
    assert unread("-m", f"qat.{command}", "--help", cwd=tmp_path) == (1, "")


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_report_that_nobody_reads(unbuffered, tmp_path):
    assert unread("-m", "qat.doctor", cwd=tmp_path, unbuffered=unbuffered) == (1, "")


def test_a_training_run_that_nobody_reads(tmp_path):
    """Hydra prints a traceback of its own of what a job raises."""
    words = "data=digits model.args.width=4 trainer.accelerator=cpu trainer.max_steps=1 trainer.limit_val_batches=1"
    assert unread("-m", "qat.train", *words.split(), cwd=tmp_path, unbuffered=True) == (1, "")


def test_every_command_does(tmp_path):
    asks = [path.name for path in COMMANDS if "with ends_quietly()" in path.read_text(encoding="utf-8")]
    asks += [path.name for path in COMMANDS if "@ends_quietly()\ndef main(" in path.read_text(encoding="utf-8")]
    (through,) = {path.name for path in COMMANDS} - set(asks) - {"int8_linear.py"}  # which has int4_linear's main
    assert through == "train.py"  # by run_command


def test_another_pipe_that_breaks_is_an_error():
    """As one to a worker process, which has died."""
    reader, writer = os.pipe()
    os.close(reader)
    code = f"import os; from qat.broken_pipe import ends_quietly\nwith ends_quietly(): os.write({writer}, b'x')"
    done = subprocess.run([sys.executable, "-c", code], pass_fds=[writer], capture_output=True, text=True)
    os.close(writer)
    assert done.returncode == 1 and done.stderr.endswith("BrokenPipeError: [Errno 32] Broken pipe\n")


def test_an_error_and_an_exit_status_stay_what_they_are(capsys):
    with pytest.raises(SystemExit, match="3"), ends_quietly():
        sys.exit(3)
    with pytest.raises(ValueError, match="of its own"), ends_quietly():
        raise ValueError("of its own")


def test_an_output_that_was_closed_from_the_start_is_no_error(tmp_path):
    command = f'exec "{sys.executable}" -m qat.verify --help >&-'
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, cwd=tmp_path)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
