"""ONNX: operands pinned by hand, every layer exact in onnxruntime, whole models, and mutants that must be noticed."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qat
from qat.errors import ArtifactError
from qat.formats import onnx, onnx_parts, onnx_trace, onnx_weights
from qat.frozen_model import from_model, to_model
from qat.models import build
from qat.numerics import QuantizedTensor, scale_shape
from qat.quantized_model import QuantizedLayer

IMAGES = {"shape": [3, 16, 16], "dtype": "float32", "low": -1, "high": 1}
TOKENS = {"shape": [12], "dtype": "int64", "low": 0, "high": 255}
PER_TENSOR = {"granularity": "tensor"}


def random_tensor(shape, spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = scale_shape(shape, spec)

    def integers(*size):
        return torch.randint(-spec.q_n, spec.q_p + 1, size, dtype=torch.int8, generator=generator)

    scale = (torch.rand(groups, generator=generator) * 0.1 + 0.01).bfloat16()
    return QuantizedTensor(integers(*shape), scale, spec, None if spec.symmetric else integers(*groups))


def test_matmul_operands_to_the_nibble():
    """Two rows of three inputs with one scale each: the block of 16 is padded with u = 8."""
    spec = qat.QuantSpec(signed=True, symmetric=False)
    codes = torch.tensor([[-8, -7, 7], [0, 1, 2]], dtype=torch.int8)
    zero_point = torch.tensor([[-8], [5]], dtype=torch.int8)
    tensor = QuantizedTensor(codes, torch.tensor([[0.5], [2.0]]).bfloat16(), spec, zero_point)
    packed, scales, zero_points = onnx_weights.matmul_operands(tensor, 16)
    assert packed.tolist() == [[[0x10, 0x8F, *[0x88] * 6]], [[0x98, 0x8A, *[0x88] * 6]]]
    assert scales.tolist() == [0.5, 2.0]
    assert (zero_points & 15).tolist() == [0, 13]  # one byte a row, its high nibble unused
    wide = replace(tensor, spec=replace(spec, bits=8, symmetric=True), zero_point=None)
    packed, _, zero_points = onnx_weights.matmul_operands(wide, 16)
    assert packed[0, 0, :4].tolist() == [120, 121, 135, 128] and zero_points is None


def test_wide_codes_are_stored_unsigned():
    tensor = random_tensor([4, 3, 3, 3], qat.QuantSpec(bits=8, signed=True))
    layer = QuantizedLayer("Conv2d", [4, 3, 3, 3], tensor.spec, None)
    codes, scales, zero_points = onnx_weights.dequantize_operands(tensor, layer)
    assert codes.dtype == torch.uint8 and zero_points.tolist() == [128] * 4 and scales.shape == (4,)
    assert torch.equal(codes.int() - 128, tensor.codes.int())


@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from([None, "tensor", 3, 16, 24, 32, 48, 256]),
    rows=st.integers(1, 5),
    multiple=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_operands_keep_every_code(bits, symmetric, group, rows, multiple, seed):
    grid = PER_TENSOR if group == "tensor" else {"group_size": group}
    spec = qat.QuantSpec(bits=bits, signed=True, symmetric=symmetric, **grid)
    shape = [rows, (group if isinstance(group, int) else 37) * multiple]
    tensor, layer = random_tensor(shape, spec, seed), QuantizedLayer("Linear", shape, spec, None)
    forms = [(onnx_weights.DEQUANTIZE_PARTS, onnx_weights.dequantize_operands(tensor, layer))]
    block = onnx_weights.matmul_block(layer)
    assert (block is None) == (group in (3, 24))
    if block is not None:
        operands = onnx_weights.matmul_operands(tensor, block)
        assert [part.shape for part in operands if part is not None] == [
            torch.Size(size) for size in onnx_weights.matmul_shapes(layer)[: 2 if symmetric else 3]
        ]
        forms.append((onnx_weights.MATMUL_PARTS, operands))
    for parts, operands in forms:
        stored = {f"a.{part}": value for part, value in zip(parts, operands, strict=True) if value is not None}
        read = onnx_weights.decode(stored, "a", layer)
        assert torch.equal(read.codes, tensor.codes) and torch.equal(read.scale, tensor.scale)
        assert read.scale.dtype == tensor.scale.dtype
        assert symmetric or torch.equal(read.zero_point, tensor.zero_point)


class Net(nn.Module):
    """No batch norm: onnxruntime may fuse everything. A bias, a shared weight, and a module called layer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, bias=False)
        self.layer = nn.Sequential(nn.Conv2d(8, 6, 3, stride=2, groups=2), nn.ReLU())
        self.b = nn.Linear(6, 6)
        self.c = nn.Linear(6, 6, bias=False)
        self.c.weight = self.b.weight
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.layer(torch.relu(self.a(x))).mean((2, 3))
        return self.head(torch.relu(self.c(torch.relu(self.b(x)))))


def frozen(network, weight, activation=None, rules=(), example=IMAGES):
    torch.manual_seed(0)
    policy = qat.QuantPolicy(weight=weight, activation=activation, rules=list(rules))
    qat.prepare(network, policy, False)
    if activation is not None:
        qat.calibrate(network, [onnx.random_input(example, 8)])
    model = from_model(qat.freeze(network))
    model.example = example
    return model


def net(bits=4, activation_bits=4, **options):
    torch.manual_seed(0)
    activation = activation_bits and qat.QuantSpec(bits=activation_bits, **PER_TENSOR)
    return frozen(Net(), qat.QuantSpec(bits=bits), activation, **options)


def test_without_an_example_input_the_fix_is_said(tmp_path):
    model = net()
    model.example = None
    with pytest.raises(ArtifactError, match="does not say what its inputs look like"):
        onnx.example_input(model)
    model.architecture = {"transformers": {"vocab_size": 9}}
    assert onnx.example_input(model).max() < 9


def test_without_the_packages_the_pip_line_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match="pip install onnx onnxscript onnxruntime"):
        onnx.write(net(), tmp_path)


def clients():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


def written(model, folder, network=None, **options):
    clients()
    notes = onnx.write(model, folder, network, **options)
    return notes, dict(onnx.verify(folder, model, None if network is None else type(network)()))


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
    return max((run(folder / onnx.FILE, x) - expected).abs().max() / expected.abs().max() for run in runs).item()


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
    monkeypatch.setattr(onnx.onnx_client, "_run_openvino", lambda file, x: run(file, x) * 1.001)
    with pytest.raises(ArtifactError, match="outputs of OpenVINO differ"):
        onnx.verify(tmp_path, model)


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
    assert any("without a cache" in note for note in notes)
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
def test_nothing_of_the_exporting_machine_is_in_the_file(tmp_path):
    written(net(), tmp_path, Net())
    content = (tmp_path / onnx.FILE).read_bytes()
    assert b"site-packages" not in content and __file__.encode() not in content and b"forward" not in content


@pytest.mark.clients
def test_large_models_get_a_data_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "SINGLE_FILE_BYTES", 100)
    model = net()
    written(model, tmp_path, Net())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "model.onnx", "model.onnx.data"]


class Unused(Net):
    def forward(self, x):
        return self.head(self.layer(self.a(x)).mean((2, 3)))


class OneBatch(Net):
    def forward(self, x):
        return super().forward(x.reshape(2, 3, 16, 16))


@pytest.mark.clients
def test_what_the_graph_cannot_hold_is_refused(tmp_path):
    clients()
    with pytest.raises(ArtifactError, match="the forward does not"):
        onnx.write(net(activation_bits=None), tmp_path, Unused())
    with pytest.raises(ArtifactError, match=r"for any batch size: .*static shape of 2"):
        onnx.write(net(), tmp_path, OneBatch())


@pytest.mark.clients
def test_what_is_no_file_of_ours_is_said(tmp_path):
    clients()
    import onnx as package

    with pytest.raises(ArtifactError, match="there is no ONNX file"):
        onnx.read(tmp_path)
    (tmp_path / onnx.FILE).write_bytes(b"\x08nonsense")
    with pytest.raises(ArtifactError, match="damaged"):
        onnx.read(tmp_path)
    graph = package.helper.make_graph([], "empty", [], [])
    package.save(package.helper.make_model(graph), tmp_path / onnx.FILE)
    with pytest.raises(ArtifactError, match="another program"):
        onnx.read(tmp_path)


def mutated(folder, name, change):
    """Change one initialiser's bytes in a written file."""
    import onnx as package

    proto = package.load(folder / onnx.FILE)
    tensor = next(value for value in proto.graph.initializer if value.name == name)
    tensor.raw_data = bytes(change(bytearray(tensor.raw_data)))
    package.save(proto, folder / onnx.FILE)


def flip(content):
    content[1] ^= 0x10
    return content


def next_float(content):
    content[0] ^= 1
    return content


@pytest.mark.clients
@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("head.weight_nbits", flip, "head differs in .*: 1 of 30 codes"),
        ("a.weight_codes", flip, "a differs in .*: 1 of 216 codes"),
        ("head.weight_scales", next_float, "head differs in .* weights in onnxruntime"),
        ("a.weight_scales", next_float, "a differs in .* weights in onnxruntime"),
        ("b.activation_scale", next_float, "the input of b is rounded otherwise"),
        ("head.activation_zero_point", lambda content: b"\x01", "the input of head is rounded otherwise"),
        ("network.head.layer.bias", lambda content: content[::-1], "outputs of .* differ"),
    ],
)
def test_mutants_are_noticed(tmp_path, part, change, message):
    written(net(), tmp_path, Net())
    mutated(tmp_path, part, change)
    with pytest.raises(ArtifactError, match=message):
        onnx.verify(tmp_path, net(), Net())


@pytest.mark.clients
def test_a_graph_that_computes_something_else_is_noticed(tmp_path, monkeypatch):
    clients()
    right = onnx_trace.Exported.forward

    def forward(self, x):
        return right(self, x) * 1.1

    monkeypatch.setattr(onnx_trace.Exported, "forward", forward)
    onnx.write(net(), tmp_path, Net())
    with pytest.raises(ArtifactError, match="outputs of"):
        onnx.verify(tmp_path, net(), Net())
