"""One table of runs: what it holds is what the runs printed and what their artifacts take."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qat
from qat import compare, convert
from qat.compare import Run, as_markdown, averaged, ordered, rows_of
from qat.errors import DataError
from qat.layers import quant_layers
from qat.models import build
from qat.table import stored_size

ONE = "data=digits model.args.width=4 trainer.accelerator=cpu trainer.max_steps=3 trainer.limit_val_batches=1"
SWEEP = f"-m {ONE} policy=conv_w4a4 name=which policy.weight.bits=2,4 seed=0,1"


def test_a_sweep_becomes_a_table(train, tmp_path, capsys):
    train(SWEEP)
    printed = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("metrics")]
    runs = {checkpoint.parent for checkpoint in (tmp_path / "runs" / "which").rglob("last.ckpt")}
    assert len(printed) == len(runs) == 4

    converted = next(folder for folder in runs if "bits=4" in folder.name and "seed=1" in folder.name)
    assert convert.main([str(converted / "last.ckpt"), "--out", str(converted / "artifact")]) == 0
    tensors = load_file(converted / "artifact" / "model.safetensors").values()
    on_disk = sum(file.stat().st_size for file in (converted / "artifact").iterdir())
    assert json.loads((converted / "result.json").read_text())["bytes"] == sum(tensor.nbytes for tensor in tensors)

    capsys.readouterr()
    compare.main(["runs/which", "--csv", "all.csv"])
    head, *rows, blank, common = capsys.readouterr().out.splitlines()
    assert head.split() == ["policy.weight.bits", "seed", "accuracy", "loss", "bits/weight", "bytes"]
    assert blank == "" and common.startswith("all with data=digits model.args.width=4 ") and "name=" not in common
    cells = [row.split() for row in rows]
    assert sorted(row[2:4] for row in cells) == sorted(line[1::2] for line in printed)
    assert [row[2] for row in cells] == sorted((row[2] for row in cells), reverse=True)
    assert {tuple(row[:2]): row[5] for row in cells}["4", "1"] == f"{on_disk:,}"
    assert all(row[4] == {"2": "2.52", "4": "4.42"}[row[0]] for row in cells)
    assert sum(row[5].startswith("~") for row in cells) == 3
    with open("all.csv", newline="") as file:
        stored = list(csv.DictReader(file))
    assert len(stored) == 4 and {row["policy.weight.bits"] for row in stored} == {"2", "4"}
    assert {row["artifact_bytes"] for row in stored} == {"", str(on_disk)}

    (converted / "result.json").unlink()
    compare.main(["runs", "--over", "seed", "--markdown"])
    said = capsys.readouterr()
    assert said.err.startswith("no result yet: runs/which/") and said.err.count("\n") == 1
    head, rule, *rows = said.out.splitlines()[:4]
    assert head == "| policy.weight.bits | accuracy | loss | bits/weight | bytes | seeds |" and rule == "|" + "---|" * 6
    assert sorted((row.split(" | ")[0], row.split(" | ")[-1]) for row in rows) == [("| 2", "2 |"), ("| 4", "1 |")]
    assert " ± " in next(row for row in rows if row.startswith("| 2"))


def test_a_run_that_goes_on_has_no_result_until_its_end(train, tmp_path):
    train(ONE)
    result = tmp_path / "runs" / "run" / "result.json"
    assert set(json.loads(result.read_text())) == {"overrides", "metrics", "bits_per_weight", "bytes"}
    with pytest.raises(SystemExit):
        train(f"{ONE} resume=auto trainer.max_steps=9 optim.lr=1e30 trainer.log_every_n_steps=1")
    assert not result.exists()


@pytest.mark.parametrize("more", ["", "resume=auto seed=-1", "resume=auto"])
def test_a_command_that_is_refused_changes_nothing_of_a_finished_run(train, tmp_path, capsys, more):
    """Hydra has written its own files for the folder by then."""
    train(f"{ONE} policy=conv_w4a4")
    capsys.readouterr()
    compare.main(["runs"])
    table = capsys.readouterr().out
    with pytest.raises(SystemExit):
        train(f"{ONE} policy=none {more}")
    capsys.readouterr()
    compare.main(["runs"])
    assert capsys.readouterr().out == table and "policy=conv_w4a4" in table


def test_a_result_without_overrides_is_named_by_what_hydra_wrote(train, tmp_path, capsys):
    train(f"{ONE} seed=3")
    result = tmp_path / "runs" / "run" / "result.json"
    values = json.loads(result.read_text())
    del values["overrides"]
    result.write_text(json.dumps(values))
    compare.main(["runs"])
    assert "seed=3" in capsys.readouterr().out


def test_a_sweep_goes_on_after_a_job_that_fails_and_after_a_kill(train, tmp_path, capsys):
    sweep = f"-m {ONE} policy=conv_w4a4 name=which"
    with pytest.raises(SystemExit) as stopped:
        train(f"{sweep} policy.weight.bits=2,1,4")
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "Traceback" not in said
    assert "error: bits=1: give" in said and said.endswith(
        "a job of the sweep failed: bits=1: give a whole number from 2 to 8\n"
    )
    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("last.ckpt")}
    assert len(checkpoints) == 2
    train(f"{sweep} policy.weight.bits=2,8,4 resume=auto")
    assert len(list(tmp_path.rglob("last.ckpt"))) == 3
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == checkpoints  # not trained again


def run(accuracy, size=None, **overrides):
    """Return a run with that metric, or with none."""
    metrics = {} if accuracy is None else {"accuracy": [accuracy]}
    return Run(Path(f"runs/{accuracy}"), overrides, metrics, 4.0, 1000, size)


def test_the_best_comes_first_and_nan_last():
    runs = [run(0.5, a="1"), run(float("nan"), a="2"), run(None, a="3"), run(0.9, a="4")]
    assert [one.overrides["a"] for one in ordered(runs)] == ["4", "1", "2", "3"]
    for one in runs:
        one.metrics = {"perplexity": one.metrics["accuracy"]} if one.metrics else {}
    assert [one.overrides["a"] for one in ordered(runs)] == ["1", "4", "2", "3"]


def test_what_runs_do_not_share_is_a_dash_and_folders_tell_equal_ones_apart():
    rows, common = rows_of([run(0.5, 7, a="1", c="x"), run(0.25, b="2", c="x")])
    assert rows == [
        ["a", "b", "accuracy", "bits/weight", "bytes"],
        ["1", "-", "0.5000", "4.00", "7"],
        ["-", "2", "0.2500", "4.00", "~1,000"],
    ]
    assert common == ["c=x"]
    rows, _ = rows_of([run(0.5, a="1"), run(0.25, a="1")])
    assert [row[0] for row in rows] == ["run", "runs/0.5", "runs/0.25"]
    assert as_markdown([["a|b"], ["1"]]) == "| a\\|b |\n|---|\n| 1 |"


def test_averages_are_over_that_key_alone():
    runs = [run(0.5, a="1", seed="0"), run(0.7, a="1", seed="1"), run(0.9, a="2", seed="0")]
    rows, _ = rows_of(averaged(runs, "seed"), "seed")
    assert rows[1:] == [
        ["1", "0.6000 ± 0.1414", "4.00", "~1,000", "2"],
        ["2", "0.9000", "4.00", "~1,000", "1"],
    ]


def test_a_size_in_which_they_differ_is_a_dash_and_none_counts_twice():
    narrow, wide = run(0.5, size=10, bits="2"), run(0.7, size=20, bits="4")
    wide.bits, wide.tensor_bytes = 8.0, 2000
    rows, _ = rows_of(averaged([narrow, wide], "bits"), "bits")
    assert rows[1][-3:] == ["-", "-", "2"]
    with pytest.raises(DataError, match=r"runs/0\.5 and runs/0\.7 both have seed=0: leave one of them out"):
        averaged([run(0.5, seed="0"), run(0.7, seed="0")], "seed")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["empty"], "empty: there is no run of python -m qat.train in it"),
        (["began"], "no run has come to its end yet: began"),
        (["ended", "--over", "sed"], "--over sed: no run was given sed=VALUE (did you mean 'seed'?)"),
        (["ended", "--csv", "no/x.csv"], "--csv no/x.csv cannot be written: No such file or directory"),
        (["damaged"], "damaged/result.json is no result of python -m qat.train"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "began/.hydra", "ended/.hydra", "damaged/.hydra"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("began", "ended", "damaged"):
        (tmp_path / name / ".hydra" / "overrides.yaml").write_text("- seed=3\n")
    (tmp_path / "ended" / "result.json").write_text('{"metrics": {"accuracy": 0.5}}')
    (tmp_path / "damaged" / "result.json").write_text("[]")
    with pytest.raises(SystemExit):
        compare.main(arguments)
    line = capsys.readouterr().err
    assert line.startswith(f"error: {said}") and line.count("\n") == 1


@pytest.mark.parametrize("policy", ["conv_w4a4", {"weight": {"bits": 3, "granularity": "tensor"}}])
def test_prepared_and_frozen_models_take_the_same(policy):
    model = build({"builder": "cnn", "args": {"width": 4}})
    size = sum(value.nbytes for value in model.state_dict().values())
    assert stored_size(model) == (32, size)
    prepared = qat.prepare(model, policy, verbose=False)
    for _, layer in quant_layers(prepared):
        if layer.activation_quantizer is not None:
            layer.activation_quantizer.set_step_size(torch.tensor(0.5))
    before = stored_size(prepared)
    assert before[1] < size / 2
    assert stored_size(qat.freeze(prepared)) == before
