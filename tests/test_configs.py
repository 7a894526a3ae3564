"""Every YAML file composes and instantiates; a wrong key or value gets one clear line."""

import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from torch import nn

import qat
from qat.models import build
from qat.train import register

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
GROUPS = {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in CONF.iterdir() if path.is_dir()}
FILES = [(group, name) for group, names in GROUPS.items() if group != "__pycache__" for name in names]
POLICIES = ("lm_w4", "lm_nf4", "encoder_w4a8", "vit_w4a8")
COMPANIONS = {("model", "gpt"): ["data=topics"]}
COMPANIONS |= {("policy", name): ["data=topics", "model=gpt"] for name in POLICIES}
PATHS = {"train": "somewhere.parquet", "test": "somewhere.parquet", "pretrained_model_name_or_path": "somewhere"}
PATHS |= {"name": "somewhere", "tokenizer": "somewhere"}
register()


def composed(*overrides: str):
    with initialize_config_module("qat.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides))


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "qat.train", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_types_of_what_our_configs_name_are_known():
    found = [word for path in CONF.rglob("*.yaml") for word in re.findall(r"_target_: (qat\.\S+)", path.read_text())]
    assert len(found) > 10
    for target in map(get_object, found):  # a hint that only a type checker sees would let every value pass
        for called in [part.__init__ for part in target.__mro__] if isinstance(target, type) else [target]:
            typing.get_type_hints(called)


@pytest.mark.parametrize(("group", "name"), FILES)
def test_composes(group, name):
    config = composed(f"{group}={name}", *COMPANIONS.get((group, name), []))
    for node in (config.data, config.model):
        for key, value in PATHS.items():
            if key in node:
                node[key] = value
    OmegaConf.resolve(config)
    assert isinstance(OmegaConf.to_object(config.policy), qat.QuantPolicy)
    optimizer = instantiate(config.optim)([nn.Parameter(torch.ones(1))])
    assert isinstance(optimizer, torch.optim.Optimizer)
    for callback in config.callbacks.values():
        instantiate(callback)
    for part in (config.task, config.data, config.trainer, config.logger):
        if part:
            assert callable(instantiate(part, _partial_=True))
    if "builder" in config.model:
        model = build(OmegaConf.to_container(config.model))
        policy = OmegaConf.to_object(config.policy)
        if not policy.quantizes_nothing():
            qat.prepare(model, policy, verbose=False)


@pytest.mark.parametrize("name", GROUPS["experiment"])
def test_experiment_opens_with_its_own_command(name):
    text = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert text[1].startswith(f"# python -m qat.train experiment={name}")


@pytest.mark.parametrize("name", GROUPS["policy"])
def test_policy_file_reads_without_hydra(name):
    assert qat.QuantPolicy.from_yaml(name) == OmegaConf.to_object(composed(f"policy={name}").policy)


def test_bits_from_the_command_line_reach_the_layers():
    config = composed("experiment=cifar10_lsq", "policy.weight.bits=2", "policy.activation.bits=3")
    model = qat.prepare(build(OmegaConf.to_container(config.model)), OmegaConf.to_object(config.policy), verbose=False)
    inner, outer = model.stage1[0].conv1, model.fc
    assert (inner.weight_quantizer.spec.bits, inner.activation_quantizer.spec.bits) == (2, 3)
    assert (outer.weight_quantizer.spec.bits, outer.activation_quantizer.spec.bits) == (8, 8)


MISTAKES = {
    "trainer.max_epoch=3": "unknown key 'trainer.max_epoch' (did you mean 'trainer.max_epochs'?)",
    "modle=cnn": "unknown key 'modle' (did you mean 'model'?)",
    "experiment=qlora model.name=x model.policy={weight:{bits:4}}": "model.policy: Key 'bits' is not in struct",
    "experiment=mnist_fpp": "there is no experiment=mnist_fpp (did you mean 'mnist_fp'?)",
    "policy=conv_w4a4 policy.weight.bits=four": "policy.weight.bits: Value 'four' of type 'str'",
    "policy=conv_w4a4 policy.weight.bit=3": "(did you mean 'policy.weight.bits'?)",
    "policy=none policy.weights.bits=3": "unknown key 'policy.weights.bits' (did you mean 'policy.weight.bits'?)",
    "policy.wild.bits=3": "unknown key 'policy.wild.bits' (known: 'policy.weight', 'policy.activation',",
    "seed=x": "seed: Value 'x' of type 'str' could not be converted to Integer",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistake_found_without_torch_is_one_line(tmp_path, arguments):
    done = run(tmp_path, *arguments.split())
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert MISTAKES[arguments] in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("weights: {bits: 4}", "unknown key 'policy.weights' (did you mean 'weight'?)"),
        ("weight: {bit: 4}", "unknown key 'policy.weight.bit' (did you mean 'bits'?)"),
        ("weight: {bits: four}", "policy.weight.bits: Value 'four' of type 'str' could not be converted to Integer"),
    ],
)
def test_mistake_in_a_file_of_ones_own_is_one_line(tmp_path, written, told):
    (tmp_path / "own" / "policy").mkdir(parents=True)
    (tmp_path / "own" / "policy" / "mine.yaml").write_text(f"# @package policy\n{written}\n")
    done = run(tmp_path, "--config-dir", "own", "policy=mine", "data=digits")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == f"error: policy=mine: {told}\n"


def test_full_error_gives_the_traceback(tmp_path):
    assert "Traceback" in run(tmp_path, "seed=x", HYDRA_FULL_ERROR="1").stderr


def test_config_is_shown_without_torch(tmp_path):
    done = run(tmp_path, "--cfg", "job", "experiment=mnist_w4a4", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "bits: 4" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "lightning", "transformers", "triton", "numpy"}


def test_configs_of_the_users_own_from_another_folder(train, tmp_path, monkeypatch):
    own = tmp_path / "own"
    (own / "experiment").mkdir(parents=True)
    (own / "model").mkdir()
    (own / "model" / "mine.yaml").write_text("_target_: mine_net.Net\nwidth: 5\n")
    (own / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: mine\n  - override /data: digits\n"
        "name: mine\ntrainer: {max_epochs: 1}\n"
    )
    (tmp_path / "mine_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, width):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    train("--config-dir own experiment=mine model.width=7")
    state = torch.load(tmp_path / "runs" / "mine" / "last.ckpt", weights_only=True)["state_dict"]
    assert state["model.1.weight"].shape == (7, 64)


@pytest.mark.clients  # whose packages bring matplotlib
def test_a_machines_first_run_says_nothing_of_fonts(tmp_path):
    pytest.importorskip("matplotlib")
    small = ["experiment=mnist_fp", "data=digits", "trainer.max_steps=0", "callbacks.checkpoints=null"]
    out = run(tmp_path, *small, MPLCONFIGDIR=str(tmp_path / "matplotlib"))
    assert out.returncode == 0 and "metrics" in out.stdout, out.stdout + out.stderr
    assert "fontManager" not in out.stdout + out.stderr
