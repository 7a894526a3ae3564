"""Two processes of torch.distributed (gloo) on this machine, for tests: what a script comes to on each."""

import json
import time
from pathlib import Path
from typing import Any

from apart import start

BEFORE = """
import json, os, time, torch, qat
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
    ranks = [start(folder / f"printed{rank}", _run, BEFORE + script + AFTER, rank, folder) for rank in (0, 1)]
    files = [folder / f"{rank}.json" for rank in (0, 1)]
    try:
        while not all(file.exists() for file in files):
            time.sleep(0.05)
            for rank, process in enumerate(ranks):
                assert process.is_alive(), (folder / f"printed{rank}").read_text()
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [json.loads(file.read_text()) for file in files]


def _run(script: str, rank: int, folder: Path) -> None:
    exec(script, {"rank": rank, "folder": folder})
