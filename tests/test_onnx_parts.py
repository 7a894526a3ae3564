"""A wide product of onnxruntime, in slices and whole: every weight to the bit, and clients that read it otherwise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qat
from qat.errors import ArtifactError
from qat.formats import onnx, onnx_parts
from qat.formats.onnx_client import compare_layers
from qat.frozen_model import from_model
from qat.numerics import QuantizedTensor, scale_shape

pytestmark = pytest.mark.clients


def model_of(rows, inputs, spec, seed=0):
    """Return a network of one linear layer called "0" with random codes."""
    random = torch.Generator().manual_seed(seed)
    groups = scale_shape((rows, inputs), spec)
    codes, zero_point = (
        torch.randint(-spec.q_n, spec.q_p + 1, size, dtype=torch.int8, generator=random)
        for size in ((rows, inputs), groups)
    )
    scale = (torch.rand(groups, generator=random) * 0.1 + 0.01).bfloat16()
    network = nn.Sequential(nn.Linear(inputs, rows))
    model = from_model(qat.freeze(qat.prepare(network, qat.QuantPolicy(weight=spec), False)))
    tensor = QuantizedTensor(codes, scale, spec, None if spec.symmetric else zero_point)
    model.quantized = lambda name: tensor
    model.example = {"shape": [inputs], "dtype": "float32", "low": -1, "high": 1}
    return model, tensor


def written(folder, monkeypatch, *shape, **spec):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx_parts, "WIDE", 256)
    monkeypatch.setattr("qat.formats.onnx_client.WIDE", 256)
    model, tensor = model_of(*shape, qat.QuantSpec(**spec))
    onnx.write(model, folder, nn.Sequential(nn.Linear(shape[1], shape[0])))
    return model, tensor, onnx_parts.Parts(folder / onnx.FILE)


@given(
    st.integers(1, 40),
    st.sampled_from([16, 32, 48, 128, None]),
    st.integers(3, 40),
    st.integers(2, 8),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_slices_give_every_weight(tmp_path_factory, rows, group, multiple, bits, symmetric):
    inputs = 16 * multiple + 257 if group is None else group * (256 // group + multiple)
    with pytest.MonkeyPatch.context() as patch:
        made = written(
            tmp_path_factory.mktemp("w"), patch, rows, inputs, bits=bits, group_size=group, symmetric=symmetric
        )
        model, tensor, parts = made
        assert torch.equal(onnx_parts.weight(parts, "0", [rows, inputs]), tensor.dequantize(torch.float32))
        ((_, seen),) = compare_layers(parts.file, model)
        assert seen.startswith("1 layers equal q*s in every bit; 1 of them in slices")


def swapped(inputs, first, second, length):
    order = torch.arange(inputs)
    order[first : first + length], order[second : second + length] = (
        order[second : second + length].clone(),
        order[first : first + length].clone(),
    )
    return order


@pytest.mark.parametrize(("length", "message"), [(32, "takes other weights"), (1, "inputs is .* off")])
def test_a_whole_product_that_reads_other_places_is_noticed(tmp_path, monkeypatch, length, message):
    model, tensor, parts = written(tmp_path, monkeypatch, 24, 512, group_size=32)
    run = onnx_parts.Parts.open
    # Columns 64 and 97 are no ones of the identity's: nothing but the random inputs shows them.
    order = swapped(512, 64, 96 if length == 32 else 97, length)
    monkeypatch.setattr(onnx_parts.Parts, "open", lambda *args: lambda x: run(*args)(x[:, order]))
    assert torch.equal(onnx_parts.weight(parts, "0", [24, 512]), tensor.dequantize(torch.float32))
    with pytest.raises(ArtifactError, match=message):
        compare_layers(parts.file, model)


def test_a_slice_that_reads_nibbles_the_other_way_is_noticed(tmp_path, monkeypatch):
    model, _, parts = written(tmp_path, monkeypatch, 24, 512, group_size=32)
    slices = onnx_parts.Parts.slices

    def turned(*args):
        return [lambda x, run=run: run(x.view(len(x), -1, 2).flip(-1).flatten(1)) for run in slices(*args)]

    monkeypatch.setattr(onnx_parts.Parts, "slices", turned)
    with pytest.raises(ArtifactError, match="of 12288 weights in onnxruntime"):
        compare_layers(parts.file, model)
