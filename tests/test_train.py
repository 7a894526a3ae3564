"""The command line from full precision to a measured 4-bit model."""

import csv
import json
import math
import zipfile
from importlib import import_module

import pytest
import torch

import qat
from qat import convert as convert_command
from qat import evaluate as evaluate_command
from qat.checkpoint import read_checkpoint
from qat.errors import CheckpointError
from qat.quantizers import LearnedStepSize
from qat.training.evaluation import evaluate
from qat.training.image_data import ImageData

DIGITS = "data=digits model.args.width=4 trainer.accelerator=cpu"
SHORT = f"{DIGITS} trainer.max_steps=3 trainer.limit_val_batches=1"


def test_from_full_precision_to_a_measured_4_bit_model(train, tmp_path, capsys):
    train(f"{DIGITS} trainer.max_epochs=4 name=fp")
    quantized = f"{DIGITS} policy=conv_w4a4 init_from=runs/fp/last.ckpt"
    train(f"{quantized} trainer.max_epochs=0 policy.init=minmax name=rtn")
    train(f"{quantized} trainer.max_epochs=2 optim.lr=0.02 name=w4a4")
    printed = capsys.readouterr().out
    checkpoint = tmp_path / "runs" / "w4a4" / "last.ckpt"
    assert f"next        python -m qat.convert {checkpoint}" in printed
    assert "calibrated 5 activation step sizes on 8 batches" in printed

    accuracy = {}
    for name in ("fp", "rtn", "w4a4"):
        out = tmp_path / f"{name}.json"
        evaluate_command.main([str(tmp_path / "runs" / name / "last.ckpt"), "data=digits", "--json", str(out)])
        accuracy[name] = json.loads(out.read_text())["accuracy"]
        assert f"accuracy {accuracy[name]:.4f}  loss" in printed
        assert f"accuracy {accuracy[name]:.4f}\n" in capsys.readouterr().out
    assert accuracy["fp"] > 0.9 and accuracy["w4a4"] > accuracy["fp"] - 0.05

    start, trained = (read_checkpoint(tmp_path / "runs" / name / "last.ckpt") for name in ("rtn", "w4a4"))
    full = read_checkpoint(tmp_path / "runs" / "fp" / "last.ckpt").state_dict
    assert torch.equal(start.state_dict["classifier.weight"], full["classifier.weight"])
    assert trained.example["shape"] == [1, 8, 8]
    assert all(m.is_initialised for m in trained.build().modules() if isinstance(m, LearnedStepSize))
    data = ImageData("digits", [0.305], [0.376], 32)
    frozen = qat.freeze(trained.build())
    assert evaluate(frozen, data)["accuracy"] == pytest.approx(accuracy["w4a4"])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_what_a_run_prints_is_what_its_artifact_is_measured_by(train, tmp_path, precision):
    """Also where it trains under autocast, which moved the accuracy of 2 bits by half a point."""
    train(f"{DIGITS} policy=conv_w4a4 policy.weight.bits=2 trainer.max_epochs=1 trainer.precision={precision}")
    run, out = tmp_path / "runs" / "run", tmp_path / "out.json"
    assert convert_command.main([str(run / "last.ckpt"), "--out", str(run / "artifact")]) == 0
    evaluate_command.main([str(run / "artifact"), "data=digits", "--json", str(out)])
    assert json.loads((run / "result.json").read_text())["metrics"] == pytest.approx(json.loads(out.read_text()))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("policy.weight.bits=3", "the run to resume has policy.weight={'bits': 4"),
        ("policy=none", "the run to resume has policy.weight={"),
        ("policy.activation_quantizer=pact", "has policy.activation_quantizer=lsq, and this one pact: resume with"),
        ("model.args.width=6", "the run to resume has another model (size mismatch for model.features.0.0.weight"),
        ("seed=3", "has data.seed=0, and this one 3: resume with that, or with the seed=0 that it follows"),
    ],
)
def test_a_run_goes_on_with_what_it_began_with(train, fails, more, said):
    train(f"{SHORT} policy=conv_w4a4 trainer.max_steps=1 name=a")
    assert said in fails(f"{SHORT} policy=conv_w4a4 trainer.max_steps=2 name=a resume=auto {more}")
    train(f"{SHORT} policy=conv_w4a4 policy.init=mse trainer.max_steps=2 name=a resume=auto")


@pytest.mark.parametrize(
    ("steps", "missed"), [(1, ": of this epoch some examples come twice"), (44, "; to go on to the bit, resume")]
)
def test_a_resumed_run_says_that_its_batches_are_others(train, capsys, steps, missed):
    """In silence it would be another run than the one that was killed."""
    short = f"{DIGITS} trainer.limit_val_batches=1 trainer.max_epochs=2 name=a"
    train(f"{short} trainer.max_steps={steps}")
    train(f"{short} trainer.max_steps={steps + 1} data.batch_size=64 resume=auto")
    line = f"changed     data.batch_size 32 -> 64{missed}"
    assert line in capsys.readouterr().out
    train(f"{short} trainer.max_steps={steps + 2} data.batch_size=64 resume=auto")
    assert "changed" not in capsys.readouterr().out


def test_a_damaged_checkpoint_of_the_run_is_named(train, fails, tmp_path):
    train(f"{SHORT} trainer.max_steps=1 name=a")
    last = tmp_path / "runs" / "a" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    assert f"resume={last} is damaged, or no checkpoint; resume=PATH takes another" in fails(
        f"{SHORT} name=a resume=auto"
    )


@pytest.mark.parametrize("where", ["tensor", "index", "pickle"])
def test_a_checkpoint_with_another_bit_is_refused_wherever_it_is_read(where, train, fails, tmp_path):
    """torch.load looks at no checksum: a changed weight was trained on in silence."""
    train(f"{SHORT} trainer.max_steps=1 name=a")
    last = tmp_path / "runs" / "a" / "last.ckpt"
    with zipfile.ZipFile(last) as file:
        entries = {entry.filename: entry for entry in file.infolist()}
        largest = max(entries.values(), key=lambda entry: entry.file_size)
        pickled = next(entry for name, entry in entries.items() if name.endswith("data.pkl"))
        at = {"tensor": largest.header_offset, "pickle": pickled.header_offset, "index": file.start_dir - 182}
    content = bytearray(last.read_bytes())
    content[at[where] + 200] ^= 4
    last.write_bytes(content)
    assert f"resume={last} is damaged, or no checkpoint; " in fails(f"{SHORT} name=a resume=auto")
    for use in (f"init_from={last}", f"teacher={last}"):
        assert f"{last} cannot be read: it is no checkpoint, or damaged: " in fails(f"{SHORT} name=b {use}")
    assert not (tmp_path / "runs" / "b" / "last.ckpt").exists()
    with pytest.raises(CheckpointError, match="cannot be read: it is no checkpoint, or damaged: "):
        read_checkpoint(last)  # as python -m qat.convert and qat.evaluate do


def test_a_finished_run_is_not_overwritten_and_can_be_resumed_further(train, fails, tmp_path):
    short = f"{SHORT} trainer.log_every_n_steps=1"
    train(f"{short} name=a resume=auto")
    assert "holds a checkpoint already: add resume=auto" in fails(f"{SHORT} name=a")
    log = (tmp_path / "runs" / "a" / "metrics.csv").read_text()
    train(f"{short} name=a resume=auto")
    assert (tmp_path / "runs" / "a" / "metrics.csv").read_text() == log
    train(f"{short} name=a resume=auto trainer.max_steps=5")
    assert torch.load(tmp_path / "runs" / "a" / "last.ckpt", weights_only=True)["global_step"] == 5


@pytest.mark.parametrize("average", ["StochasticWeightAveraging,swa_lrs:0.05,swa_epoch_start:1", "EMAWeightAveraging"])
def test_averaged_weights_are_saved_and_measured(train, tmp_path, monkeypatch, average):
    """Also where the last step was saved before Lightning's callbacks average, and no batch norm asks for an epoch."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "their_model.py").write_text(
        "from torch.nn import *\nnet = lambda: Sequential(Flatten(), Linear(64, 32), ReLU(), Linear(32, 10))\n"
    )
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "own.yaml").write_text("_target_: their_model.net\n")
    own = "--config-dir configs model=own data=digits policy=conv_w4a4 trainer.accelerator=cpu trainer.max_epochs=3"
    callback = f"+callbacks.mine={{_target_:lightning.pytorch.callbacks.{average}}} trainer.limit_train_batches=4"
    for every in (4, 1000):
        train(f"{own} {callback} name={every} callbacks.checkpoints.every_n_steps={every}")
    said = [json.loads((tmp_path / "runs" / every / "result.json").read_text())["metrics"] for every in ("4", "1000")]
    saved = [read_checkpoint(tmp_path / "runs" / every / "last.ckpt") for every in ("4", "1000")]
    assert all(torch.equal(value, saved[1].state_dict[name]) for name, value in saved[0].state_dict.items())
    measured = evaluate(
        saved[0].build(import_module("their_model").net()),
        ImageData("digits", [0.305], [0.376], batch_size=32, eval_batch_size=500),
    )
    assert said == [measured, measured]


def test_a_resumed_run_takes_the_options_of_its_optimizer_from_its_own_overrides(train, tmp_path, capsys):
    short = f"{SHORT} name=a trainer.log_every_n_steps=1 task.warmup=0 task.step_size_lr_scale=0.5 policy=conv_w4a4"
    train(f"{short} task.schedule=constant")
    capsys.readouterr()
    train(f"{short} trainer.max_steps=6 resume=auto optim.lr=0.02 optim.weight_decay=0.125 optim.momentum=0.5")
    printed = capsys.readouterr().out
    assert "changed     optim: lr 0.1 -> 0.02 (weights, biases)\n" in printed
    assert "changed     optim: lr 0.05 -> 0.01 (step_sizes)\n" in printed
    assert "weight_decay 0.0005 -> 0.125 (weights)\n" in printed and "momentum 0.9 -> 0.5 (weights, " in printed
    with (tmp_path / "runs" / "a" / "metrics.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file) if row["lr"]]
    cosine = [0.01 * (1 + math.cos(math.pi * step / 6)) for step in (4, 5, 6)]  # the log has the next step's
    assert rates == pytest.approx([0.1] * 3 + cosine, abs=1e-9)
    groups = torch.load(tmp_path / "runs" / "a" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [(group["weight_decay"], group["momentum"]) for group in groups] == [(0.125, 0.5), (0.0, 0.5), (0.0, 0.5)]
    train(f"{short} trainer.max_steps=7 resume=auto optim.lr=0.02 optim.weight_decay=0.125 optim.momentum=0.5")
    assert "changed" not in capsys.readouterr().out


@pytest.mark.parametrize(("first", "then"), [("sgd", "adamw"), ("adamw", "sgd"), ("adamw", "adamw optim.amsgrad=true")])
def test_a_resumed_run_with_another_optimizer_is_one_line(train, fails, first, then):
    train(f"{SHORT} name=a optim={first}" + " +optim.amsgrad=false" * ("amsgrad" in then))
    then = then.replace(" optim", " +optim")
    assert "the run to resume has another optimizer (with " in fails(f"{SHORT} name=a resume=auto optim={then}")


def test_a_checkpoint_of_weights_alone_is_not_resumed(train, fails, tmp_path):
    keeper = "{_target_:lightning.pytorch.callbacks.ModelCheckpoint,dirpath:mine,filename:w,save_weights_only:true}"
    train(f"{SHORT} name=a +callbacks.mine={keeper} trainer.max_epochs=1 trainer.max_steps=-1")
    assert "has no optimizer_states: it " in fails(f"{SHORT} name=b resume={tmp_path / 'mine' / 'w.ckpt'}")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "other.ckpt")
    assert "has no qat: it is not of python -m qat.train" in fails(f"{SHORT} name=b resume={tmp_path / 'other.ckpt'}")


def test_a_folder_of_checkpoints_elsewhere_is_looked_into(train, fails, tmp_path, capfd):
    elsewhere = f"{SHORT} name=a callbacks.checkpoints.folder={tmp_path / 'disk'}"
    train(elsewhere)
    last = tmp_path / "disk" / "last.ckpt"
    assert f"checkpoint  {last}" in capfd.readouterr().out
    assert f"{tmp_path / 'disk'} holds a checkpoint already: add resume=auto" in fails(elsewhere)
    train(f"{elsewhere} resume=auto trainer.max_steps=5")
    assert torch.load(last, weights_only=True)["global_step"] == 5
    assert "calibrated" not in capfd.readouterr().out


def test_a_trial_of_one_batch_leaves_nothing_in_the_way_of_the_run(train, tmp_path, capsys):
    train(f"{SHORT} name=a +trainer.fast_dev_run=true")
    assert "checkpoint  none was saved\n" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "a" / "result.json").exists()
    train(f"{SHORT} name=a")
    assert torch.load(tmp_path / "runs" / "a" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_early_stopping_by_a_metric_that_is_not_there_is_one_line(fails):
    stopping = "{_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:val/acc}"
    said = fails(f"{DIGITS} name=a trainer.max_epochs=1 trainer.limit_train_batches=1 +callbacks.early={stopping}")
    assert "`val/acc` which is not available" in said and "`val/accuracy`" in said


def test_a_run_without_checkpoints_names_none(train, tmp_path, capsys):
    train(f"{SHORT} name=a callbacks.checkpoints=null")
    printed = capsys.readouterr().out
    assert "checkpoint  none was saved\n" in printed and "next" not in printed
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_a_run_depends_on_its_seed_alone(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(f"{SHORT} policy=conv_w4a4 name={name} seed={seed}")
    a, b, c = (read_checkpoint(tmp_path / "runs" / name / "last.ckpt").state_dict for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["classifier.weight"], c["classifier.weight"])


def test_checkpoint_of_another_shape_is_refused(train, fails):
    train(f"{SHORT} name=small")
    line = fails(f"{SHORT} name=large model.args.width=8 init_from=runs/small/last.ckpt")
    assert (
        "init_from=runs/small/last.ckpt does not fit ConvNet" in line
        and "[10, 16] there, [10, 32] in the model" in line
    )


def test_a_quantized_run_can_start_another_one(train, tmp_path):
    train(f"{SHORT} name=w4 policy=conv_w4a4")
    train(f"{SHORT} name=w2 policy=conv_w4a4 policy.weight.bits=2 init_from=runs/w4/last.ckpt trainer.max_epochs=0")
    w4, w2 = (read_checkpoint(tmp_path / "runs" / name / "last.ckpt").state_dict for name in ("w4", "w2"))
    assert torch.equal(w4["features.1.0.weight"], w2["features.1.0.weight"])
    scales = "features.1.0.weight_quantizer.step_size"
    assert (w4[scales] < w2[scales]).all()


def test_jobs_of_a_sweep_have_their_own_folders(train, tmp_path):
    train(f"-m {SHORT} name=sweep seed=1,2")
    assert len(list((tmp_path / "runs" / "sweep").glob("*/last.ckpt"))) == 2


def test_artifact_and_checkpoint_measure_the_same(train, tmp_path, capsys):
    train(f"{DIGITS} policy=conv_w4a4 trainer.max_epochs=1 name=a")
    checkpoint = tmp_path / "runs" / "a" / "last.ckpt"
    qat.save(qat.freeze(read_checkpoint(checkpoint).build()), tmp_path / "artifact")
    for path in (checkpoint, tmp_path / "artifact"):
        evaluate_command.main([str(path), "data=digits", "--json", str(tmp_path / f"{path.stem}.json")])
    assert (tmp_path / "last.json").read_text() == (tmp_path / "artifact.json").read_text()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_model_in_16_bits_learns_from_images_and_is_measured(train, tmp_path, capsys, precision):
    """Data are float32: neither calibration, nor a teacher, nor what measured at the end or later took them."""
    short = f"{DIGITS} trainer.precision={precision} trainer.max_epochs=3 trainer.check_val_every_n_epoch=2"
    train(f"{short} name=fp")
    train(f"{short} name=a policy=conv_w4a4 init_from=runs/fp/last.ckpt teacher=runs/fp/last.ckpt")
    assert "not checked" not in capsys.readouterr().out
    checkpoint = tmp_path / "runs" / "a" / "last.ckpt"
    trained = read_checkpoint(checkpoint)
    assert trained.state_dict["classifier.weight"].itemsize == 2
    qat.save(qat.freeze(trained.build()), tmp_path / "artifact")
    for path in (checkpoint, tmp_path / "artifact"):
        evaluate_command.main([str(path), "data=digits", "--json", str(tmp_path / f"{path.stem}.json")])
    measured = json.loads((tmp_path / "artifact.json").read_text())
    assert json.loads((tmp_path / "last.json").read_text()) == measured and measured["accuracy"] > 0.8


@pytest.mark.parametrize("end", ["trainer.check_val_every_n_epoch=2", "callbacks=batch_norm"])
def test_the_metrics_printed_are_those_of_the_final_weights(train, tmp_path, capsys, end):
    """Also where the last validation was before the last epoch, or the end of training changed something after it."""
    few = "trainer.max_epochs=3 trainer.limit_train_batches=8"
    train(f"{DIGITS} model.builder=resnet20 model.args.width=2 policy=conv_w4a4 {few} name=a {end}")
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("metrics"))
    evaluate_command.main([str(tmp_path / "runs" / "a" / "last.ckpt"), "data=digits"])
    assert printed.split()[1:] == capsys.readouterr().out.split()


def test_a_model_of_transformers_trains_in_training_mode(train, tmp_path, recwarn):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(tmp_path / "plain")
    train(
        "model=hf model.pretrained_model_name_or_path=plain data=topics data.seq_len=16 policy=lm_w4 task=language "
        "optim=adamw trainer.accelerator=cpu trainer.max_steps=2 trainer.limit_val_batches=1 data.val_fraction=0.001"
    )
    assert not [warning for warning in recwarn if "eval mode" in str(warning.message)]
    assert qat.quantized_tensors(read_checkpoint(tmp_path / "runs" / "run" / "last.ckpt").build())


def test_a_model_in_any_format_is_measured(train, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    train(f"{DIGITS} policy=conv_w4a4 trainer.max_epochs=1")
    run = tmp_path / "runs" / "run"
    assert convert_command.main([str(run / "last.ckpt"), "--to", "onnx", "--out", str(run / "onnx")]) == 0
    results = []
    for path in (run / "last.ckpt", run / "onnx", run / "onnx" / "model.onnx"):
        capsys.readouterr()
        evaluate_command.main([str(path), "data=digits"])
        results.append(capsys.readouterr().out)
    assert results[0] == results[1] == results[2] and "accuracy" in results[0]
    with pytest.raises(SystemExit):
        evaluate_command.main([str(run), "data=digits"])
    assert f"of a run's folder, give {run / 'last.ckpt'}" in capsys.readouterr().err


def test_a_model_of_the_users_own(train, tmp_path, monkeypatch, capsys):
    """Its checkpoint cannot name its architecture: what convert has to be told is printed; evaluate takes it too."""
    (tmp_path / "their_nets.py").write_text(
        "from torch import nn\n"
        "def small(width=8):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    folder = tmp_path / "configs" / "model"
    folder.mkdir(parents=True)
    (folder / "small.yaml").write_text("_target_: their_nets.small\n")
    (folder / "wide.yaml").write_text("_target_: their_nets.small\nwidth: 16\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = f"--config-dir {tmp_path / 'configs'} data=digits policy=conv_w4a4 trainer.max_epochs=1"
    train(f"{own} model=wide name=wide")
    said = " --model package.module:function  # of your own, which gives this Sequential untrained\n"
    assert said in capsys.readouterr().out
    train(f"{own} model=small name=small")
    assert " --model their_nets:small\n" in capsys.readouterr().out

    run = tmp_path / "runs" / "small"
    assert convert_command.main([str(run / "last.ckpt"), "--out", str(run / "out"), "--model", "their_nets:small"]) == 0
    results = []
    for path in (run / "last.ckpt", run / "out"):
        capsys.readouterr()
        evaluate_command.main([str(path), "data=digits", "--model", "their_nets:small"])
        results.append(capsys.readouterr().out)
    assert results[0] == results[1] and "accuracy" in results[0]
    with pytest.raises(SystemExit):
        evaluate_command.main([str(run / "out"), "data=digits"])
    assert "on the command line --model package.module:function" in capsys.readouterr().err
