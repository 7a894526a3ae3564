"""What is in an ONNX file: operands pinned by hand, what cannot be written or read, mutants that must be noticed."""

from dataclasses import replace
from inspect import getfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx_models import PER_TENSOR, Net, clients, net, random_tensor, written

import qat
from qat.errors import ArtifactError
from qat.formats import onnx, onnx_trace, onnx_weights
from qat.numerics import QuantizedTensor
from qat.quantized_model import QuantizedLayer


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


def test_without_an_example_input_the_fix_is_said(tmp_path):
    model = net()
    model.example = None
    with pytest.raises(ArtifactError, match=r"does not say what its inputs look like: give qat\.save a batch"):
        onnx.example_input(model)
    model.architecture = {"transformers": {"vocab_size": 9}}
    assert onnx.example_input(model).max() < 9


def test_without_the_packages_the_pip_line_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match="pip install onnx onnxscript onnxruntime"):
        onnx.write(net(), tmp_path)


@pytest.mark.clients
def test_nothing_of_the_exporting_machine_is_in_the_file(tmp_path):
    written(net(), tmp_path, Net())
    content = (tmp_path / onnx.FILE).read_bytes()
    assert b"site-packages" not in content and getfile(Net).encode() not in content and b"forward" not in content


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
