"""What the commands say when something is wrong: one line that names the key, the file or the layer, and the fix."""

import errno
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

import qat
from qat import evaluate as evaluate_command
from qat.arguments import wrong_types
from qat.checkpoint import read_checkpoint
from qat.errors import CheckpointError, SpecError
from qat.training.csv_logger import ResumableCSVLogger

SHORT = "data=digits model.args.width=4 trainer.accelerator=cpu trainer.max_steps=3 trainer.limit_val_batches=1"
TEXT = "data=topics data.seq_len=16 model=gpt task=language model.args.width=8 model.args.depth=1 trainer.max_steps=1"
W4 = "policy=conv_w4a4"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("optim.lr=1e30 trainer.log_every_n_steps=1", "lower optim.lr"),
        ("data=cifar10 data.train=/no/such data.test=/no/such", "data.train=/no/such: there is nothing at that path"),
        ("data=cifar10 data.test=x", "data.train is not given: add data.train=VALUE"),
        ("trainer.accelerator=cuda", "trainer.accelerator=cuda: PyTorch sees no GPU here"),
        ("init_from=nowhere.ckpt", "there is no checkpoint at nowhere.ckpt"),
        ("teacher=.", ". is a folder, and a checkpoint is a file: a run's is RUN/last.ckpt"),
        ("mnist_w4a4", "'mnist_w4a4' is no KEY=VALUE, such as experiment=NAME"),
        ("resume=nowhere.ckpt", "resume=auto finds the run's own"),
        ("policy=conv_w4a4 +policy.foo=1", "unknown key 'foo' in the policy"),
        ("policy=conv_w4a4 policy.weight.bits=30", "bits=30: give a whole number from 2 to 8"),
        ("policy=lm_w4", "the rule with match='lm_head' matched no layer"),
        ("model.builder=resnet2", "did you mean 'resnet20'?"),
        ("task.schedule=cosin", "did you mean 'cosine'?"),
        ("optim.lr=fast", "optim.lr='fast': give a number"),
        ("optim.lr=-1", "optim.lr=-1: give a number that is not negative"),
        ("trainer.precision=low", "trainer.precision='low': give 64"),
        (
            "trainer.strategy={_target_:lightning.pytorch.strategies.ModelParallelStrategy}",
            "FSDP2 is for a training loop of your own, with qat.shard_step_sizes; here several ranks train with",
        ),
    ],
)
def test_mistake_is_one_line(fails, overrides, said):
    if "cuda" in overrides and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert said in fails(f"{SHORT} {overrides}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("seed=-1", "seed=-1: give a whole number from 0 to 4294967295"),
        ("threads=0", "threads=0: give 1 or more, or null"),
        ("matmul_precision=hihg", "matmul_precision='hihg' is unknown (did you mean 'high'?)"),
        ("optim.lr=nan", "optim.lr=nan: give a number that is not negative"),
        ("optim.momentum=-1", "optim: Invalid momentum value: -1"),
        ("optim.nesterov=maybe", "optim.nesterov='maybe': give true or false"),
        ("optim=adamw optim.betas=0.9", "optim.betas=0.9: give a list, each a number"),
        ("+optim.foo=3", "optim: SGD.__init__() got an unexpected keyword argument 'foo'"),
        ("optim._target_=torch.optim.Foo", "optim._target_=torch.optim.Foo cannot be found"),
        ("+model._target_=foo.Bar", "model._target_=foo.Bar cannot be found: No module named 'foo'"),
        ("optim=null", "optim=null: a group of files takes the name of one of them"),
        ("model=gpt", "model.args.context is that of data.seq_len, which is not there: choose another data=NAME"),
        ("task.label_smoothing=2", "task.label_smoothing=2: give a share from 0 to 1"),
        ("task.warmup=x", "task.warmup='x': give a number"),
        ("task.warmup=-1", "task.warmup=-1: give a share from 0 to 1"),
        ("task.step_size_lr_scale=-1", "task.step_size_lr_scale=-1: give a number that is not negative"),
        ("task.temperature=nan", "task.temperature=nan: give a positive number"),
        ("data.batch_size=0", "data.batch_size=0: give 1 or more"),
        ("data.batch_size=1.5", "data.batch_size=1.5: give a whole number"),
        ("data.seed=-1", "data.seed=-1: give 0 or more"),
        ("data.std=[0]", "data.std=[0]: give positive numbers"),
        ("data.mean=[x]", 'data.mean=["x"]: give a list, each a number'),
        ("data.crop_padding=-1", "data.crop_padding=-1: give 0 or more"),
        ("data.source=parquet +data.train=afile +data.test=afile", "afile is no parquet file, or damaged"),
        ("model.args.width=0", "model.args.width=0: give 1 or more"),
        (
            "model.args.num_classes=1099511627776",
            "cannot be built: RuntimeError",
        ),
        ("model.args.width=x", "model.args.width='x': give a whole number"),
        ("model.args.in_channels=3", "the model cannot run on these data, shape [32, 1, 8, 8]: Given groups=1"),
        ("model.args.num_classes=5", "the data have a target 9, and the model has outputs for 0 to 4"),
        ("model.args.num_classes=5 trainer.max_epochs=0", "the data have a target 9, and the model has outputs"),
        ("init_from=afile", "afile cannot be read: it is no checkpoint, or damaged"),
        ("resume=afile", "resume=afile is damaged, or no checkpoint"),
        ("run_dir=afile", "the run folder afile cannot be made: File exists; choose another with run_dir=DIR"),
        ("run_dir=afile/run", "the run folder afile/run cannot be made: Not a directory"),
        ("compile=true compile_mode=blokcs", "compile_mode='blokcs' is unknown (did you mean 'blocks'?)"),
        ("trainer.max_epochs=1.5", "trainer.max_epochs=1.5: give a whole number or null"),
        ("trainer.precision=int3", "trainer.precision='int3': give"),
        ("trainer.accelerator=tpu", "lightning.pytorch.Trainer(): Requirement 'torch_xla"),
        ("trainer.log_every_n_steps=-1", "trainer.log_every_n_steps=-1: give 0 or more"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0: give 1 or more"),
        ("trainer.val_check_interval=1000", "trainer.val_check_interval=1000: an epoch has 44 batches; give 1 to 44"),
        ("trainer.limit_val_batches=2.5", "trainer: You have passed invalid value 2.5 for limit_val_batches"),
        (f"{W4} callbacks.calibration.batches=-1", "callbacks.calibration.batches=-1: give 1 or more"),
        ("callbacks.scales.every_n_logs=0", "callbacks.scales.every_n_logs=0: give 1 or more"),
        ("callbacks.checkpoints.every_n_steps=0", "callbacks.checkpoints.every_n_steps=0: give 1 or more"),
        ("callbacks=delayed callbacks.fake_quant_start.step=-1", "callbacks.fake_quant_start.step=-1: give 0 or more"),
        (f"{W4} policy.weight.bits=1", "bits=1: give a whole number from 2 to 8"),
        (f"{W4} policy.weight.granularity=group policy.weight.group_size=0", "needs a positive group_size, not 0"),
    ],
)
def test_a_value_out_of_range_is_named_by_its_key(fails, tmp_path, overrides, said):
    (tmp_path / "afile").write_text("x")
    assert said in fails(f"{SHORT} {overrides}")


def test_a_model_that_other_keys_follow_has_to_be_named(fails):
    assert fails("experiment=qlora data.train=afile") == "error: model.name is not given: add model.name=VALUE\n"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("data.seq_len=0", "data.seq_len=0: give 1 or more"),
        ("data.val_fraction=2", "data.val_fraction=2: give a share between 0 and 1"),
        ("data.eval_batch_size=0", "data.eval_batch_size=0: give 1 or more"),
        ("model.args.heads=3", "model.args.heads=3 does not divide model.args.width=8"),
        ("model.args.dropout=2", "model.args.dropout=2: give a number from 0 to 1"),
        ("model.args.context=4", "the model cannot run on these data, shape [16, 16] with numbers up to "),
        ("data=text data.tokenizer=bytes data.train=bytes", "data.train=bytes is no text in UTF-8"),
        ("data=text data.train=bytes", "data.tokenizer is not given"),  # bytes are no tokens of most models
    ],
)
def test_of_text_too(fails, tmp_path, overrides, said):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert said in fails(f"{TEXT} {overrides}")


def test_a_sweep_with_too_many_overrides_for_a_folder_name_can_count_instead(fails, train, tmp_path):
    """Hydra names the folder of a job by its overrides."""
    sweep = f"-m {SHORT} +long={'x' * 300} trainer.max_epochs=0 seed=0,1"
    assert "choose another with hydra.sweep.subdir='${hydra.job.num}'" in fails(sweep)
    train(f"{sweep} hydra.sweep.subdir=${{hydra.job.num}}")
    assert len(list((tmp_path / "runs" / "run").glob("[01]/last.ckpt"))) == 2


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(train, fails, tmp_path, monkeypatch):
    def half(trainer, path):
        path.write_bytes(b"half")
        full_disk()

    train(f"{SHORT} trainer.log_every_n_steps=1")
    run, on = tmp_path / "runs" / "run", f"{SHORT} resume=auto trainer.max_steps=5 trainer.log_every_n_steps=1"
    before = (run / "last.ckpt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", half)
        said = fails(on)
    assert said.startswith(
        f"error: no checkpoint can be written to {Path('runs/run/last.ckpt')}: No space left on device"
    )
    assert "the last one is untouched, and resume=auto goes on" in said
    assert (run / "last.ckpt").read_bytes() == before and not list(run.glob(".*.tmp"))
    with monkeypatch.context() as patch:
        patch.setattr(ResumableCSVLogger, "log_metrics", full_disk)
        assert "the run's folder cannot be written: [Errno 28] No space left" in fails(on)
        patch.setattr(Path, "mkdir", full_disk)
        assert "the run folder cannot be made: No space left on device; choose another" in fails("run_dir=other")
    train(on)


@pytest.mark.parametrize(
    ("overrides", "taken", "said"),
    [
        ("run_dir=x", "x", "the run folder x cannot be made: File exists; choose another with run_dir=DIR"),
        ("run_dir=x", "x/train.log/", "x/train.log cannot be made: Is a directory; choose another with run_dir=DIR"),
        ("run_dir=x", "x/.lock/", "run_dir={here}/x: nothing can be written there (Is a directory): choose another"),
        ("logger.save_dir=x", "x", "logger.save_dir=x: nothing can be written there (File exists): choose another"),
        ("name=x", "runs/x/metrics.csv/", "runs/x/metrics.csv is a folder, and the log would be a file: move it away"),
        ("callbacks.checkpoints.folder=x/y", "x", "callbacks.checkpoints.folder=x/y: nothing can be written there ("),
    ],
)
def test_a_place_that_is_taken_is_one_line_before_training(fails, tmp_path, overrides, taken, said):
    """Checkpoints every 1000 steps, and so hours of work, were lost to a folder that is none."""
    place = tmp_path / taken
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir() if taken.endswith("/") else place.touch()
    assert said.format(here=tmp_path) in fails(f"{SHORT} {overrides}")


def test_a_folder_that_is_lost_while_a_run_trains_is_one_line(train, fails, tmp_path, monkeypatch):
    """What is in the way of the new file is left alone."""
    at_work = f"{SHORT} callbacks.checkpoints.every_n_steps=1"
    train(at_work)
    before = (tmp_path / "runs" / "run" / "last.ckpt").read_bytes()
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda trainer, path: path.mkdir())
    assert "no checkpoint can be written to " in fails(f"{at_work} resume=auto trainer.max_steps=5")
    assert (tmp_path / "runs" / "run" / "last.ckpt").read_bytes() == before


def test_the_progress_bar_can_be_switched_off(train, tmp_path):
    train(f"{SHORT} trainer.enable_progress_bar=false trainer.log_every_n_steps=0")
    assert (tmp_path / "runs" / "run" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.ckpt", "data=digits"], "there is no checkpoint at nowhere.ckpt"),
        (["data=digits", "x"], "'x' is no KEY=VALUE, such as "),
        (["x", "data=digit"], "there is no data=digit (did you mean 'digits'?)"),
        (["x", "data=digits", "data.sourc=x"], "did you mean 'data.source'?"),
        (["x", "data.source=x"], "data=<OPTION>"),
        (["run.ckpt", "data=topics"], "the model cannot run on these data, shape [64, 128]"),
        (["run.ckpt", "data=instructions", "data.val=x"], "data.tokenizer is not given: add data.tokenizer=VALUE"),
        (["run.ckpt", "data=digits", "--device", "foo"], "--device foo: "),
        (["run.ckpt", "data=digits", "--json", "nowhere/x.json"], "--json nowhere/x.json: there is no folder "),
        (["run.ckpt", "data=digits", "--json", "runs"], "--json runs cannot be written: Is a directory"),
    ],
)
def test_evaluate_says_what_is_wrong(train, tmp_path, arguments, said, capsys):
    if "run.ckpt" in arguments:
        train(f"{SHORT} trainer.max_epochs=0")
        (tmp_path / "runs" / "run" / "last.ckpt").rename(tmp_path / "run.ckpt")
        capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate_command.main(arguments)
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and said in line


def test_a_folder_in_place_of_a_checkpoint(tmp_path):
    """A run's, which holds one, or an artifact."""
    with pytest.raises(CheckpointError, match=r"is a folder, and a checkpoint is a file: a run's is RUN/last.ckpt"):
        read_checkpoint(tmp_path)
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(CheckpointError, match=f"is a file: give {tmp_path / 'last.ckpt'}"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("signed", "yes"), ("signed", 1), ("symmetric", None), ("symmetric", "no")]
)
def test_a_spec_takes_no_word_for_true_or_false(field, value):
    with pytest.raises(SpecError, match=f"{field}={value!r}: give True or False"):
        qat.QuantSpec(**{field: value})


class Typed:
    def __init__(self, size: int, rate: float = 0.1, names: list[str] | None = None, free=None, late: "Missing" = 1):  # noqa: F821
        pass


class Inherits(Typed):
    def __init__(self, *args, flag: bool | str = False, **kwargs):
        super().__init__(*args, **kwargs)


def test_types_are_compared_where_hints_say_something():
    def function(size: int, rate: float | torch.Tensor = 0.1, pair: tuple[float, float] = (0, 1), module: type = int):
        pass

    good = {"size": 3, "rate": 1, "pair": [0, 0.5], "module": "anything"}
    assert list(wrong_types(function, {key: good[key] for key in ("size", "rate", "pair")})) == []
    bad = {"size": True, "rate": "x", "pair": [0, "x"]}
    assert list(wrong_types(function, bad)) == [
        ("size", "a whole number"),
        ("rate", "a number"),
        ("pair", "a list, each a number"),
    ]
    assert list(wrong_types(Typed, {"size": "x"})) == []  # one of its hints cannot be evaluated
    assert list(wrong_types(Inherits, {"flag": 3, "unknown": 1})) == [("flag", "true or false or a text")]


@pytest.mark.parametrize(
    "command",
    [
        "convert locked/model --out x",
        "convert locked/last.ckpt --out x",
        "convert runs/run/last.ckpt --out locked/x",
        "evaluate locked/model data=digits",
        f"train {SHORT} name=a init_from=locked/last.ckpt",
        f"train {SHORT} name=a resume=locked/last.ckpt",
        f"train {SHORT} name=a callbacks.checkpoints.folder=locked/x",
    ],
)
def test_a_path_that_this_user_may_not_use_is_one_line(train, tmp_path, capfd, monkeypatch, command):
    locked = tmp_path / "locked"
    train(f"{SHORT} {W4}")
    locked.mkdir()
    locked.chmod(0)
    name, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    capfd.readouterr()
    try:
        if os.access(locked, os.R_OK):
            pytest.skip("this user may use any path")
        try:
            status = import_module(f"qat.{name}").main()
        except SystemExit as stopped:
            status = stopped.code
    finally:
        locked.chmod(0o700)
    line = capfd.readouterr().err
    assert status == 1 and line.startswith("error: ") and line.count("\n") == 1
    assert "locked/" in line and line.endswith(": Permission denied; let this user in, or give another path\n")
