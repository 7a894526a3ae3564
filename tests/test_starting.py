"""Training starts from quantized models of other tools: the same codes, scales and weights, in every format."""

import sys

import pytest
import torch
from random_quantized import LLAMA, random_tensor, weight
from test_convert import llama  # noqa: F401  a fixture

import qat
from qat import formats
from qat import train as train_command
from qat.convert import main as convert
from qat.errors import ArtifactError, LayerError
from qat.frozen_model import from_model, to_model
from qat.models import build
from qat.quantized_model import QuantizedLayer, QuantizedModel
from qat.quantizers import LearnedStepSize
from qat.starting import fill, plain_model, take_codes

RULES = [{"match": "lm_head", "weight": None}]


def random_llama(spec, dtype="float32", **options):
    """A Llama with any codes, as another tool could have written them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, **options}, dtype=dtype, architectures=["LlamaForCausalLM"])
    architecture = {"transformers": config.to_dict()}
    state = build(architecture).state_dict()
    names = [name.removesuffix(".weight") for name in state if name.endswith("_proj.weight")]
    shapes = {name: list(state.pop(f"{name}.weight").shape) for name in names}
    tensors = {name: random_tensor(*shape, spec, seed) for seed, (name, shape) in enumerate(shapes.items())}
    layers = {name: QuantizedLayer("Linear", shape, spec, None) for name, shape in shapes.items()}
    return QuantizedModel(architecture, layers, tensors.__getitem__, {}.__getitem__, state)


def same_codes(found, source):
    tensors = qat.quantized_tensors(found)
    assert tensors.keys() == source.layers.keys()
    for name, tensor in tensors.items():
        stored = source.quantized(name)
        assert torch.equal(tensor.codes, stored.codes), name
        assert torch.equal(tensor.dequantize(), stored.dequantize()), name


@pytest.mark.parametrize(
    ("to", "spec"),
    [
        ("compressed-tensors", {"group_size": 64, "scale_dtype": "bfloat16"}),
        ("compressed-tensors", {"bits": 8}),
        ("gptq", {"group_size": 32, "scale_dtype": "float16"}),
        ("awq", {"group_size": 128, "scale_dtype": "float16"}),
        ("awq", {"group_size": 32, "symmetric": False}),
        ("compressed-tensors", {"group_size": 64, "symmetric": False}),
        ("mlx", {"group_size": 32, "bits": 3}),
        ("torchao", {"group_size": 32, "bits": 5}),
        ("native", {"bits": 2}),
        ("native", {"bits": 2, "group_size": 32, "symmetric": False, "zero_point_dtype": "float16"}),
    ],
)
def test_the_first_forward_has_the_stored_codes(to, spec, tmp_path):
    """Whatever wrote them: random codes, with step sizes that no rule of ours would choose."""
    spec = weight(**spec)
    formats.module(to).write(random_llama(spec), tmp_path)
    source = formats.read(tmp_path)
    stored = next(iter(source.layers.values())).weight
    model = qat.start_from(tmp_path, qat.QuantPolicy(stored, rules=RULES), verbose=False)
    assert model.training and model.dtype == torch.float32
    same_codes(model, source)
    tokens = torch.randint(0, LLAMA["vocab_size"], (2, 8), generator=torch.Generator().manual_seed(1))
    expected = to_model(source).float()(tokens).logits
    assert torch.equal(model.eval()(tokens).logits, expected)
    model(tokens).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(q.step_size.grad.count_nonzero() for q in model.modules() if isinstance(q, LearnedStepSize))
    same_codes(qat.freeze(model), source)


@pytest.mark.clients
def test_a_gguf_file_starts_training(tmp_path):
    formats.module("gguf").write(random_llama(weight(group_size=32)), tmp_path)
    source = formats.read(tmp_path / "model.gguf")
    policy = qat.QuantPolicy(weight(group_size=32, scale_dtype="float16"), rules=RULES)
    same_codes(qat.start_from(tmp_path / "model.gguf", policy, verbose=False), source)


@pytest.mark.clients
def test_llama_cpps_own_q4_0_starts_training(tmp_path, monkeypatch):
    """Its steps are negative in half of the blocks, which our reader takes for a zero point of -1."""
    package = pytest.importorskip("gguf")

    def quantize(tensor, kind):
        weight = torch.randn(tensor.codes.shape).numpy()
        return torch.from_numpy(package.quants.quantize(weight, package.GGMLQuantizationType.Q4_0))

    monkeypatch.setattr("qat.formats.gguf_blocks.encode", quantize)
    formats.module("gguf").write(random_llama(weight(group_size=32)), tmp_path)
    source = formats.read(tmp_path)
    assert not any(layer.weight.symmetric for layer in source.layers.values())
    spec = weight(group_size=32, symmetric=False, scale_dtype="float16")
    same_codes(qat.start_from(tmp_path, qat.QuantPolicy(spec, rules=RULES), verbose=False), source)


def test_nf4_blocks_come_back(tmp_path):
    spec = weight(codebook="nf4", group_size=64)
    model = random_llama(spec)
    for name in model.layers:
        model.quantized(name).codes[:, ::64] = 0  # the level -1, which every block of a real NF4 weight has or 1
    formats.module("bitsandbytes").write(model, tmp_path)
    same_codes(qat.start_from(tmp_path, qat.QuantPolicy(spec, rules=RULES), verbose=False), formats.read(tmp_path))


@pytest.mark.parametrize(
    ("stored", "policy", "said"),
    [
        ({"group_size": 64}, {"group_size": 128}, "group_size=64 and scale_dtype=bfloat16"),
        ({"group_size": 64}, {"group_size": 64, "bits": 3}, "policy.weight.bits=4, group_size=64"),
        ({"group_size": 64, "scale_dtype": "float16"}, {"group_size": 64}, "scale_dtype=float16"),
        ({"group_size": 64}, {"codebook": "nf4"}, "policy.weight.bits=4"),
        ({"group_size": 64, "symmetric": False}, {"group_size": 64}, "symmetric=false and scale_dtype=bfloat16"),
        (
            {"bits": 2, "symmetric": False, "zero_point_dtype": "float16"},
            {"bits": 2, "symmetric": False},
            "symmetric=false, zero_point_dtype=float16 and scale_dtype=bfloat16",
        ),
    ],
)
def test_another_grid_is_refused_by_name(stored, policy, said):
    source = random_llama(weight(**stored))
    model = qat.prepare(fill(plain_model(source), source), qat.QuantPolicy(policy, rules=RULES), verbose=False)
    with pytest.raises(LayerError, match="would not start from the codes") as error:
        take_codes(model, source)
    assert said in str(error.value) and "'model.layers.0.self_attn.q_proj' " in str(error.value)


def test_finer_groups_and_layers_left_alone():
    source = random_llama(weight(group_size=128))
    rules = [*RULES, {"match": "*.down_proj", "weight": None}]
    model = fill(plain_model(source), source)
    qat.prepare(model, qat.QuantPolicy({"group_size": 32}, rules=rules), verbose=False)
    assert take_codes(model, source).endswith("in 12 layers; 2 layers that the policy leaves alone start from q * s")
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(model.get_parameter(f"{name}.weight"), source.quantized(name).dequantize())


def test_a_model_of_the_users_own_with_trained_input_scales(tmp_path):
    def net():
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3, bias=False))

    policy = qat.QuantPolicy({"bits": 4}, activation={"bits": 4})
    trained = qat.calibrate(qat.prepare(net(), policy, verbose=False), [torch.randn(4, 3, 8, 8)])
    qat.save(qat.freeze(trained), tmp_path)
    with pytest.raises(ArtifactError, match="does not name its architecture"):
        qat.start_from(tmp_path, policy)
    model = qat.start_from(tmp_path, policy, net(), verbose=False).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), trained(x))  # no calibration between
    same_codes(model, from_model(trained))


def test_the_command_line_goes_on_from_a_folder(llama, tmp_path, monkeypatch, capsys):  # noqa: F811
    """GPTQ in, one step of training, GPTQ out; without a step it is the same folder's codes."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("0123 4567 89 " * 200)  # bytes that its vocabulary of 64 has
    assert convert([str(llama / "llama.ckpt"), "--to", "gptq", "--out", "gptq"]) == 0

    def train(name, *overrides):
        arguments = "model=codes init_from=gptq task=language data=text data.train=text.txt data.seq_len=16 "
        arguments += "data.tokenizer=bytes policy=lm_w4 policy.weight.scale_dtype=float16 optim=adamw threads=1 "
        arguments += "trainer.accelerator=cpu"
        monkeypatch.setattr(sys, "argv", ["train", *arguments.split(), f"name={name}", *overrides])
        train_command.main()

    train("start", "trainer.max_epochs=0")
    assert "codes differ in 14 layers" in capsys.readouterr().out
    assert convert(["runs/start/last.ckpt", "--to", "gptq", "--out", "again"]) == 0
    first, again = (formats.read(tmp_path / name) for name in ("gptq", "again"))
    for name in first.layers:
        assert torch.equal(first.quantized(name).codes, again.quantized(name).codes)
        assert torch.equal(first.quantized(name).scale, again.quantized(name).scale)
    train("more", "trainer.max_steps=2", "trainer.max_epochs=-1", "optim.lr=0.01")
    with pytest.raises(SystemExit):
        train("coarse", "policy.weight.bits=3", "trainer.max_epochs=0")
    assert "would not start from the codes" in capsys.readouterr().err
