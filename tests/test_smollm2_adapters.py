"""recipes/smollm2_adapters.py: its commands compose, its text is split, its bars are the ones asked for."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from random_quantized import LLAMA
from test_smollm2_comparison import RECIPES, load
from tiny_tokenizer import WORDS, tiny_tokenizer

from qat.train import register

register()


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return load("smollm2_adapters")


def options(recipe, monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", ["x", "--train", "text.txt", *more])
    return recipe.arguments()


def test_every_row_composes_trains_alike_and_runs_after_its_base(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "find_spec", lambda name: name)
    more = ["--lr", "1e-4", "1e-3", "--starts", "minmax", "gptq", "--bases", "minmax", "gptq", "loftq", "cloq"]
    given, trained, done = options(recipe, monkeypatch, *more), [], []

    def run(name, commands, weight=1):
        assert name.count("_") < 2 or not name.startswith("lora") or name.rsplit("_", 1)[0] in done
        done.append(name)
        for program, *arguments in commands:
            overrides = [text for text in arguments if "=" in text]
            if program in ("qat.train", "qat.evaluate"):
                with initialize_config_module("qat.conf", version_base="1.3"):
                    config = compose(program.removeprefix("qat."), overrides)
                if program == "qat.train" and config.trainer.max_steps:
                    trained.append(config)
        given.rows.file(name).write_text(json.dumps({"loss": 2.0, "perplexity": 7.4}))

    monkeypatch.setattr(given.rows, "run", run)
    with ThreadPoolExecutor(1) as pool:
        rows = [future.result(timeout=60) for future in recipe.plan(pool, given)]
    assert len(rows) == len(done) == len(set(done)) == 1 + 2 * (1 + 2 + 4 + 2 + 1 + 2)
    assert len(trained) == 18
    for key in ("data", "task.schedule", "trainer.precision", "trainer.max_steps", "optim.weight_decay", "optim.betas"):
        found = [OmegaConf.select(config, key) for config in trained]
        assert all(value == found[0] for value in found), key
    assert {(config.adapter.rank, config.adapter.alpha, config.gradient_checkpointing) for config in trained} == {
        (16, 32, False)
    }
    assert sorted({config.optim.lr for config in trained}) == [1e-4, 1e-3]


def test_held_out_text_is_none_that_trains(recipe, monkeypatch, tmp_path):
    lines = [f"line {index}\n" for index in range(1234)]
    Path("text.txt").write_text("".join(lines))
    recipe.BASE.mkdir(parents=True)
    recipe.prepare(options(recipe, monkeypatch))
    train, held_out = (path.read_text().splitlines(keepends=True) for path in (recipe.TRAIN, recipe.HELD_OUT))
    assert sorted(train + held_out) == sorted(lines) and len(held_out) == pytest.approx(1234 / 20, rel=0.1)


def test_bars_and_table(recipe, monkeypatch):
    monkeypatch.setitem(recipe.bars.__globals__, "find_spec", lambda name: None)
    found = [("bf16 LoRA", 2.0), ("bf16 LoRA", 2.2), ("QLoRA", 2.021), ("joint LSQ + LoRA from GPTQ", 2.05)]
    found += [("LoRA then PTQ, GPTQ", 2.06), ("LoRA then PTQ, round-to-nearest", 2.04)]
    rows = [recipe.row(name, "x", str(at), {"loss": loss, "perplexity": 1.0}) for at, (name, loss) in enumerate(found)]
    chosen = recipe.best(rows)
    lines = recipe.bars(chosen)
    assert "QLoRA 2.0210, bf16 LoRA 2.0000, +1.05%: DOES NOT HOLD" in lines[0]
    assert (
        "joint LSQ + LoRA from GPTQ 2.0500, LoRA then PTQ, round-to-nearest 2.0400, +0.49%: DOES NOT HOLD" in lines[1]
    )
    assert "not measured (torchao is not installed)" in lines[2]
    table = recipe.table(chosen).splitlines()
    assert len(table) == 2 + 5 and table[2] == "| bf16 LoRA | x | 0 | 2.0000 | 1.000 | +0.00% | 1: 2.2000 |"


def test_results_of_other_settings_are_not_mixed(recipe, monkeypatch, capsys):
    options(recipe, monkeypatch, "--steps", "3")
    options(recipe, monkeypatch, "--steps", "3", "--lr", "1e-3", "--jobs", "2")
    with pytest.raises(SystemExit):
        options(recipe, monkeypatch, "--steps", "4")
    assert "holds results of" in capsys.readouterr().err


@pytest.mark.slow
def test_every_recipe_on_a_small_llama(recipe, tmp_path):
    pytest.importorskip("peft")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 192, "vocab_size": len(WORDS)}
    LlamaForCausalLM(LlamaConfig(**LLAMA | sizes)).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    pairs = [("cat", "sat"), ("dog", "ran"), ("cat", "ran")]
    sentences = [f"what did the {noun} do it {verb} on the mat\n" for noun, verb in pairs]
    Path("text.txt").write_text("".join(sentences[index * index % 3] for index in range(2000)))
    command = [sys.executable, "-P", RECIPES / "smollm2_adapters.py", "--train", "text.txt", "--model", "model"]
    command += ["--steps", "4", "--seq-len", "32", "--batch-size", "2", "--calibration", "8", "--windows", "8"]
    command += ["--lr", "1e-2", "--jobs", "2", "--bases", "minmax", "gptq", "loftq", "cloq"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "$ python" not in done.stdout  # everything was there
    found = json.loads((recipe.OUT / "adapters.json").read_text())
    losses = {row["recipe"]: row["loss"] for row in found["rows"]}
    assert {
        "base",
        recipe.LORA,
        recipe.QLORA,
        "QLoRA on GPTQ's codes",
        "QLoRA from LoftQ",
        "QLoRA from CLoQ",
        "LoRA on int4 from CLoQ",
        "QA-LoRA",
        "LoRA then PTQ, GPTQ",
        "LoRA then PTQ, round-to-nearest",
    } <= losses.keys()
    assert all(loss < losses["base"] for name, loss in losses.items() if name != "base")
    assert losses["LoRA then PTQ, GPTQ"] == pytest.approx(losses[recipe.LORA], rel=0.05)
