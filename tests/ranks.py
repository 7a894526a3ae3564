"""Two processes of torch.distributed (gloo) on this machine, for tests: what a script comes to on each."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BEFORE = """
import json, os, sys, time, torch, qat
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
"""
AFTER = """
with open(f"{folder}/part{rank}", "w") as file:
    json.dump(answer, file)
os.rename(f"{folder}/part{rank}", f"{folder}/{rank}.json")
time.sleep(600)  # to be ended from outside: gloo's own teardown fails where a rank is slower than the other
"""


def answers(script: str, folder: Path) -> list[Any]:
    """Return ``answer`` of each rank's run of a script, which finds its ``rank`` and a ``folder``."""
    command = [sys.executable, "-P", "-c", BEFORE + script + AFTER]
    ranks = [subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    files = [folder / f"{rank}.json" for rank in (0, 1)]
    try:
        while not all(file.exists() for file in files):
            time.sleep(0.05)
            for rank in ranks:
                assert rank.poll() is None, rank.stderr.read()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [json.loads(file.read_text()) for file in files]
