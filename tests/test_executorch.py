"""ExecuTorch: layers exact or refused by name; its runtime computes what was trained.

Tests marked "clients" need executorch, which is large: `make test-executorch` installs it in an environment of its own.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qat
from qat import formats
from qat.convert import main
from qat.errors import ArtifactError
from qat.formats import executorch, executorch_client, executorch_disk, executorch_layers
from qat.formats.float_error import _OtherOrder
from qat.formats.onnx_client import _edges
from qat.frozen_model import from_model, to_model
from qat.inputs import random_input
from qat.layers import frozen_layers
from qat.models import build
from qat.numerics import quantize
from qat.policy import QuantPolicy
from qat.quantized_model import QuantizedLayer
from qat.spec import Dynamic

EXAMPLE = {"shape": [64], "dtype": "float32", "low": -1, "high": 2}
IMAGES = {"shape": [3, 16, 16], "dtype": "float32", "low": -2, "high": 2}
INPUT = qat.QuantSpec(granularity="tensor")


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
        (layer(spec(group_size=None), kind="Conv2d", shape=(8, 3, 3, 3)), None),
        (layer(spec(), Dynamic.q8_0), "rounded as q8_0, and ExecuTorch rounds as int8_token; --to gguf"),
        (layer(spec(), INPUT), None),
        (layer(None, INPUT), None),
        (layer(spec(bits=8, group_size=None)), None),
        (layer(spec(bits=8)), "has 8 bits in groups, and XNNPACK 4; train with granularity: channel, or --to onnx"),
        (layer(spec(symmetric=False)), "has zero points"),
        (layer(spec(group_size=16)), "has groups of 16, and XNNPACK multiples of 32"),
        (layer(spec(group_size=None), shape=(8, 40)), None),
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


def test_a_disk_without_room_is_refused_before_compiling(tmp_path, monkeypatch):
    model = net()
    kinds = {name: executorch_layers.kind(entry) for name, entry in model.layers.items()}
    assert kinds == {"0": "int4", "2": "int4", "4": "int4"}
    codes, biases = 64 * 96 + 96 * 32 + 32 * 5, 96 + 5  # one layer has no bias
    need = codes + 2 * codes * 4.5 / 8 + 8 * biases
    monkeypatch.setattr(executorch.shutil, "disk_usage", lambda folder: SimpleNamespace(free=need - 1))
    with pytest.raises(ArtifactError, match=r"needs 0\.0 GiB of disk at .* until it is done, and 0\.0 are"):
        executorch._check_room(model, kinds, tmp_path)
    monkeypatch.setattr(executorch.shutil, "disk_usage", lambda folder: SimpleNamespace(free=need))
    assert "compiler takes about 0.0 GiB of memory" in executorch._check_room(model, kinds, tmp_path)


def test_a_program_is_recognised_and_not_read(tmp_path):
    (tmp_path / "model.pte").write_bytes(b"")
    assert formats.format_of(tmp_path) == formats.format_of(tmp_path / "model.pte") == "executorch"
    with pytest.raises(ArtifactError, match="not read back: use the artifact"):
        formats.read(tmp_path)


def client():
    pytest.importorskip("executorch")
    pytest.importorskip("torchao")


@pytest.mark.clients
@pytest.mark.parametrize("weight", [{"group_size": 32}, {"bits": 3}, {"granularity": "tensor"}, {"bits": 8}])
def test_the_runtime_computes_what_was_trained(weight, tmp_path):
    client()
    model = net(weight)
    notes = executorch.write(model, tmp_path, network())
    assert notes[0].endswith("one input of shape [64]") and "3 of 3 were trained with exactly that" in notes[2]
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


def test_outputs_may_differ_by_what_rounding_makes_of_float32_errors(monkeypatch):
    """As much as our own do from float64's, where that is more than the tolerance; not by more."""
    model = to_model(net(), network()).eval()
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(executorch_client, "ROUNDING_TOLERANCE", 0)
    with torch.no_grad():
        with _OtherOrder(seed=99):
            found = model(x)
        monkeypatch.setattr(executorch_client, "run", lambda file, x, which: found)
        ((_, seen),) = executorch_client.compare_outputs(None, model, x)
        assert "times our own float32's" in seen
        found = model(x) * (1 + 1e-6)
        with pytest.raises(ArtifactError, match=r"the outputs of None differ by .* against float64"):
            executorch_client.compare_outputs(None, model, x)


class Vision(nn.Module):
    """A bias and none, signed and unsigned inputs, a stride, a dilation, groups, a depthwise layer, a linear head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.strided = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, bias=False)
        self.grouped = nn.Conv2d(12, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.grouped(self.strided(x)))
        return self.head(self.depthwise(x).mean((2, 3)))


def vision(bits=4, activation_bits=4, granularity="channel", rules=()):
    torch.manual_seed(0)
    network = Vision().eval()
    network.norm.running_mean.normal_(std=0.1)
    weight, activation = qat.QuantSpec(bits=bits, granularity=granularity), replace(INPUT, bits=activation_bits)
    qat.prepare(network, QuantPolicy(weight=weight, activation=activation, rules=list(rules)), verbose=False)
    qat.calibrate(network, [random_input(IMAGES, 4)])
    model = from_model(qat.freeze(network))
    model.example = IMAGES
    return model, network


@pytest.mark.parametrize(("bits", "activation_bits"), [(4, 4), (8, 8), (3, 5)])
def test_integers_and_one_scale_are_what_the_layer_computes(bits, activation_bits):
    """With the range that the constants give, a range of each input's own is the trained scale."""
    import torch.ao.quantization.fx._decomposed

    model, network = vision(bits, activation_bits)
    for name, layer in frozen_layers(network):
        tensor, scale = model.quantized(name), model.activation_scale(name)
        size = (2, 8) if name == "head" else (2, layer.in_channels, 9, 9)
        x = torch.randn(size, generator=torch.Generator().manual_seed(1)) * scale.float() * 2**activation_bits
        module = executorch_layers.lowered(layer, model.layers[name], tensor, scale)
        wanted = executorch_layers.Float32Layer if name in ("grouped", "depthwise") else executorch_layers.Int8Layer
        assert type(module) is wanted
        with torch.no_grad():
            expected = layer(x)
            torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
            if wanted is executorch_layers.Int8Layer:
                assert module.input(x).abs().max() > 2 ** (activation_bits - 1) - 1  # it reaches the last code
                module.constants = (1000.0,) * len(module.constants)
                assert (module(x) - expected).abs().max() > 1e-4 * expected.abs().max()  # the range matters


@given(st.integers(2, 8), st.booleans(), st.floats(2**-10, 100), st.integers(0, 99))
def test_codes_of_an_input_are_the_trained_ones(bits, signed, scale, seed):
    """At, just below and just above the middle of two codes, and far outside."""
    spec = qat.QuantSpec(bits=bits, granularity="tensor", signed=signed)
    scale = torch.full((1, 1), scale).bfloat16()
    x = torch.cat([_edges(scale.item(), spec.q_n, spec.q_p), torch.randn(64) * 2**bits * scale.item()])
    found = executorch_layers.TrainedInput(spec, scale, 1)(x)
    assert torch.equal(found, quantize(x, scale, spec))


def test_a_product_of_scales_that_float32_would_round_is_refused(tmp_path):
    model, _ = vision()
    wide = torch.tensor([[0.1]])
    model.activation_scale = lambda name: wide
    tensors = {name: model.quantized(name) for name in model.layers}
    model.quantized = lambda name: replace(tensors[name], scale=tensors[name].scale.float() / 3)
    with pytest.raises(ArtifactError, match=r"'first' has .* scales or biases that float32 cannot hold"):
        executorch.write(model, tmp_path)


@pytest.mark.clients
@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, "2 in float32, 3 in int8"),
        ({"bits": 8, "activation_bits": 8, "granularity": "tensor"}, "2 in float32, 3 in int8"),
        ({"bits": 3, "rules": [{"match": "first", "weight": None}]}, "3 in float32, 2 in int8"),
        ({"rules": [{"match": "head", "activation": None}]}, "2 in float32, 3 in int8"),
        ({"rules": [{"match": "re:first|head", "weight": None, "activation": None}]}, "2 in float32, 1 in int8"),
    ],
)
def test_convolutions_compute_what_was_trained(options, counts, tmp_path):
    client()
    model, _ = vision(**options)
    notes = executorch.write(model, tmp_path, Vision())
    assert notes[1].endswith(counts) and "grouped, depthwise" in notes[2]
    rows = dict(executorch.verify(tmp_path, model, Vision()))
    assert "equal in every bit" in rows["codes and scales in the file"]
    assert rows["ExecuTorch, outputs"].endswith("argmax equal in 100.00%")


@pytest.mark.clients
def test_resnet20_is_all_integers_and_exact(tmp_path):
    client()
    torch.manual_seed(0)
    network = build({"builder": "resnet20", "args": {"width": 8}})
    network(random_input(IMAGES, 8))  # statistics of the batch norms
    qat.prepare(network, QuantPolicy.from_yaml("conv_w4a4"), verbose=False)
    qat.calibrate(network, [random_input(IMAGES, 8)])
    model = from_model(qat.freeze(network))
    model.example = IMAGES
    assert executorch.write(model, tmp_path)[1] == "XNNPACK runs 20 quantized layers: 20 in int8"
    assert executorch.verify(tmp_path, model)[0][1].startswith("20 layers, ")
    images = random_input(IMAGES, 64, seed=1)
    with torch.no_grad():
        expected = network(images)
    found = executorch_client.run(tmp_path / executorch.FILE, images)
    close = (found - expected).abs().amax(1) < 1e-5 * expected.abs().max()
    assert close.sum() >= 62  # a sum at the edge of two codes may fall to either side
    other = from_model(network)
    other.example = IMAGES
    changed = replace(model.quantized("stage2.0.conv1"))
    changed.codes = changed.codes.clone()
    changed.codes[0, 0, 0, 0] ^= 1
    other.quantized = lambda name: changed if name == "stage2.0.conv1" else model.quantized(name)
    with pytest.raises(ArtifactError, match=r"lacks the codes or scales of stage2\.0\.conv1$"):
        executorch.verify(tmp_path, other)


@pytest.mark.clients
@pytest.mark.parametrize(("bits", "dynamic"), [(4, None), (8, "int8_token"), (2, "int8_token")])
def test_inputs_that_no_group_divides(bits, dynamic, tmp_path):
    """37 inputs, a bias, and one weight in two layers."""
    client()

    def build():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(37, 37), nn.ReLU(), nn.Linear(37, 37, bias=False), nn.Tanh(), nn.Linear(37, 5))
        layers[2].weight = layers[0].weight
        return layers

    policy = QuantPolicy(weight=qat.QuantSpec(bits=bits), dynamic=dynamic)
    model = from_model(qat.freeze(qat.prepare(build(), policy, verbose=False)))
    model.example = {**EXAMPLE, "shape": [37]}
    assert executorch.write(model, tmp_path, build())[1] == "XNNPACK runs 3 quantized layers: 3 in int8"
    rows = dict(executorch.verify(tmp_path, model, build()))
    assert rows["codes and scales in the file"].startswith("3 layers, ")
    assert rows["ExecuTorch, outputs"].endswith("argmax equal in 100.00%")


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=96, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.clients
@pytest.mark.parametrize(("grid", "counts"), [({"group_size": 32}, "7 in int4"), ({"bits": 8}, "7 in int8")])
def test_trained_inputs_make_a_language_model_exact(grid, counts, tmp_path):
    """No rounding depends on the text, so that a whole model is as near as float32 is."""
    client()
    model = llama()
    left = {"match": "lm_head", "weight": None, "activation": None}
    policy = QuantPolicy(weight=qat.QuantSpec(**grid), activation=replace(INPUT, bits=8), rules=[left])
    qat.prepare(model, policy, verbose=False)
    tokens = torch.arange(40)[None]
    qat.calibrate(model, [tokens])
    frozen = from_model(qat.freeze(model))
    assert executorch.write(frozen, tmp_path)[1:] == [f"XNNPACK runs 7 quantized layers: {counts}"]
    assert executorch.verify(tmp_path, frozen)[0][1].startswith("7 layers, ")
    with torch.no_grad():
        expected = model(tokens).logits
    found = executorch_client.run(tmp_path / executorch.FILE, tokens)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.clients
def test_a_language_model_of_any_length(tmp_path, capsys):
    client()
    model = llama()
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
    found = executorch_client.run(tmp_path / "out" / executorch.FILE, tokens)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.clients
def test_a_program_from_files_is_the_same_to_the_byte(tmp_path, monkeypatch):
    """Codes and scales of XNNPACK's, a constant of the emitter's (an embedding), and bytes that two layers share."""
    client()
    from executorch.backends.xnnpack import xnnpack_preprocess
    from executorch.exir.emit import _emitter

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.a, self.b = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.load_state_dict(self.a.state_dict())

        def forward(self, x):
            return self.b(self.a(self.words(x)).relu())

    torch.manual_seed(0)
    rules = [{"match": "words", "weight": None}]
    policy = QuantPolicy(weight={"group_size": 32}, dynamic="int8_token", rules=rules)
    model = from_model(qat.freeze(qat.prepare(Words(), policy, verbose=False)))
    model.example = {"shape": [6], "dtype": "int64", "low": 0, "high": 49}
    before = xnnpack_preprocess.NamedDataStore, _emitter.Buffer
    written, kept = [], executorch_disk.OnDisk.keep_bytes
    for least in (1, 2**40):
        files = []
        monkeypatch.setattr(executorch_disk, "LEAST_BYTES", least)
        monkeypatch.setattr(
            executorch_disk.OnDisk,
            "keep_bytes",
            lambda self, content, files=files: files.append(kept(self, content)) or files[-1],
        )
        folder = tmp_path / str(least)
        folder.mkdir()
        executorch.write(model, folder, Words())
        on_disk = [content for content in files if not isinstance(content, bytes)]
        assert len(on_disk) > 3 if least == 1 else not on_disk
        written.append((folder / executorch.FILE).read_bytes())
        assert before == (xnnpack_preprocess.NamedDataStore, _emitter.Buffer)
    assert written[0] == written[1]
