"""A user's own Lightning data module, from the command line to what ships, and a subclass of one of ours."""

import json

import pytest
import torch

from qat import convert as convert_command
from qat import evaluate as evaluate_command
from qat.checkpoint import read_checkpoint

MODULES = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from qat.training.image_data import ImageData

def pictures():
    x = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, (x.mean((1, 2, 3)) > 0).long()

class Pictures(LightningDataModule):
    def setup(self, stage):
        self.tensors = pictures()
    def train_dataloader(self):
        return DataLoader(TensorDataset(*self.tensors), 16, shuffle=True)
    def val_dataloader(self):
        return DataLoader(TensorDataset(*self.tensors), 40)

class WithIndex(Pictures):
    def train_dataloader(self):
        return DataLoader(TensorDataset(*self.tensors, self.tensors[1]), 16)

class Endless(Pictures):
    def train_dataloader(self):
        class Stream(IterableDataset):
            def __iter__(self):
                return zip(*pictures())
        return DataLoader(Stream(), 16)

class NoValidation(LightningDataModule):
    def train_dataloader(self):
        return []

class Digits(ImageData):
    pass

class Odd(Pictures):  # its targets are in one of the forms that are none
    def __init__(self, form):
        super().__init__()
        self.form = form
    def setup(self, stage):
        x, y = pictures()
        forms = dict(column=y[:, None], one_hot=torch.eye(10)[y], floats=y.float(), negative=y - 1, map=x[:, 0].long())
        self.tensors = x, forms[self.form]

class Late(Pictures):  # the last picture alone is of a class that the model has no output for
    def __init__(self, where):
        super().__init__()
        self.where = where
    def loader(self, which):
        x, y = pictures()
        y[-1] = 99 if which == self.where else 1
        return DataLoader(TensorDataset(x, y), 16)
    def train_dataloader(self):
        return self.loader("train")
    def val_dataloader(self):
        return self.loader("val")

class Alone(Pictures):  # its last batch has one picture
    def train_dataloader(self):
        return DataLoader(TensorDataset(*(part[:33] for part in pictures())), 16)

class Without(Pictures):  # has no loader, or one that gives no batch, where it should
    def __init__(self, which, gives):
        super().__init__()
        self.which, self.gives = which, gives
    def loader(self, which):
        loader = getattr(super(), f"{which}_dataloader")()
        small = DataLoader(loader.dataset, 1000, drop_last=True)
        return loader if which != self.which else dict(none=None, list=[loader] * 2, small=small)[self.gives]
    def train_dataloader(self):
        return self.loader("train")
    def val_dataloader(self):
        return self.loader("val")

class Named(Pictures):  # its inputs are arguments of a forward that takes two
    def collate(self, batch):
        x, y = (torch.stack(part) for part in zip(*batch))
        return {"image": x, "size": x.mean((1, 2, 3))[:, None]}, y
    def train_dataloader(self):
        return DataLoader(TensorDataset(*self.tensors), 16, collate_fn=self.collate)
    val_dataloader = train_dataloader

class InOrder(Pictures):  # they have no names
    def train_dataloader(self):
        x, y = self.tensors
        return DataLoader([((one, one.mean((1, 2))), target) for one, target in zip(x, y)], 16)  # collated to lists
    val_dataloader = train_dataloader

class TwoInputs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.size, self.last = torch.nn.Linear(64, 16), torch.nn.Linear(1, 16), torch.nn.Linear(16, 10)
        self.norm = torch.nn.BatchNorm1d(16)
    def forward(self, image, size):
        return self.last(torch.relu(self.norm(self.first(image.flatten(1)) + self.size(size))))

def scripted():
    return torch.jit.script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))

class Hollow(torch.nn.Module):  # has a layer for inputs that these data do not have
    def __init__(self):
        super().__init__()
        self.first, self.more, self.last = torch.nn.Linear(64, 16), torch.nn.Linear(0, 16), torch.nn.Linear(16, 10)
    def forward(self, x):
        x = x.flatten(1)
        return self.last(self.first(x) + self.more(x[:, :0]))

class Outputs(torch.nn.Module):  # gives what are no logits, in training
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(64, 10), torch.nn.Linear(10, 10)
    def forward(self, x):
        y = self.last(self.first(x.flatten(1)))
        return (y, y) if self.training else y
"""
SHORT = "policy=conv_w4a4 model.args.width=4 trainer.accelerator=cpu"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The words that choose a class of MODULES, whose configs lie in a folder of the user's."""
    (tmp_path / "their_data.py").write_text(MODULES)
    folder = tmp_path / "configs" / "data"
    folder.mkdir(parents=True)
    for name in (
        "Pictures",
        "WithIndex",
        "Endless",
        "NoValidation",
        "Nowhere",
        "Odd",
        "Late",
        "Alone",
        "Without",
        "Named",
        "InOrder",
    ):
        (folder / f"{name}.yaml").write_text(f"_target_: their_data.{name}\n")
    (tmp_path / "configs" / "model").mkdir()
    (tmp_path / "configs" / "model" / "outputs.yaml").write_text("_target_: their_data.Outputs\n")
    (tmp_path / "configs" / "model" / "two_inputs.yaml").write_text("_target_: their_data.TwoInputs\n")
    (tmp_path / "configs" / "model" / "hollow.yaml").write_text("_target_: their_data.Hollow\n")
    (tmp_path / "configs" / "model" / "no_model.yaml").write_text("_target_: their_data.pictures\n")
    (tmp_path / "configs" / "model" / "scripted.yaml").write_text("_target_: their_data.scripted\n")
    (folder / "NoModule.yaml").write_text("_target_: builtins.dict\n")
    (folder / "Digits.yaml").write_text(
        "_target_: their_data.Digits\nsource: digits\nbatch_size: 32\nmean: [0.305]\nstd: [0.376]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name: f"--config-dir {tmp_path / 'configs'} data={name} {SHORT}"


def test_from_training_to_what_ships(own, train, verify_here, tmp_path, capsys):
    train(f"{own('Pictures')} callbacks=batch_norm trainer.max_epochs=8 trainer.log_every_n_steps=1")
    assert "calibrated 5 activation step sizes" in capsys.readouterr().out
    run = tmp_path / "runs" / "run"
    example = read_checkpoint(run / "last.ckpt").example
    assert example["shape"] == [1, 8, 8] and example["dtype"] == "float32" and example["low"] < -2
    rates = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    last = [row[rates[0].index("lr")] for row in rates if row[rates[0].index("lr")]][-1]
    assert float(last) < 0.001  # the cosine has come to its end: steps were counted

    assert convert_command.main([str(run / "last.ckpt"), "--out", str(run / "artifact"), "--verify"]) == 0
    measured = ["data=Pictures", "--config-dir", str(tmp_path / "configs"), "--json", str(tmp_path / "m.json")]
    evaluate_command.main([str(run / "artifact"), *measured])
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    assert json.loads((tmp_path / "m.json").read_text()) == pytest.approx(metrics) and metrics["accuracy"] > 0.7


def test_a_subclass_of_ours_is_measured_where_no_validation_ended_the_run(own, train, tmp_path):
    train(f"{own('Digits')} trainer.max_steps=2")
    assert (tmp_path / "runs" / "run" / "result.json").is_file()


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("WithIndex", "", "a batch of the data is 3 parts: give (inputs, targets)"),
        ("WithIndex", "policy=none", "a batch of the data is 3 parts: give (inputs, targets)"),
        ("NoValidation", "", "data=NoValidation has no val_dataloader"),
        ("NoModule", "", "data=dict: give a LightningDataModule"),
        ("Endless", "", "a schedule needs an end"),
        ("Nowhere", "", "data._target_=their_data.Nowhere cannot be found"),
        ("Odd", "+data.form=column", "targets have the shape [16, 1] and the model's logits [16, 10]: give one class"),
        ("Odd", "+data.form=column policy=none trainer.max_epochs=0", "targets have the shape [40, 1]"),
        ("Odd", "+data.form=one_hot", "the data's targets are torch.float32: give class numbers, a tensor of int64"),
        ("Odd", "+data.form=floats", "the data's targets are torch.float32"),
        ("Odd", "+data.form=negative", "the data have a target -1: classes are whole numbers from 0"),
        ("Odd", "+data.form=map", "targets have the shape [16, 8, 8]"),
        ("Late", "+data.where=train", "the data have a target 99, and the model has outputs for 0 to 9"),
        ("Late", "+data.where=val", "the data have a target 99, and the model has outputs for 0 to 9"),
        ("Late", "+data.where=val trainer.max_epochs=0", "the data have a target 99, and the model has outputs"),
        (
            "Named",
            "",
            "image [16, 1, 8, 8], size [16, 1]: ConvNet.forward() got an unexpected keyword argument 'image'",
        ),
        ("InOrder", "", "[16, 1, 8, 8], [16, 1]: ConvNet.forward() takes 2 positional arguments but 3 were given"),
        ("InOrder", "task.mixup=0.2", "task.mixup=0.2 adds up shares of two images, each a tensor of floats"),
        ("Named", "task.mixup=0.2", "task.mixup=0.2 adds up shares of two images, each a tensor of floats"),
        ("Alone", "", "a training batch of one example is too small for batch norm"),
        ("Without", "+data.which=train +data.gives=none", "data=Without: train_dataloader gives None: give a loader"),
        ("Without", "+data.which=train +data.gives=list", "train_dataloader gives a list: give one loader"),
        ("Without", "+data.which=train +data.gives=small policy=none", "train_dataloader has no batch"),
        ("Without", "+data.which=val +data.gives=none", "data=Without: val_dataloader gives None: give a loader"),
        ("Without", "+data.which=val +data.gives=list", "val_dataloader gives a list: give one loader"),
        ("Without", "+data.which=val +data.gives=small", "val_dataloader has no batch"),
    ],
)
def test_what_cannot_be_read_from_is_one_line(own, fails, name, more, said):
    assert said in fails(f"{own(name)} {more}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("outputs", "the model gives a tuple: let it give its logits, a tensor"),
        ("no_model", "model._target_=their_data.pictures gives a tuple: name what gives a torch.nn.Module"),
        ("scripted", "is a ScriptModule, which torch has compiled: give the model it was made from"),
    ],
)
@pytest.mark.parametrize("policy", ["none", "conv_w4a4"])
def test_a_model_that_cannot_train_is_one_line(own, fails, name, said, policy):
    own_configs = " ".join(own("Pictures").split()[:3])
    if (name, policy) != ("scripted", "none"):  # which trains as it is
        assert said in fails(f"{own_configs} model={name} policy={policy} trainer.accelerator=cpu")


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_model_with_an_empty_layer_trains_and_ships(own, train, verify_here, tmp_path):
    configs = " ".join(own("Pictures").split()[:3])
    train(f"{configs} model=hollow policy=conv_w4a4 trainer.accelerator=cpu trainer.max_epochs=1")
    run = tmp_path / "runs" / "run"
    command = [str(run / "last.ckpt"), "--model", "their_data:Hollow", "--out", str(run / "artifact"), "--verify"]
    assert convert_command.main(command) == 0


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_network_of_the_users_own_teaches_another(own, train, fails, tmp_path):
    """Its checkpoint names no architecture: it is built as the one that trains."""
    configs = f"{' '.join(own('Named').split()[:3])} trainer.accelerator=cpu trainer.max_epochs=1"
    train(f"{configs} model=two_inputs name=teacher trainer.max_epochs=4")
    teacher = tmp_path / "runs" / "teacher" / "last.ckpt"
    losses = []
    for more in ("", f"teacher={teacher}"):
        train(f"{configs} model=two_inputs policy=conv_w4a4 init_from={teacher} name=w4{len(losses)} {more}")
        losses.append(
            json.loads((tmp_path / "runs" / f"w4{len(losses)}" / "result.json").read_text())["metrics"]["loss"]
        )
    assert losses[0] != losses[1]
    said = fails(f"{configs} model=hollow data=Pictures name=other teacher={teacher}")
    assert f"{teacher} does not fit Hollow: missing more.bias" in said


@pytest.mark.parametrize("data", ["Named", "InOrder"])
def test_several_inputs_are_arguments_of_the_forward(own, train, verify_here, tmp_path, capsys, data):
    configs = " ".join(own(data).split()[:3])
    more = "callbacks=batch_norm trainer.max_epochs=4"
    train(f"{configs} model=two_inputs policy=conv_w4a4 trainer.accelerator=cpu {more}")
    said = capsys.readouterr().out
    assert "warning" not in said  # a random example of both reached every layer
    run = tmp_path / "runs" / "run"
    assert json.loads((run / "result.json").read_text())["metrics"]["accuracy"] > 0.7
    command = [str(run / "last.ckpt"), "--model", "their_data:TwoInputs", "--out", str(run / "artifact"), "--verify"]
    assert convert_command.main(command) == 0
    assert "output            differs by at most 0 (" in capsys.readouterr().out
    evaluate_command.main([str(run / "artifact"), "--model", "their_data:TwoInputs", *configs.split()])
    assert float(capsys.readouterr().out.split("accuracy ")[1].split()[0]) > 0.7


@pytest.mark.clients
@pytest.mark.parametrize("data", ["Named", "InOrder"])
def test_several_inputs_of_a_run_ship_to_onnxruntime(own, train, tmp_path, capsys, data):
    pytest.importorskip("onnxruntime")
    configs = " ".join(own(data).split()[:3])
    train(f"{configs} model=two_inputs policy=conv_w4a4 trainer.accelerator=cpu trainer.max_epochs=1")
    checkpoint = str(tmp_path / "runs" / "run" / "last.ckpt")
    words = ["--to", "onnx", "--model", "their_data:TwoInputs", "--out", str(tmp_path / "out"), "--verify"]
    assert convert_command.main([checkpoint, *words]) == 0
    assert "it takes image [batch, 1, 8, 8], size [batch, 1]" in capsys.readouterr().out


def test_an_endless_loader_ends_with_max_steps(own, train, tmp_path):
    train(f"{own('Endless')} trainer.max_steps=3")
    assert torch.load(tmp_path / "runs" / "run" / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("data=Odd data.fom=x", "unknown key 'data.fom' (did you mean 'data.form'?)"),
        ("experiment=theirs data.fom=x", "did you mean 'data.form'?"),
        ("experiment=theirs policy.weight.bitz=3", "did you mean 'policy.weight.bits'?"),
    ],
)
@pytest.mark.parametrize("flag", ["--config-dir {}", "--config-dir={}"])
def test_a_key_of_a_users_own_configs_is_suggested(own, fails, tmp_path, overrides, said, flag):
    folder = tmp_path / "configs"
    (folder / "data" / "Odd.yaml").write_text("_target_: their_data.Odd\nform: column\n")
    (folder / "experiment").mkdir()
    (folder / "experiment" / "theirs.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /data: Odd\n  - override /policy: conv_w4a4\n"
    )
    assert said in fails(f"{flag.format(folder)} {overrides}")


def test_evaluate_suggests_such_a_key(own, tmp_path, capsys):
    (tmp_path / "configs" / "data" / "Odd.yaml").write_text("_target_: their_data.Odd\nform: column\n")
    with pytest.raises(SystemExit):
        evaluate_command.main(["x", "data=Odd", "data.fom=x", "--config-dir", str(tmp_path / "configs")])
    assert "did you mean 'data.form'?" in capsys.readouterr().err


def test_evaluate_names_a_config_folder_that_is_not_there(own, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate_command.main(["x", "data=Pictures", "--config-dir", str(tmp_path / "nowhere")])
    assert "there is no such folder" in capsys.readouterr().err
