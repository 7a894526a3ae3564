"""The experiments qlora and joint_lora, from the command line's config to what they ship."""

import json
import random
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from random_quantized import LLAMA
from safetensors import SafetensorError
from tiny_tokenizer import WORDS, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import qat
import qat.hf
from qat.adapters import load_adapter
from qat.checkpoint import read_checkpoint
from qat.convert import main as convert
from qat.errors import ArtifactError, CheckpointError, DataError, PolicyError, TrainingError
from qat.evaluate import main
from qat.train import register
from qat.training.evaluation import evaluate
from qat.training.gradient_checkpointing import checkpoint_gradients
from qat.training.instruction_data import InstructionData
from qat.training.run import train

pytest.importorskip("peft")
register()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.manual_seed(0)
    options = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 192, "vocab_size": len(WORDS)}
    LlamaForCausalLM(LlamaConfig(**LLAMA | options)).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    nouns, verbs, pick = ["cat", "dog"], {"cat": "sat", "dog": "ran"}, random.Random(0)
    lines = [
        {"prompt": f"what did the {noun} do", "completion": f"it {verbs[noun]}"} for noun in pick.choices(nouns, k=64)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


COMMON = ["data.train=train.jsonl", "data.seq_len=64", "data.batch_size=2", "trainer.accelerator=cpu", "optim.lr=0.01"]
COMMON += ["trainer.max_epochs=3", "trainer.precision=32-true", "model.dtype=float32", "trainer.log_every_n_steps=1"]


def run(*overrides, common=COMMON):
    with initialize_config_module("qat.conf", version_base="1.3"):
        config = compose("train", [*common, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return train(config)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(1, 17).view(1, 16)).logits


def test_too_few_examples_for_a_batch_are_said_before_the_model_is_read(folder):
    (folder / "train.jsonl").write_text("\n".join((folder / "train.jsonl").read_text().splitlines()[:2]))
    with pytest.raises(DataError, match="fill 1 of the 2 rows of a batch"):
        run("experiment=qlora", "model.name=nowhere", "data.tokenizer=model")


def test_qlora_ships_an_artifact_with_its_adapter(folder, capsys):
    before = run("experiment=qlora", "model.name=model", "name=start", "trainer.max_epochs=0")
    after = run("experiment=qlora", "model.name=model")
    assert after["loss"] < before["loss"]
    assert "artifact" in capsys.readouterr().out
    base = qat.load("runs/qlora/artifact")
    assert all(tensor.nested is not None for tensor in qat.quantized_tensors(base).values())
    plain = qat.load("runs/qlora/artifact")
    model = load_adapter(base, "runs/qlora/artifact/adapter")
    assert not torch.equal(logits(model), logits(plain))
    state = torch.load("runs/qlora/last.ckpt", weights_only=True)["state_dict"]
    assert state and all("lora_" in name for name in state)
    with pytest.raises(CheckpointError, match="an adapter in training"):
        read_checkpoint("runs/qlora/last.ckpt")
    artifact = folder / "runs/qlora/artifact"
    assert AutoTokenizer.from_pretrained(artifact).chat_template == tiny_tokenizer().chat_template
    assert (artifact / "generation_config.json").is_file()
    data = ["data=instructions", "data.train=train.jsonl", "data.tokenizer=model", "data.seq_len=64"]
    losses = {}
    for flags in ([], ["--no-adapter"]):
        main([str(artifact), *data, "--json", "m.json", "--device", "cpu", *flags])
        said = capsys.readouterr().out
        assert ("with the adapter" in said) == (not flags)
        losses[bool(flags)] = json.loads((folder / "m.json").read_text())["loss"]
    assert losses[False] == pytest.approx(after["loss"], rel=1e-5) and losses[True] > losses[False]


def test_lora_on_an_artifact_ships_the_adapter_alone(folder):
    run("experiment=qlora", "model.name=model", "name=start", "trainer.max_epochs=0")
    run(
        "experiment=qlora",
        "model.name=runs/start/artifact",
        "model.policy=null",
        "data.tokenizer=model",
        "adapter.dora=true",
    )
    base = AutoModelForCausalLM.from_pretrained("runs/start/artifact")
    plain = logits(base)
    assert not torch.equal(logits(load_adapter(base, "runs/qlora/adapter")), plain)
    assert not (folder / "runs/qlora/artifact").exists()


def test_a_full_disk_is_said_and_leaves_the_adapter_that_was_there(folder, monkeypatch):
    run("experiment=qlora", "model.name=model", "name=start", "trainer.max_epochs=0")
    on_it = ["experiment=qlora", "model.name=runs/start/artifact", "model.policy=null", "data.tokenizer=model"]
    run(*on_it, "trainer.max_epochs=1")

    def full_disk(tensors, path, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("peft.peft_model.safe_save_file", full_disk)
    before = {file.name: file.read_bytes() for file in Path("runs/qlora/adapter").iterdir()}
    with pytest.raises(ArtifactError, match=r"cannot write .*adapter: .*No space left on device.* is unchanged"):
        run(*on_it, "resume=auto")
    assert {file.name: file.read_bytes() for file in Path("runs/qlora/adapter").iterdir()} == before
    with pytest.raises(ArtifactError, match=r"cannot write .*artifact: .*No space left on device.* nothing was left"):
        run("experiment=qlora", "model.name=model", "name=whole", "trainer.max_epochs=0")


@pytest.mark.parametrize(
    "recipe",
    [
        ["experiment=qlora", "model.name=model"],
        ["experiment=loftq", "adapter.start=cloq", "model.pretrained_model_name_or_path=model"],  # the base anew
    ],
)
def test_an_adapter_run_goes_on_to_the_bit(folder, recipe):
    steps = [*recipe, "callbacks.checkpoints.every_n_steps=1"]
    run(*steps, "name=parts", "trainer.max_steps=2", "trainer.max_epochs=-1", "task.schedule=constant", "task.warmup=0")
    run(*steps, "name=parts", "resume=auto", "trainer.max_epochs=3", "task.schedule=constant", "task.warmup=0")
    run(*steps, "name=constant", "task.schedule=constant", "task.warmup=0")
    ends = [torch.load(f"runs/{name}/last.ckpt", weights_only=True)["state_dict"] for name in ("parts", "constant")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_joint_lora_ships_the_codes_it_trained(folder):
    common = ["experiment=joint_lora", "model.pretrained_model_name_or_path=model"]
    before = run(*common, "name=start", "trainer.max_epochs=0")
    after = run(*common)
    assert after["loss"] < before["loss"]
    start, end = (qat.quantized_tensors(qat.load(f"runs/{name}/artifact")) for name in ("start", "joint_lora"))
    assert any(not torch.equal(start[name].codes, end[name].codes) for name in start)
    assert not (folder / "runs/joint_lora/artifact/adapter").exists()


@pytest.mark.parametrize(("experiment", "start"), [("loftq", []), ("loftq", ["adapter.start=cloq"]), ("qa_lora", [])])
def test_other_adapters_ship_what_they_trained(folder, experiment, start):
    """From a base in train mode, in which alone transformers checkpoints gradients."""
    common = [f"experiment={experiment}", "model.pretrained_model_name_or_path=model", *start]
    modes = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: modes.append(module.training) if torch.is_grad_enabled() else None
    )
    try:
        after = run(*common)
    finally:
        hook.remove()
    assert sum(modes) > len(modes) / 2  # the check of packed rows and qat.load run in eval mode
    shipped = qat.load(f"runs/{experiment}/artifact")
    if experiment == "loftq":
        shipped = load_adapter(shipped, f"runs/{experiment}/artifact/adapter")
    data = InstructionData("train.jsonl", "model", seq_len=64, batch_size=2)
    assert evaluate(shipped, data)["loss"] == pytest.approx(after["loss"], rel=1e-5)


def test_zero_points_trained_on_a_base_in_a_folder_ship_as_an_artifact(folder):
    qat.hf.from_pretrained("model", policy={"weight": {"bits": 4, "group_size": 32}}).save_pretrained("base")
    frozen = ["model=hf_frozen", "model.name=base", "policy=none", "data.tokenizer=model"]
    after = run("experiment=qa_lora", *frozen)
    shipped = qat.load("runs/qa_lora/artifact")
    assert not (folder / "runs/qa_lora/adapter").exists()
    before, tensors = (qat.quantized_tensors(model) for model in (qat.load("base"), shipped))
    assert before.keys() == tensors.keys()
    assert all(torch.equal(before[name].codes, tensors[name].codes) for name in before)
    assert any(tensors[name].zero_point.any() for name in before)
    data = InstructionData("train.jsonl", "model", seq_len=64, batch_size=2)
    assert evaluate(shipped, data)["loss"] == pytest.approx(after["loss"], rel=1e-5)


def test_a_full_run_keeps_its_tokenizer_for_what_ships(folder):
    (folder / "text.txt").write_text("the cat sat on the mat " * 400)
    run(
        *["model=hf", "model.pretrained_model_name_or_path=model", "data=text", "data.train=text.txt", "task=language"],
        *["data.tokenizer=model", "data.seq_len=32", "data.batch_size=4", "policy=lm_w4", "optim=adamw", "name=full"],
        *["trainer.max_steps=1", "trainer.accelerator=cpu"],
        common=[],
    )
    assert convert(["runs/full/last.ckpt", "--out", "out"]) == 0
    assert AutoTokenizer.from_pretrained("out").get_vocab() == tiny_tokenizer().get_vocab()


def test_packing_is_refused_where_examples_would_mix(folder):
    sizes = {"hidden_size": 64, "n_layer": 1, "n_head": 2, "vocab_size": len(WORDS)}
    BloomForCausalLM(BloomConfig(**sizes)).save_pretrained("bloom")
    overrides = ["experiment=qlora", "model.name=bloom", "data.tokenizer=model", "trainer.max_epochs=1"]
    with pytest.raises(DataError, match="BloomForCausalLM lets packed examples attend"):
        run(*overrides, "name=packed")
    run(*overrides, "name=rows", "data.pack=false")


def test_mistakes_are_named(folder):
    with pytest.raises(TrainingError, match=r"from_pretrained\(nowhere/none\): "):
        run("experiment=qlora", "model.name=nowhere/none", "data.tokenizer=model")
    with pytest.raises(PolicyError, match="quantizes nothing: policy=lm_w4"):
        run("experiment=joint_lora", "model.pretrained_model_name_or_path=model", "policy=none")
    with pytest.raises(TrainingError, match="GPT does not support it"):
        run("experiment=topics_fp", "gradient_checkpointing=true", common=[])
    with pytest.raises(TrainingError, match=r"adapter.start=cloq reads calibration data: keep callbacks.calibration"):
        loftq = ["experiment=loftq", "model.pretrained_model_name_or_path=model"]
        run(*loftq, "adapter.start=cloq", "callbacks.calibration=null")
    for blocks in ("3", "0.5", "all"):
        with pytest.raises(TrainingError, match=f"gradient_checkpointing={blocks}: give true, false, or a number of b"):
            run("experiment=qlora", "model.name=model", f"gradient_checkpointing={blocks}")


def test_the_first_blocks_are_checkpointed_and_the_others_keep_what_they_need(folder):
    """The gradients are the same; of what autograd keeps, one block's share goes."""
    tokens = torch.randint(0, len(WORDS), (2, 12), generator=torch.Generator().manual_seed(0))
    grads, kept = [], []
    for blocks in (False, 1, True):
        model = AutoModelForCausalLM.from_pretrained("model").train()
        if blocks:
            checkpoint_gradients(model, blocks)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        kept.append(sum(sizes))
        loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert kept[0] > kept[1] > kept[2] and kept[0] - kept[1] == pytest.approx(kept[1] - kept[2], rel=0.02)
    for other in grads[1:]:
        torch.testing.assert_close(grads[0], other)
