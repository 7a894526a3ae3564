"""The readers of gguf, onnxruntime, onnxruntime-genai and ExecuTorch give the trained codes and q * s, for any shape.

Those of compressed-tensors, mlx, torchao and bitsandbytes are asked in their own formats' tests.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_quantized import random_tensor, weight
from test_starting import random_llama
from torch import nn

import qat
from qat.formats import awq, executorch, gguf_blocks, gptq, onnx_parts, onnx_weights
from qat.frozen_model import from_model
from qat.quantized_model import QuantizedLayer

pytestmark = pytest.mark.clients
FORMATS = {"gptq": gptq, "awq": awq}


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 32, 64, 96, "tensor"]),
    symmetric=st.booleans(),
    rows=st.integers(1, 9),
    multiple=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_gguf(bits, group, symmetric, rows, multiple, seed):
    package = pytest.importorskip("gguf")
    grid = {"granularity": "tensor"} if group == "tensor" else {"group_size": group}
    inputs = multiple * (group if isinstance(group, int) else 32)
    spec = weight(bits, **{"symmetric": symmetric or bits > 4, **grid})
    tensor = random_tensor(rows, inputs, spec, seed)
    kind = gguf_blocks.block_type(QuantizedLayer("Linear", [rows, inputs], spec, None))
    blocks = gguf_blocks.encode(tensor, kind).numpy()
    found = torch.from_numpy(package.dequantize(blocks, package.GGMLQuantizationType[kind]))
    assert torch.equal(found, tensor.dequantize())
    scale = gguf_blocks.spread(tensor.scale, rows, inputs // 32).float().repeat_interleave(32, 1)
    zero_point = torch.zeros(1, 1) if tensor.zero_point is None else tensor.zero_point
    zero_point = gguf_blocks.spread(zero_point, rows, inputs // 32).repeat_interleave(32, 1)
    assert torch.equal((found / scale + zero_point).round().to(torch.int8), tensor.codes)


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 16, 32, 48, 64, 128, "tensor"]),
    symmetric=st.booleans(),
    rows=st.integers(1, 9),
    multiple=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_onnxruntime_at_accuracy_level_0(bits, group, symmetric, rows, multiple, seed):
    """An identity through MatMulNBits is its weight; K of 37, 74 and 111 end in a padded block."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    grid = {"granularity": "tensor"} if group == "tensor" else {"group_size": group}
    inputs = multiple * (group if isinstance(group, int) else 37)
    tensor = random_tensor(rows, inputs, weight(bits, symmetric=symmetric, **grid), seed)
    block = onnx_weights.matmul_block(QuantizedLayer("Linear", [rows, inputs], tensor.spec, None))
    operands = {
        name: value.numpy()
        for name, value in zip("bsz", onnx_weights.matmul_operands(tensor, block), strict=True)
        if value is not None
    }
    sizes = {"K": inputs, "N": rows, "bits": onnx_weights.stored_bits(tensor.spec), "block_size": block}
    options = {**sizes, "accuracy_level": 0, "domain": "com.microsoft"}
    node = onnx.helper.make_node("MatMulNBits", ["x", *operands], ["y"], **options)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy")
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in operands.items()]
    graph = onnx.helper.make_graph([node], "one", [x], [y], stored)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    made = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (found,) = onnx_parts.session(made.SerializeToString()).run(["y"], {"x": torch.eye(inputs).numpy()})
    assert torch.equal(torch.from_numpy(found).t(), tensor.dequantize())


@settings(max_examples=10)
@given(
    method=st.sampled_from(["gptq", "awq"]),
    bits=st.integers(2, 4),
    group=st.sampled_from([None, 32, 64, 128]),
    symmetric=st.booleans(),
    width=st.sampled_from([128, 256, 384]),
    inner=st.sampled_from([256, 640]),
    heads=st.sampled_from([(2, 1), (4, 4), (4, 2)]),
    layers=st.integers(1, 3),
)
def test_onnxruntime_genai(tmp_path_factory, method, bits, group, symmetric, width, inner, heads, layers):
    pytest.importorskip("onnxruntime_genai")
    folder = tmp_path_factory.mktemp("out")
    spec = weight(bits, group, symmetric=symmetric or method == "gptq")
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    model = random_llama(spec, **sizes, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    FORMATS[method].write(model, folder)
    model.architecture["transformers"]["architectures"] = ["LlamaModel"]  # the loader alone, without a run
    rows = dict(FORMATS[method].verify(folder, model))
    assert rows["codes, onnxruntime-genai"].startswith("0 of ")
    assert rows["weights, onnxruntime-genai"] == "equal to q*s in every float32 bit"


@settings(max_examples=6)
@given(
    bits=st.integers(2, 4),
    group=st.sampled_from([None, 32, 64, 96]),
    rows=st.integers(1, 70),
    multiple=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_executorch_packs_the_codes_and_runs_one_layer(tmp_path_factory, bits, group, rows, multiple, seed):
    pytest.importorskip("executorch")
    folder = tmp_path_factory.mktemp("out")
    inputs = multiple * (group or 32)

    def network():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, rows))

    policy = qat.QuantPolicy(weight(bits, group), dynamic="int8_token")
    model = from_model(qat.freeze(qat.prepare(network(), policy, verbose=False)))
    tensor = replace(random_tensor(rows, inputs, weight(bits, group), seed), scale=model.quantized("0").scale)
    model.quantized = lambda name: tensor
    model.example = {"shape": [inputs], "dtype": "float32", "low": -1, "high": 2}
    executorch.write(model, folder, network())
    seen = dict(executorch.verify(folder, model, network()))
    assert seen["codes and scales in the file"] == f"1 layers, {rows * inputs:,} codes, equal in every bit"
    assert "ExecuTorch, 0" in seen  # within 1e-5 of the simulation, or verify would have raised
