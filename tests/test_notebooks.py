"""Every notebook runs from top to bottom, and is stored without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SHORTER = {  # what takes a notebook's time, and what it is here
    "01_lsq_in_five_minutes": {"epochs=15": "epochs=2", "fit(model, 15,": "fit(model, 2,"},
    "02_comparing_quantizers": {"epochs=15": "epochs=2", "epochs=12": "epochs=1", "seed in range(3)": "seed in [0]"},
    "03_a_language_model_in_four_bits": {
        "20_000": "4_000",
        "BITS = (4, 3, 2)": "BITS = (4, 2)",
        "start, 250,": "start, 9,",
        "longer, 60,": "longer, 3,",
        '"gptq", 60': '"gptq", 3',
    },
}


def code_cells(notebook):
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in code_cells(notebook)))
    environment = {**os.environ, "MPLBACKEND": "agg"}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "differing codes: 0" in run.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_of_a_notebook_runs_with_less_training(notebook, tmp_path, monkeypatch, capsys):
    """In this process. Its codes are those that were trained, however short that was."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    pyplot.switch_backend("agg")
    source = "\n\n".join("".join(cell["source"]) for cell in code_cells(notebook))
    for long, short in SHORTER[notebook.stem].items():
        assert long in source
        source = source.replace(long, short)
    exec(compile(source, notebook, "exec"), {"__name__": "__main__"})
    assert "differing codes: 0" in capsys.readouterr().out


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(notebook):
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code_cells(notebook))
