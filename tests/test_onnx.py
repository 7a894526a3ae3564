"""ONNX: every layer exact in onnxruntime and OpenVINO, in whole models."""

from dataclasses import replace

import pytest
import torch
from onnx_models import IMAGES, PER_TENSOR, TOKENS, Net, clients, frozen, net, random_tensor, written
from torch import nn

import qat
from qat.convert import main as convert
from qat.errors import ArtifactError
from qat.formats import onnx, onnx_parts
from qat.formats.onnx_parts import session
from qat.frozen_model import from_model, to_model
from qat.models import build


@pytest.mark.clients
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("activation_bits", [None, 3, 4, 8])
def test_a_network_of_the_users_own(tmp_path, bits, activation_bits):
    rules = [{"match": "head", "weight": None}]
    model = net(bits, activation_bits, rules=rules if activation_bits else [])
    _, rows = written(model, tmp_path, Net())
    assert rows["onnxruntime, weights"].startswith("4 layers" if activation_bits else "5 layers")
    assert ("onnxruntime, activations" in rows) == (activation_bits is not None)
    read = onnx.read(tmp_path)
    x = onnx.example_input(model, 5)
    assert torch.equal(to_model(read, Net())(x), to_model(model, Net())(x))
    assert read.tied == model.tied and read.layers == model.layers and read.example == model.example


@pytest.mark.clients
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_inputs_with_an_offset(tmp_path, bits):
    """LSQ+: the integers, at every edge between two codes, and the outputs."""
    spec = qat.QuantSpec(bits=bits, granularity="tensor", symmetric=False)
    model = frozen(Net(), qat.QuantSpec(bits=4), spec, [{"match": "head", "weight": None}])
    zero_points = {int(model.activation_zero_point(name)) for name in model.layers}
    assert len(zero_points) > 1 and zero_points != {0}
    _, rows = written(model, tmp_path, Net())
    assert "same integers at every edge" in rows["onnxruntime, activations"]
    x = onnx.example_input(model, 5)
    assert torch.equal(to_model(onnx.read(tmp_path), Net())(x), to_model(model, Net())(x))


class Again(nn.Module):
    """Calls a convolution and a linear layer several times, as detectors' heads and recurrent networks do."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.linear, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(torch.relu(self.conv(torch.relu(self.first(x))))).mean((2, 3))
        for _ in range(3):
            x = torch.tanh(self.linear(x))
        return self.head(x)


@pytest.mark.clients
@pytest.mark.parametrize("activation_bits", [None, 3, 8])
def test_layers_that_the_forward_calls_several_times(tmp_path, activation_bits):
    activation = activation_bits and qat.QuantSpec(bits=activation_bits, **PER_TENSOR)
    model = frozen(Again(), qat.QuantSpec(bits=4), activation)
    _, rows = written(model, tmp_path, Again())
    assert rows["onnxruntime, weights"].startswith("4 layers")
    x = onnx.example_input(model, 5)
    assert torch.equal(to_model(onnx.read(tmp_path), Again())(x), to_model(model, Again())(x))


@pytest.mark.clients
@pytest.mark.parametrize("builder", ["cnn", "resnet20"])
def test_vision_models_with_trained_activations(tmp_path, builder):
    """4 bits, 8 in the first and last layer; onnxruntime's outputs within 1e-5 of the largest, and the same classes."""
    example = IMAGES if builder == "resnet20" else {**IMAGES, "shape": [1, 16, 16]}
    torch.manual_seed(0)
    network = build({"builder": builder})
    network(onnx.random_input(example, 32))  # batch statistics
    matrices = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    wide = [{"match": name, "weight": {"bits": 8}, "activation": {"bits": 8}} for name in (matrices[0], matrices[-1])]
    four = qat.QuantSpec(bits=4)
    model = frozen(network.eval(), four, qat.QuantSpec(bits=4, **PER_TENSOR), wide, example)
    _, rows = written(model, tmp_path)
    assert rows["onnxruntime, outputs"].endswith("argmax equal in 100.00%")
    assert f"{len(matrices)} layers equal q*s" in rows["onnxruntime, weights"]
    session = onnx_parts.session(tmp_path / onnx.FILE)
    for batch in (1, 7):  # the batch axis is free
        x = onnx.random_input(example, batch, seed=batch)
        expected = to_model(model)(x)
        found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


class Named(nn.Module):
    """Has a layer under two names; torch's exporter keeps the later one."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv2d(3, 3, 3), nn.Linear(3, 3), nn.Linear(3, 5)
        self.again = self.linear

    def forward(self, x):
        return self.head(torch.relu(self.again(torch.relu(self.linear(self.conv(x).mean((2, 3)))))))


@pytest.mark.clients
@pytest.mark.parametrize("activation_bits", [None, 3])
def test_a_layer_with_two_names(tmp_path, activation_bits):
    activation = activation_bits and qat.QuantSpec(bits=activation_bits, **PER_TENSOR)
    model = frozen(Named(), qat.QuantSpec(bits=4), activation)
    assert list(model.layers) == ["conv", "linear", "head"] and model.tied == {"again.bias": "linear.bias"}
    _, rows = written(model, tmp_path, Named())
    assert rows["onnxruntime, weights"].startswith("3 layers")
    x = onnx.example_input(model, 5)
    assert torch.equal(to_model(onnx.read(tmp_path), Named())(x), to_model(model, Named())(x))


class Mobile(nn.Module):
    """An inverted residual with squeeze and excitation, as MobileNetV3 and EfficientNet have."""

    def __init__(self, act, gate):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), act())
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), act())
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), act())
        self.excite = nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), gate())
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.hidden = nn.Sequential(nn.Linear(8, 16), act())
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.depth(self.expand(x))
        x = x + self.project(y * self.excite(y.mean((2, 3), keepdim=True)))
        return self.head(self.hidden(x.mean((2, 3))))


class Pooled(nn.Module):
    """What onnxruntime moves QuantizeLinear past, and merges with it; each convolution has a bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.d = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = nn.functional.max_pool2d(nn.functional.relu6(self.a(x)), 2)
        x = nn.functional.hardtanh(self.b(x).clamp(min=-0.5)).transpose(2, 3)
        x = torch.relu(self.c(x)).mean((2, 3))
        return self.head(self.d(x).clamp(0.0, 0.3))


def largest_gap(network, untrained, folder, activation, quantizer="lsq"):
    """Quantize all but the head, export, verify; return how far any of 64 outputs is off, in parts of the largest."""
    clients()
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    rules = [{"match": "head", "weight": None, "activation": None}]
    policy = qat.QuantPolicy(
        weight=qat.QuantSpec(bits=4), activation=activation, activation_quantizer=quantizer, rules=rules
    )
    qat.calibrate(qat.prepare(network, policy, False), [onnx.random_input(IMAGES, 16)])
    model = from_model(qat.freeze(network.eval()))
    model.example = IMAGES
    onnx.write(model, folder, untrained())
    rows = dict(onnx.verify(folder, model, untrained()))
    assert "same integers at every edge" in rows["onnxruntime, activations"]
    x = onnx.random_input(IMAGES, 64, seed=1)
    expected = to_model(model, untrained())(x).detach()
    runs = (onnx.onnx_client._run_onnxruntime, onnx.onnx_client._run_openvino)
    return max((run(folder / onnx.FILE, x)[0] - expected).abs().max() / expected.abs().max() for run in runs).item()


@pytest.mark.clients
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("act", "gate", "quantizer", "symmetric"),
    [
        (nn.ReLU6, nn.Sigmoid, "lsq", True),
        (nn.Hardswish, nn.Hardsigmoid, "lsq", False),
        (nn.SiLU, nn.Sigmoid, "pact", True),
        (nn.GELU, nn.Sigmoid, "minmax", True),
    ],
)
def test_networks_for_phones(tmp_path, bits, act, gate, quantizer, symmetric):
    """At onnxruntime's default level of optimization: no sum of these seeds falls to the other side of an edge."""
    torch.manual_seed(0)
    network = Mobile(act, gate)
    with torch.no_grad():
        network(onnx.random_input(IMAGES, 32))  # batch statistics
    spec = qat.QuantSpec(bits=bits, symmetric=symmetric, **PER_TENSOR)
    assert largest_gap(network, lambda: Mobile(act, gate), tmp_path, spec, quantizer) < 1e-5


@pytest.mark.clients
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_what_onnxruntime_moves_and_merges_keeps_its_integers(tmp_path, bits, symmetric):
    """Clips and a MaxPool before an input of 4 bits; biases, which it would round to int32 before one of 8."""
    torch.manual_seed(0)
    spec = qat.QuantSpec(bits=bits, symmetric=symmetric, **PER_TENSOR)
    assert largest_gap(Pooled(), Pooled, tmp_path, spec) < 1e-5


@pytest.mark.clients
@pytest.mark.parametrize("qdq", [False, True])
@pytest.mark.parametrize("group", [24, 32, 64])
def test_a_language_model_of_ours(tmp_path, qdq, group):
    args = {"width": 192, "depth": 1, "heads": 2, "context": 32, "tie_embeddings": False}
    rules = [{"match": "lm_head", "weight": {"bits": 8, "group_size": None, "granularity": "channel"}}]
    model = frozen(build({"builder": "gpt", "args": args}), qat.QuantSpec(group_size=group), None, rules, TOKENS)
    notes, rows = written(model, tmp_path, qdq=qdq)
    products = 0 if qdq else 1 if group == 24 else 5
    counts = {"MatMulNBits": products, "DequantizeLinear": 5 - products}
    assert notes[0] == "model.onnx: " + ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    assert notes[-1] == "the graph runs whole sequences without a cache"  # GGUF and GPTQ have no such architecture
    assert rows["onnxruntime, outputs"].endswith("argmax equal in 100.00%")
    session = onnx_parts.session(tmp_path / onnx.FILE)
    tokens = onnx.random_input({**TOKENS, "shape": [31]}, 3)  # both axes are free
    expected = to_model(model)(tokens).detach()
    found = torch.from_numpy(session.run(None, {"input_ids": tokens.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.clients
@pytest.mark.parametrize("qdq", [False, True])
def test_openvino_runs_the_same_file(tmp_path, monkeypatch, qdq):
    pytest.importorskip("openvino")
    args = {"width": 192, "depth": 1, "heads": 2, "context": 32}
    rules = [{"match": "lm_head", "weight": None}]
    model = frozen(build({"builder": "gpt", "args": args}), qat.QuantSpec(group_size=32), None, rules, TOKENS)
    notes, rows = written(model, tmp_path, qdq=qdq)
    assert rows["OpenVINO, outputs"].endswith("argmax equal in 100.00%")
    assert any("EXECUTION_MODE_HINT=ACCURACY" in note for note in notes)
    run = onnx.onnx_client._run_openvino
    monkeypatch.setattr(onnx.onnx_client, "_run_openvino", lambda file, x: [run(file, x)[0] * 1.001])
    with pytest.raises(ArtifactError, match="outputs of OpenVINO differ"):
        onnx.verify(tmp_path, model)


class Hollow(Net):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(0, 5)

    def forward(self, x):
        return super().forward(x) + self.more(x[:, :0, 0, 0])


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_what_openvino_does_not_take_is_said(tmp_path):
    """Such as a product without inputs, which onnxruntime runs."""
    pytest.importorskip("openvino")
    _, rows = written(frozen(Hollow(), qat.QuantSpec()), tmp_path, Hollow())
    assert rows["onnxruntime, outputs"].endswith("argmax equal in 100.00%")
    assert "does not take this file (Scalars are not supported" in rows["OpenVINO"]


@pytest.mark.clients
@pytest.mark.parametrize("tied", [False, True])
def test_a_transformers_model_in_bfloat16(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    clients()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    rules = [{"match": "lm_head", "weight": None}]
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model = frozen(model, qat.QuantSpec(group_size=32), None, rules, None)
    notes, rows = written(model, tmp_path)
    assert any("without a cache; to generate text use --to gguf" in note for note in notes)
    assert transformers.AutoConfig.from_pretrained(tmp_path).tie_word_embeddings == tied
    assert "14 layers equal q*s" in rows["onnxruntime, weights"]
    read = onnx.read(tmp_path)
    tokens = onnx.example_input(model)
    assert torch.equal(to_model(read).float()(tokens).logits, to_model(model).float()(tokens).logits)


@pytest.mark.clients
def test_gpt2s_layers_with_only_their_inputs_quantized(tmp_path):
    """Conv1D keeps its weight with the inputs first."""
    clients()
    layers = pytest.importorskip("transformers.pytorch_utils")

    def network():
        return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), layers.Conv1D(5, 8))

    example = {"shape": [16], "dtype": "float32", "low": -1, "high": 1}
    rules = [{"match": "2", "weight": None}]
    activation = qat.QuantSpec(bits=8, **PER_TENSOR)
    model = frozen(network(), qat.QuantSpec(group_size=16), activation, rules, example)
    onnx.write(model, tmp_path, network())
    rows = dict(onnx.verify(tmp_path, model, network()))
    assert rows["onnxruntime, activations"].startswith("2 layers")


@pytest.mark.clients
@pytest.mark.parametrize("grid", [{"group_size": 9}, {"group_size": 36}, PER_TENSOR, {}])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_and_grouped_convolutions(tmp_path, grid, bits):
    spec = qat.QuantSpec(bits=bits, signed=True, symmetric=False, **grid)
    model = net(activation_bits=None, rules=[{"match": "re:b|c|head", "weight": None}])
    tensors = {name: random_tensor(layer.shape, _fitting(spec, layer)) for name, layer in model.layers.items()}
    layers = {name: replace(layer, weight=tensors[name].spec) for name, layer in model.layers.items()}
    model = replace(model, layers=layers, quantized=tensors.__getitem__)
    _, rows = written(model, tmp_path, Net())
    assert rows["onnxruntime, weights"].startswith("2 layers equal q*s in every bit")


def _fitting(spec, layer):
    inputs = torch.Size(layer.shape[1:]).numel()
    return spec if spec.group_size is None or inputs % spec.group_size == 0 else replace(spec, group_size=9)


@pytest.mark.clients
def test_from_a_loop_of_the_users_own_to_onnx(tmp_path):
    """As README has it: no checkpoint of ours, a network of nobody's, and one batch to trace it with."""
    clients()
    torch.manual_seed(0)
    model, images = Again(), torch.randn(8, 3, 16, 16)
    qat.prepare(model, "conv_w4a4", verbose=False)
    qat.calibrate(model, [images])
    qat.save(qat.freeze(model), tmp_path / "out", example=images)
    command = [str(tmp_path / "out"), "--to", "onnx", "--out", str(tmp_path / "onnx"), "--model", "test_onnx:Again"]
    assert convert([*command, "--verify"]) == 0
    found = session(tmp_path / "onnx" / "model.onnx").run(None, {"input": images.numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), model(images), rtol=0, atol=0.05 * model(images).abs().max().item())
