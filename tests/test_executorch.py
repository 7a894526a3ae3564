"""ExecuTorch: layers exact or refused by name; its runtime computes what int8_token trained for."""

import pytest
import torch
from torch import nn

import qat
from qat import formats
from qat.convert import main
from qat.errors import ArtifactError
from qat.formats import executorch
from qat.policy import QuantPolicy
from qat.quantized_model import QuantizedLayer, from_model
from qat.spec import Dynamic

EXAMPLE = {"shape": [64], "dtype": "float32", "low": -1, "high": 2}


def spec(**values):
    return qat.QuantSpec(**{"group_size": 32, "signed": True, **values})


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False), nn.Tanh(), nn.Linear(32, 5))


def net(weight=None, dynamic="int8_token", **policy):
    policy = QuantPolicy(weight=weight or {"group_size": 32}, dynamic=dynamic, **policy)
    model = from_model(qat.freeze(qat.prepare(network(), policy, verbose=False)))
    model.example = EXAMPLE
    return model


def layer(weight, activation=None, kind="Linear", shape=(8, 96)):
    return QuantizedLayer(kind, list(shape), weight, activation)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (layer(spec()), None),
        (layer(spec(bits=2, group_size=96), Dynamic.int8_token), None),
        (layer(spec(group_size=None, granularity="tensor")), None),
        (layer(spec(group_size=None), kind="Conv2d"), "is a Conv2d.*--to onnx"),
        (layer(spec(), Dynamic.q8_0), "rounded as q8_0, and ExecuTorch rounds as int8_token; --to gguf"),
        (layer(spec(), qat.QuantSpec(granularity="tensor")), "rounded as int4 tensor, .*--to onnx"),
        (layer(None, qat.QuantSpec(granularity="tensor")), "rounded as int4 tensor, .*--to onnx"),
        (layer(spec(bits=8)), "has 8 bits"),
        (layer(spec(symmetric=False)), "has zero points"),
        (layer(spec(group_size=16)), "has groups of 16, and XNNPACK multiples of 32"),
        (layer(spec(group_size=None), shape=(8, 40)), "has groups of 40"),
    ],
)
def test_layers_are_exact_or_refused_by_name(entry, problem, tmp_path):
    model = net()
    model.layers["odd"] = entry
    model.quantized = lambda name: (_ for _ in ()).throw(InterruptedError)  # no layer was refused
    with pytest.raises(ArtifactError if problem else InterruptedError, match=problem and f"'odd' .*{problem}"):
        executorch.write(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_scales_that_bf16_would_round_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"'0' has .* scales or biases that bfloat16 cannot hold"):
        executorch.write(net({"group_size": 32, "scale_dtype": "float32"}), tmp_path)


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(executorch, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match="pip install executorch"):
        executorch.write(net(), tmp_path)


def test_a_program_is_recognised_and_not_read(tmp_path):
    (tmp_path / "model.pte").write_bytes(b"")
    assert formats.format_of(tmp_path) == formats.format_of(tmp_path / "model.pte") == "executorch"
    with pytest.raises(ArtifactError, match="not read back: use the artifact"):
        formats.read(tmp_path)


def client():
    pytest.importorskip("executorch")
    pytest.importorskip("torchao")


@pytest.mark.clients
@pytest.mark.parametrize("weight", [{"group_size": 32}, {"bits": 3}, {"granularity": "tensor"}])
def test_the_runtime_computes_what_was_trained(weight, tmp_path):
    client()
    model = net(weight)
    notes = executorch.write(model, tmp_path, network())
    assert notes[0].endswith("one input of shape [64]") and "3 of 3 were trained with exactly that" in notes[1]
    rows = dict(executorch.verify(tmp_path, model, network()))
    assert rows["codes and scales in the file"] == "3 layers, 9,376 codes, equal in every bit"
    assert "ExecuTorch, 0" in rows and rows["ExecuTorch, outputs"].endswith("argmax equal in 100.00%")
    for mutate in ("codes", "scale"):
        other, changed = net(weight), model.quantized("4")
        bits = getattr(changed, mutate).clone()
        bits.view(torch.int8 if mutate == "codes" else torch.int16)[0, 0] ^= 1
        setattr(changed, mutate, bits)
        other.quantized = lambda name, changed=changed: changed if name == "4" else model.quantized(name)
        with pytest.raises(ArtifactError, match=r"lacks the codes or scales of 4$"):
            executorch.verify(tmp_path, other, network())


@pytest.mark.clients
def test_a_language_model_of_any_length(tmp_path, capsys):
    client()
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=96, max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(config)
    rules = [{"match": "lm_head", "weight": None}]
    policy = QuantPolicy(weight={"group_size": 32}, dynamic="int8_token", rules=rules)
    qat.save(qat.freeze(qat.prepare(model, policy, verbose=False)), tmp_path / "artifact")
    arguments = [str(tmp_path / "artifact"), "--to", "executorch", "--out", str(tmp_path / "out"), "--verify"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "takes 1 to 64 tokens" in printed and "7 of 7 were trained with exactly that" in printed
    assert "argmax equal in 100.00%" in printed
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(tokens).logits
    found = executorch._run(tmp_path / "out" / executorch.FILE, tokens)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
