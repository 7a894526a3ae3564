"""convert and verify: a checkpoint becomes an artifact with the same integers, and what does not fit is said."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import qat
from qat import formats, verify
from qat.checkpoint import describe, load_state, read_checkpoint
from qat.convert import convert, main
from qat.errors import CheckpointError
from qat.formats import FORMATS

EXAMPLE = {"shape": [6], "dtype": "float32", "low": -2.0, "high": 2.0}
POLICY = qat.QuantPolicy(weight=qat.QuantSpec(bits=4, group_size=3), activation=qat.QuantSpec(granularity="tensor"))


def tiny():
    """The user's own model: --model test_convert:tiny."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))


def checkpoint(path, policy=POLICY, example=EXAMPLE, change=lambda model: None, architecture=None):
    """Write what the training command writes, of a model whose weights moved after prepare."""
    model = tiny()
    if not policy.quantizes_nothing():
        qat.prepare(model, policy, verbose=False)
        if policy.activation is not None:
            qat.calibrate(model, [torch.randn(5, 6)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    change(model)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"qat": describe(architecture, policy, example), "state_dict": state}, path)
    return model


def run(module, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_convert_verify_and_load(tmp_path):
    model = checkpoint(tmp_path / "a.ckpt").eval()
    out = run("qat.convert", tmp_path / "a.ckpt", "--out", tmp_path / "out", "--verify", "--model", "test_convert:tiny")
    assert out.returncode == 0, out.stdout + out.stderr
    assert "codes             0 of 81 differ" in out.stdout
    assert "weights           0 of 2 layers differ in any bit" in out.stdout
    assert "output            differs by at most 0 " in out.stdout
    assert "int4 g3" in out.stdout
    x = torch.randn(7, 6)
    assert torch.equal(qat.load(tmp_path / "out", model=tiny())(x), model(x))


def test_verify_finds_one_wrong_code(tmp_path, capsys):
    """The artifact is of a checkpoint in which one weight is another."""
    checkpoint(tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "out", model=f"{__name__}:tiny")

    def flip(model):
        with torch.no_grad():
            step = model[0].weight_quantizer.scale()[0, 0].float()
            code = model[0].weight_quantizer.quantize(model[0].weight).codes[0, 0]
            model[0].weight[0, 0] = step * (code - 1 if code > 0 else code + 1)

    checkpoint(tmp_path / "b.ckpt", change=flip)
    other = read_checkpoint(tmp_path / "b.ckpt")
    verify.write_reference(other.build(tiny()), other.example_input(), tmp_path / "reference.safetensors")
    capsys.readouterr()
    files = [str(tmp_path / name) for name in ("out", "reference.safetensors")]
    assert verify.main([*files, "--model", f"{__name__}:tiny"]) == 1
    said = capsys.readouterr().out
    assert "codes             1 of 81 differ" in said
    assert "weights           1 of 2 layers differ in any bit" in said


def test_a_checkpoint_without_an_example_compares_the_rest(verify_here, tmp_path, capsys):
    checkpoint(tmp_path / "a.ckpt", example=None)
    command = [str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "out"), "--verify", "--model", f"{__name__}:tiny"]
    assert main(command) == 0
    assert "not compared: the checkpoint recorded no example input" in capsys.readouterr().out


def test_a_network_that_asks_more_of_its_inputs_than_a_range_compares_the_rest(verify_here, tmp_path, capsys):
    """As of lengths that have to fall; here one axis is not what the network takes."""
    checkpoint(tmp_path / "a.ckpt", example={"shape": [5], "dtype": "float32", "low": 0, "high": 1})
    command = [str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "out"), "--verify", "--model", f"{__name__}:tiny"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "codes             0 of 81 differ" in said
    assert "not compared: the network does not run on random inputs of that range: mat1 and mat2 shapes" in said


def error_of(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_errors_are_one_line_that_names_the_thing(tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert "there is no checkpoint at" in error_of(capsys, tmp_path / "none.ckpt", *out)
    (tmp_path / "bad.ckpt").write_bytes(b"not a checkpoint")
    assert "bad.ckpt cannot be read" in error_of(capsys, tmp_path / "bad.ckpt", *out)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "no checkpoint of python -m qat.train" in error_of(capsys, tmp_path / "other.ckpt", *out)
    checkpoint(tmp_path / "fp.ckpt", policy=qat.QuantPolicy())
    assert "full-precision model" in error_of(capsys, tmp_path / "fp.ckpt", *out)
    checkpoint(tmp_path / "a.ckpt")
    assert "--model package.module:function" in error_of(capsys, tmp_path / "a.ckpt", *out)
    for target, said in (
        ("no.such:thing", "No module named 'no'"),
        ("torch.nn:Linear", "missing a required argument: 'in_features'; give a function that takes no arguments"),
        ("os:getcwd", "returns a str: give a function that builds a model"),
        ("torch:e", "is not a callable object"),
    ):
        assert said in error_of(capsys, tmp_path / "a.ckpt", *out, "--model", target)
    (tmp_path / "run").mkdir()
    assert "run is no model in a format" in error_of(capsys, tmp_path / "run", *out)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text('{"model_type": "llama"}')
    assert "plain', policy='lm_w4') quantizes it" in error_of(capsys, tmp_path / "plain", *out)
    checkpoint(tmp_path / "run" / "last.ckpt")
    assert f"of a run's folder, give {tmp_path / 'run' / 'last.ckpt'}" in error_of(capsys, tmp_path / "run", *out)
    assert not (tmp_path / "out").exists()


def test_a_truncated_checkpoint_is_named(tmp_path, capsys):
    checkpoint(tmp_path / "a.ckpt")
    content = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(content[: len(content) // 2])
    assert "a.ckpt cannot be read" in error_of(capsys, tmp_path / "a.ckpt", "--out", tmp_path / "out")


def test_a_checkpoint_of_another_model_lists_what_does_not_fit(tmp_path):
    checkpoint(tmp_path / "a.ckpt")
    other = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))
    with pytest.raises(CheckpointError, match=r"2\.bias \(\[3\] there, \[6\] in the model\)"):
        read_checkpoint(tmp_path / "a.ckpt").build(other)
    deeper = nn.Sequential(*tiny(), nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match=r"missing 3\.activation_quantizer\.initialised.* and \d more"):
        read_checkpoint(tmp_path / "a.ckpt").build(deeper)


def test_an_uninitialised_scale_is_not_frozen(tmp_path, capsys):
    def forget(model):
        model[2].activation_quantizer.initialised.fill_(False)

    checkpoint(tmp_path / "a.ckpt", change=forget)
    message = error_of(capsys, tmp_path / "a.ckpt", "--out", tmp_path / "out", "--model", f"{__name__}:tiny")
    assert "the step size of '2' was never initialised" in message


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    torch.save({"qat": Bomb(), "state_dict": {}}, tmp_path / "bomb.ckpt")
    with pytest.raises(CheckpointError, match="never executed"):
        read_checkpoint(tmp_path / "bomb.ckpt")
    assert not (tmp_path / "exploded").exists()


def test_ties_survive_a_checkpoint(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"qat": describe(None, qat.QuantPolicy(), None), "state_dict": state}, tmp_path / "a.ckpt")
    built = read_checkpoint(tmp_path / "a.ckpt").build(Tied())
    assert built.head.weight is built.embedding.weight
    assert torch.equal(built.head.weight, model.head.weight)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint and an artifact of a tiny language model, as transformers builds it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    )
    architecture = {"transformers": config.to_dict()}
    from qat.models import build

    policy = qat.QuantPolicy(qat.QuantSpec(group_size=32), rules=[{"match": "lm_head", "weight": None}])
    model = qat.prepare(build(architecture), policy, verbose=False)
    folder = tmp_path_factory.mktemp("llama")
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    example = {"shape": [16], "dtype": "int64", "low": 0, "high": 63}
    torch.save({"qat": describe(architecture, policy, example), "state_dict": state}, folder / "llama.ckpt")
    assert main([str(folder / "llama.ckpt"), "--out", str(folder / "artifact"), "--verify"]) == 0
    return folder


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq", "mlx"])
def test_every_format_goes_out_and_comes_back(llama, tmp_path, capsys, name):
    """Checkpoint -> format -> artifact: the artifact holds the codes of the one made directly."""
    assert main([str(llama / "llama.ckpt"), "--to", name, "--out", str(tmp_path / "out"), "--verify"]) == 0
    assert "verified: what was trained is what ships" in capsys.readouterr().out
    assert main([str(tmp_path / "out"), "--out", str(tmp_path / "back"), "--verify"]) == 0
    direct, back = (qat.quantized_tensors(qat.load(path)) for path in (llama / "artifact", tmp_path / "back"))
    assert direct.keys() == back.keys()
    for key, tensor in direct.items():
        assert torch.equal(tensor.codes, back[key].codes)
        assert torch.equal(tensor.dequantize(), back[key].dequantize())


def export(source, out, *names):
    for name in names:
        folder = Path(out) / name
        folder.mkdir(parents=True)
        formats.module(name).write(formats.read(Path(source)), folder)


def test_the_same_model_gives_the_same_bytes_in_every_process(llama, tmp_path):
    """Whatever the order of Python's sets, here and in another process, and of other hash maps there is."""
    names = [name for name in FORMATS if name not in ("bitsandbytes", "executorch")]  # its levels are NF4's; too large
    names = [name for name in names if find_spec({"gguf": "gguf", "onnx": "onnxscript"}.get(name, "torch"))]
    words = [str(llama / "artifact"), str(tmp_path / "other"), *names]
    seed = {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"}
    code = "import sys; from test_convert import export; export(*sys.argv[1:])"
    environment = {**os.environ, **seed, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-P", "-c", code, *words], check=True, capture_output=True, env=environment)
    export(llama / "artifact", tmp_path / "one", *names)
    files = [file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file()]
    assert len(files) >= 2 * len(names)
    one, other = ([(tmp_path / folder / file).read_bytes() for file in files] for folder in ("one", "other"))
    assert [file for file, here, there in zip(files, one, other, strict=True) if here != there] == []


def test_a_folder_is_replaced_only_by_its_own_format(llama, tmp_path, capsys):
    arguments = (llama / "artifact", "--to", "mlx", "--out", tmp_path / "out")
    assert main([str(argument) for argument in arguments]) == 0
    assert main([str(argument) for argument in arguments]) == 0
    assert "exists and is not" in error_of(capsys, llama / "artifact", "--to", "gptq", "--out", tmp_path / "out")
    assert "is the source itself" in error_of(capsys, llama / "artifact", "--out", llama / "artifact")


def test_an_unknown_source_is_said(tmp_path, capsys):
    assert "no model in a format that can be read" in error_of(capsys, tmp_path, "--out", tmp_path / "out")


def test_a_missing_tokenizer_folder_is_said(llama, tmp_path, capsys):
    where = ("--tokenizer", tmp_path / "none")
    assert "there is no such folder" in error_of(capsys, llama / "artifact", "--out", tmp_path / "out", *where)


def test_extra_state_of_a_module_is_no_tensor_and_comes_back():
    class Counting(nn.Linear):
        seen = 0

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    model, other = Counting(3, 2), Counting(3, 2)
    model.seen = 5
    load_state(other, model.state_dict(), "here")
    assert other.seen == 5 and torch.equal(other.weight, model.weight)
