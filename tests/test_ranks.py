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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "overrides", "expected"),
    [
        ([], "optim.lr=1e30", "error: the loss is nan at step 2"),
        (
            ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"],
            "data.batch_size=0",
            "error: data.batch_size=0",
        ),
    ],
)
def test_two_ranks_of_a_run_that_fail_together(start, overrides, expected, tmp_path):
    """While they train, and under torchrun also before they know of each other."""
    command = [sys.executable, "-P", "-m", *start, "qat.train", *TWO_RANKS.split(), overrides]
    environment = os.environ | {"PYTHONPATH": str(Path(qat.ranks.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and done.stderr.count("error: ") == done.stderr.count(expected) == 1, done.stderr
