"""recipes/smollm2_comparison.py: what waits for what, what counts as a result, and what recovery is of."""

import argparse
import importlib.util
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"


def load(name):
    if not (RECIPES / f"{name}.py").exists():
        pytest.skip("recipes are part of a checkout")
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    module = load("smollm2_comparison")
    monkeypatch.setattr(module, "OUT", tmp_path)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    return module


@pytest.fixture
def side_by_side():
    return load("side_by_side")


def options(rows, **changes) -> argparse.Namespace:
    given = {"bits": [4, 2], "methods": ["minmax", "gptq"], "starts": ["best"], "seeds": 2, "teacher": "tuned"}
    given |= {"rows": rows, "train": ["a.txt"], "test": "b.txt", "steps": 6, "batch_size": 2, "calibration": 4}
    return argparse.Namespace(**{**given, "lr": None, "windows": 4, "overrides": [], **changes})


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_row_runs_once_after_what_it_needs(recipe, tmp_path, monkeypatch, jobs):
    """Also with a single worker, which would wait forever if a row came before what it waits for."""
    done, given = [], options(recipe.Rows(tmp_path))

    def run(name, commands, weight=1):
        trained = [part for command in commands for part in command]
        for needed in [part for part in trained if part.startswith(("teacher=", "init_from="))]:
            assert Path(needed.split("=")[1]).parent.name in done
        done.append(name)
        given.rows.file(name).write_text(json.dumps({"perplexity": 9 - len(done) / 99, "kl": 0, "agreement": 1}))

    monkeypatch.setattr(given.rows, "run", run)
    with ThreadPoolExecutor(jobs) as pool:
        rows = [future.result(timeout=60) for future in recipe.plan(pool, given)]
    assert len(done) == len(set(done)) and {row["row"] for row in rows if row["row"].startswith("LSQ")}
    names = {"full_precision", "full_precision_tuned_32_1", "minmax_4_0", "gptq_2_1", "gptq_of_tuned_4_1"}
    assert names <= set(done) and "minmax_4_1" not in done  # which reads no data


def test_a_table_of_what_is_there_runs_nothing(recipe, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        futures = recipe.plan(pool, options(recipe.Rows(tmp_path, table=True), table=True))
    assert all(isinstance(future.exception(), FileNotFoundError) for future in futures)


def test_commands_go_on_after_an_exit_without_error_but_not_after_a_stop(side_by_side, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    ok, stopped, last = tmp_path / "ok.py", tmp_path / "stopped.py", tmp_path / "last.py"
    ok.write_text("import sys; sys.exit()")
    stopped.write_text("class Stopped(SystemExit): pass\nraise Stopped")
    last.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    side_by_side.run_here([[str(ok)], [str(last)]])
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    with pytest.raises(SystemExit):
        side_by_side.run_here([[str(stopped)], [str(last)]])
    assert not (tmp_path / "ran").exists()


def test_recovery_is_of_the_gap_between_the_best_ptq_and_the_tuned_model(recipe):
    rows = [("full precision, tuned", 32, 16.0), ("minmax", 4, 30.0), ("gptq", 4, 22.0), ("gptq of tuned", 4, 20.0)]
    rows = [{"row": row, "bits": bits, "perplexity": value} for row, bits, value in rows]
    rows += [{"row": "LSQ from gptq", "bits": 4, "perplexity": value} for value in (16.5, 17.5)]
    entries = recipe.summarise([{**row, "kl": 0.0, "agreement": 1.0} for row in rows])
    assert next(entry for entry in entries if entry["row"] == "LSQ from gptq")["recovery"] == pytest.approx(0.75)


def test_the_time_that_is_given_stops_a_row_and_starts_no_other(side_by_side, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(60)")
    rows = side_by_side.Rows(tmp_path, seconds=1.0)
    for _ in range(2):
        with pytest.raises(subprocess.TimeoutExpired):
            rows.run("slow", [[str(slow)]])
    assert time.monotonic() < rows.end + 30


def test_rows_that_fail_are_named_with_their_logs(side_by_side, tmp_path):
    rows = side_by_side.Rows(tmp_path, jobs=2)
    (tmp_path / "bad.py").write_text("import sys\nsys.exit('what went wrong')\n")
    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(rows.result, "seed_1", [[str(tmp_path / "bad.py")]])
        waits = pool.submit(bad.result)
    with pytest.raises(SystemExit, match=rf"2 of 2 rows failed: seed_1, and what waits for them; .* {tmp_path}/logs$"):
        rows.close([bad, waits])
    assert "what went wrong" in (tmp_path / "logs" / "seed_1.log").read_text()


def test_a_full_gpu_lets_the_next_one_wait(side_by_side, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    gpus, entered = side_by_side.Gpus(limit=4), threading.Event()

    def third():
        with gpus.one(1) as environment:
            found.append(environment)
            entered.set()

    found = []
    with gpus.one(4) as first:
        with gpus.one(9) as second:  # alone it may be too much
            waiting = threading.Thread(target=third)
            waiting.start()
            assert not entered.wait(0.1)
        assert entered.wait(60)
        waiting.join()
    assert [first, second, *found] == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("3", "5", "5")]
    assert gpus.load == [0, 0]
