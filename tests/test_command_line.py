"""Values of a command line as people give them: paths in which Hydra's grammar sees more than a name."""

import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qat import compare as compare_command
from qat import convert as convert_command
from qat import evaluate as evaluate_command
from qat.checkpoint import read_checkpoint
from qat.training.command_line import as_it_stands, overrides_first

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


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (
            "-m seed=1 --config-dir own ~logger -c job optim.lr=2",
            "seed=1 ~logger optim.lr=2 -m --config-dir own -c job",
        ),
        ("seed=1 --info", "seed=1 --info"),
        ("--help", "--help"),
        ("", ""),
    ],
)
def test_flags_may_stand_anywhere(words, first):
    assert overrides_first(words.split(), "train") == first.split()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "experiment=mnist_fp --epochs 3 seed=2",
            "--epochs: values are given as KEY=VALUE, without dashes (did you mean ",
        ),
        ("--epochs=3", "(did you mean 'trainer.max_epochs'?)"),
        ("seed=2 --batch-size 3", "(did you mean 'data.batch_size'?)"),
        ("--config-dri own seed=2", "unknown flag --config-dri (did you mean '--config-dir'?)"),
        ("-x", "unknown flag -x: values are given as KEY=VALUE, without dashes (known: 'model', 'data'"),
    ],
)
def test_a_flag_that_is_none_is_one_line(fails, words, said):
    assert said in fails(words)


def test_a_flag_that_is_none_of_evaluate_is_one_line(capsys):
    for words, said in (
        (
            "x data=digits --batch-size 3 data.seed=1",
            "--batch-size: values are given as KEY=VALUE, without dashes (did ",
        ),
        ("x --referense y data=digits", "unknown flag --referense (did you mean '--reference'?)"),
    ):
        with pytest.raises(SystemExit):
            evaluate_command.main(words.split())
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1


@pytest.fixture
def words(train, monkeypatch):
    """Run the command line from words, in the empty folder of ``train``."""

    def run(*given):
        monkeypatch.setattr(sys, "argv", ["train", *given])
        import_module("qat.train").main()

    return run


def test_what_a_run_says_comes_next_can_be_copied(words, capsys, tmp_path):
    """Of a run in a folder of any name: a sweep's has = and commas, and this one a space and a letter beyond ASCII.

    A job's folder has no slash in its name, whatever its overrides have.
    """
    words(*SHORT.split(), "run_dir=für alle (1)")
    command = capsys.readouterr().out.split("next ")[1].strip()
    words(*SHORT.split(), "policy=conv_w4a4", "name=w4", *shlex.split(command)[4:])
    words("-m", *SHORT.split(), "policy=conv_w4a4", "name=sweep", "seed=1,2", "init_from=für alle (1)/last.ckpt")
    command = capsys.readouterr().out.split("next ")[-1].strip()
    convert_command.main(shlex.split(command)[3:])
    (artifact,) = (tmp_path / "runs" / "sweep").glob("*/artifact")
    words(*SHORT.split(), "policy=conv_w4a4", "name=again", f"init_from={artifact.parent}/last.ckpt")
    evaluate_command.main([str(artifact), "data=digits"])


def test_a_list_that_hydra_does_not_read_is_named(fails):
    assert "teacher=[a=b]: no viable alternative at input" in fails(f"{SHORT} teacher=[a=b]")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("lr=1", "did you mean 'optim.lr'?"),
        ("epochs=1", "did you mean 'trainer.max_epochs'?"),
        ("policy=conv_w4a4 policy.weight.bit=3", "did you mean 'policy.weight.bits'?"),
        ("experiment=joint_lora model.name=x", "did you mean 'model.pretrained_model_name_or_path'?"),
        (
            "experiment=qa_lora model.pretrained_model_name_or_path=x adapter.r=4",
            "'adapter.rank', 'adapter.alpha'",
        ),
        ("sead=1", "did you mean 'seed'?"),
        ("data.qqqqqqq=1", "(known: 'data._target_', 'data.source', 'data.batch_size'"),  # and none of other groups
    ],
)
def test_an_unknown_key_is_answered_with_the_one_that_is_meant(fails, overrides, said):
    line = fails(overrides)
    assert said in line and "'optim.momentum'" not in line


@pytest.mark.parametrize(
    ("overrides", "weight", "activation"),
    [
        ("policy.weight.bits=3", 3, None),
        ("policy.weight={bits:3}", 3, None),
        ("policy=conv_w4a4 policy.rules=[] policy.activation=null", 4, None),
        ("policy=conv_w4a4 policy.activation.bits=6", 4, 6),
        ("policy=lm_w4 policy.rules=[] policy.weight.group_size=null policy.activation.bits=8", 4, 8),
        ("policy.activation.bits=5", None, 5),
    ],
)
def test_fields_of_a_spec_hold_where_the_policy_has_none(train, tmp_path, overrides, weight, activation):
    train(f"{SHORT} trainer.max_epochs=0 {overrides}")
    policy = read_checkpoint(tmp_path / "runs" / "run" / "last.ckpt").policy
    assert (policy.weight and policy.weight.bits, policy.activation and policy.activation.bits) == (weight, activation)


def test_a_spec_that_a_policy_does_not_have_is_swept(train, tmp_path, capsys):
    train(f"-m {SHORT} trainer.max_epochs=0 policy=none policy.weight.bits=2,4 policy.activation.bits=8 seed=0,1")
    found = [read_checkpoint(path).policy for path in (tmp_path / "runs" / "run").rglob("last.ckpt")]
    assert sorted((policy.weight.bits, policy.activation.bits) for policy in found) == [(2, 8), (2, 8), (4, 8), (4, 8)]
    compare_command.main(["runs", "--over", "seed"])
    assert "policy.weight.bits  accuracy" in capsys.readouterr().out


def test_a_field_holds_in_each_policy_of_a_sweep(train, tmp_path):
    train(f"-m {SHORT} trainer.max_epochs=0 policy=conv_w4a4,none policy.activation.bits=6")
    found = [read_checkpoint(path).policy for path in (tmp_path / "runs" / "run").rglob("last.ckpt")]
    assert {policy.weight and policy.weight.bits for policy in found} == {4, None}
    assert {policy.activation.bits for policy in found} == {6}


def test_a_wrong_field_of_a_spec_that_a_policy_does_not_have_is_named(fails):
    assert "did you mean 'policy.weight.bits'?" in fails(f"{SHORT} policy.weight.bit=3")
    assert "bits=1: give a whole number" in fails(f"{SHORT} policy.activation.bits=1")


def test_a_policy_file_of_ones_own(train, fails, tmp_path):
    """With or without Hydra's schema; a field of its specs that is not in the file can be given, too."""
    folder = tmp_path / "configs" / "policy"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("weight:\n  bits: 3\nrules:\n  - {match: '@last', weight: {bits: 8}}\n")
    (folder / "typed.yaml").write_text("defaults: [schema]\nweight: {bits: 3}\n")
    for name in ("mine", "typed"):
        more = f"policy={name} name={name} policy.weight.symmetric=false policy.activation.bits=6"
        train(f"--config-dir {folder.parent} {SHORT} trainer.max_epochs=0 {more}")
        policy = read_checkpoint(tmp_path / "runs" / name / "last.ckpt").policy
        assert (policy.weight.bits, policy.weight.symmetric, policy.activation.bits) == (3, False, 6)
    assert "policy.weight.bits" in fails(f"--config-dir {folder.parent} {SHORT} policy=mine policy.weight.bits=four")
