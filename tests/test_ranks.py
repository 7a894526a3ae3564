"""What several ranks print as they end: one line where they agree, and each its own where they do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import answers

import qat.ranks

TWO_RANKS = (
    "data=digits model.args.width=4 trainer.accelerator=cpu trainer.devices=2 trainer.strategy=ddp "
    "trainer.log_every_n_steps=1 trainer.max_steps=9"
)
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
ENDS = """
import contextlib, io
from qat.ranks import print_last_line
printed, began = io.StringIO(), time.monotonic()
with contextlib.redirect_stderr(printed):
    if lines[rank]:
        print_last_line(lines[rank], seconds)
answer = printed.getvalue(), time.monotonic() - began
"""
FAILS = """
from lightning.pytorch import Callback
from qat.errors import DataError
class Fails(Callback):
    def __init__(self, rank):
        self.rank = rank
    def on_train_batch_start(self, trainer, *arguments):
        if trainer.global_rank == self.rank and trainer.global_step == 2:
            raise DataError("no data on this rank")
"""


@pytest.mark.parametrize(
    ("lines", "seconds", "printed"),
    [
        (("error: no data", "error: no data"), 60, ["error: no data\n", ""]),
        (("error: no data", "error: no data on b"), 60, ["error: no data\n", "error: no data on b\n"]),
        ((None, "error: no data"), 0.2, ["", "error: no data\n"]),
        (("error: no data", None), 0.2, ["error: no data\n", ""]),
    ],
)
def test_ranks_that_end_with_the_same_line_print_it_once(lines, seconds, printed, tmp_path):
    """They do not wait for one that goes on."""
    found = answers(f"lines, seconds = {lines}, {seconds}{ENDS}", tmp_path)
    assert [text for text, _ in found] == printed
    assert all(took < 30 for _, took in found)


def test_a_process_by_itself_prints_its_last_line(capsys):
    qat.ranks.print_last_line("error: no data")
    assert capsys.readouterr().err == "error: no data\n"


def trained(folder, *overrides, start=()):
    """Return what two ranks of a run came to."""
    command = [sys.executable, "-P", "-m", *start, "qat.train", *TWO_RANKS.split(), *overrides]
    paths = f"{Path(qat.ranks.__file__).parents[1]}{os.pathsep}{folder}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_alone_is_heard(rank, tmp_path):
    """The other one loses its connection, which was a traceback of 90 lines."""
    (tmp_path / "fails.py").write_text(FAILS)
    done = trained(tmp_path, "+callbacks.fails._target_=fails.Fails", f"+callbacks.fails.rank={rank}")
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert said[0] == "error: no data on this rank"
    assert len(said) == 2 and said[1].startswith("error: another rank is gone, see what it said: Connection closed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "overrides", "expected"),
    [
        ([], "optim.lr=1e30", "error: the loss is nan at step 2"),
        (TORCHRUN, "data.batch_size=0", "error: data.batch_size=0"),
    ],
)
def test_two_ranks_of_a_run_that_fail_together(start, overrides, expected, tmp_path):
    """While they train, and under torchrun also before they know of each other."""
    done = trained(tmp_path, overrides, start=start)
    assert done.returncode == 1 and done.stderr.count("error: ") == done.stderr.count(expected) == 1, done.stderr
