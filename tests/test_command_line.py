"""Values of a command line as people give them: paths in which Hydra's grammar sees more than a name."""

import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qat import convert as convert_command
from qat import evaluate as evaluate_command
from qat.training.command_line import as_it_stands

SHORT = "data=digits model.args.width=4 trainer.accelerator=cpu trainer.max_steps=3 trainer.limit_val_batches=1"


def parsed(word):
    return OverridesParser.create().parse_override(as_it_stands(word))


@pytest.mark.parametrize("value", ["a=b", "für.txt", "a (1).txt", "it's.txt", "a[1]", "a#b", 'say "a"=b', "a;b&c!"])
def test_a_value_that_hydra_would_not_read_is_taken_as_it_stands(value):
    assert parsed(f"init_from={value}").value() == value


def test_a_home_is_that_of_the_shell(monkeypatch):
    """Which expands it in init_from=~/a, and not in data.train=~/a."""
    monkeypatch.setenv("HOME", "/home/someone")
    assert parsed("data.train=~/chats.jsonl").value() == "/home/someone/chats.jsonl"


def test_a_comma_sweeps_unless_there_is_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed("init_from=a,b").is_sweep_override()
    Path("a,b").touch()
    assert parsed("init_from=a,b").value() == "a,b"
    assert parsed(f"seed={','.join(map(str, range(300)))}").is_sweep_override()  # too long for a file's name


@pytest.mark.parametrize(
    "word",
    [
        *("policy.weight.bits=4,2", "+model._target_=a.B", "~trainer", "--config-dir=a=b", "-m", "a.jsonl", "x='a=b'"),
        *("x=", "x=[a,b]", "x={a:1}", "x=${y}", "x=null", "x=choice(1,2)", "optim.lr=0.1", "data=digits"),
    ],
)
def test_what_hydra_reads_is_left_to_it(word):
    assert as_it_stands(word) == word


@pytest.fixture
def words(train, monkeypatch):
    """Run the command line from words, in the empty folder of ``train``."""

    def run(*given):
        monkeypatch.setattr(sys, "argv", ["train", *given])
        import_module("qat.train").main()

    return run


def test_what_a_run_says_comes_next_can_be_copied(words, capsys, tmp_path):
    """Of a run in a folder of any name: a sweep's has = and commas, and this one a space and a letter beyond ASCII."""
    words(*SHORT.split(), "run_dir=für alle (1)")
    command = capsys.readouterr().out.split("next ")[1].strip()
    words(*SHORT.split(), "policy=conv_w4a4", "name=w4", *shlex.split(command)[4:])
    words("-m", *SHORT.split(), "policy=conv_w4a4", "name=sweep", "seed=1,2", "init_from=für alle (1)/last.ckpt")
    command = capsys.readouterr().out.split("next ")[-1].strip()
    convert_command.main(shlex.split(command)[3:])
    (artifact,) = (tmp_path / "runs" / "sweep").rglob("artifact")
    words(*SHORT.split(), "policy=conv_w4a4", "name=again", f"init_from={artifact.parent}/last.ckpt")
    evaluate_command.main([str(artifact), "data=digits"])


def test_a_list_that_hydra_does_not_read_is_named(fails):
    assert "teacher=[a=b]: no viable alternative at input" in fails(f"{SHORT} teacher=[a=b]")
