"""Embeddings: rows quantized as the whole weight would be, ties that share one quantizer, and every format's answer."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from random_quantized import random_tensor
from torch import nn

import qat
import qat.layers.embedding
import qat.layers.packed
from qat import formats
from qat.errors import ArtifactError, LayerError, PolicyError
from qat.frozen_model import from_model, to_model
from qat.layers import FrozenEmbedding, QuantEmbedding
from qat.models import build

SPECS = st.builds(
    lambda bits, grid: qat.QuantSpec(bits=bits, **grid),
    st.integers(2, 8),
    st.sampled_from([{"granularity": "tensor"}, {"granularity": "channel"}, {"group_size": 4}, {"group_size": 12}]),
)
RULE = {"match": "Embedding", "weight": {"bits": 8, "group_size": 32}}
TIED = [RULE, {"match": "lm_head", "weight": {"bits": 8, "group_size": 32}}]


def prepared(spec, rows=7, width=12, dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = nn.Embedding(rows, width, dtype=dtype, **options)
    rules = [{"match": "Embedding", "weight": spec}]
    layer = qat.prepare(nn.Sequential(layer), qat.QuantPolicy(rules=rules), verbose=False)[0]
    with torch.no_grad():
        layer.weight_quantizer.step_size.mul_(torch.rand_like(layer.weight_quantizer.step_size) * 0.5 + 0.75)
    return layer


def check_rows_and_gradients(module, spec=None, indices=(3, 0, 3), seed=0):
    """Rows that are looked up several times, and rows that never are."""
    layer, indices = prepared(spec or qat.QuantSpec(group_size=4)).double(), torch.tensor([indices])
    layer.__class__ = module.QuantEmbedding
    weight, step_size = layer.weight, layer.weight_quantizer.step_size
    expected = F.embedding(indices, layer.weight_quantizer(weight))
    found = layer(indices)
    assert torch.equal(found, expected)
    slope = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for a, b in zip(
        torch.autograd.grad(found, (weight, step_size), slope),
        torch.autograd.grad(expected, (weight, step_size), slope),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)  # step sizes are float32


def test_an_embedding_takes_no_codebook():
    rules = [{"match": "Embedding", "weight": {"codebook": "nf4", "granularity": "channel"}}]
    with pytest.raises(LayerError, match=r"'0': an Embedding takes no codebook: set it, or weight, to null"):
        qat.prepare(nn.Sequential(nn.Embedding(4, 8)), qat.QuantPolicy(rules=rules), verbose=False)


@pytest.mark.parametrize("order", ["frozen, laid out", "laid out, frozen"])
def test_rows_are_found_where_the_codes_are_laid_out_for_kernels(order):
    """As on a GPU, where a tied head needs that layout."""
    pytest.importorskip("triton")
    layer = qat.freeze(nn.Sequential(prepared(qat.QuantSpec(group_size=32), width=64)))[0]
    weight, indices = layer.packed_weight, torch.tensor([[3, 0, 3]])
    expected = layer(indices)
    if order == "laid out, frozen":
        weight.looked_up = False
    weight.prepack()
    if order == "laid out, frozen":
        assert not weight.packed.numel()
        weight.keep_rows()
    assert weight.gpu_operands and torch.equal(layer(indices), expected)
    assert torch.equal(layer.to("cpu")(indices), expected)


def check_padding(module):
    layer = prepared(qat.QuantSpec(bits=4), padding_idx=2)
    layer.__class__ = module.QuantEmbedding
    with torch.no_grad():
        layer.weight[2] = layer.weight[1]  # which is 0 at first
    layer(torch.tensor([1, 2])).sum().backward()
    assert layer.weight.grad[2].count_nonzero() == 0 and layer.weight_quantizer.step_size.grad[2] == 0
    assert layer.weight.grad[1].count_nonzero() and layer.weight_quantizer.step_size.grad[1] != 0


def check_frozen_rows(module):
    """With zero points, which no quantizer of ours learns, and other tools' models have."""
    spec = qat.QuantSpec(bits=4, group_size=4, signed=True, symmetric=False)
    codes = torch.randint(-8, 8, (5, 12), dtype=torch.int8)
    scale, zero_point = torch.rand(5, 3).bfloat16(), torch.randint(-8, 8, (5, 3), dtype=torch.int8)
    tensor = qat.numerics.QuantizedTensor(codes, scale, spec, zero_point)
    packed = module.PackedWeight.from_tensor(tensor)
    assert torch.equal(packed.dequantize_rows(torch.tensor([3, 0, 3]), torch.float32), tensor.dequantize()[[3, 0, 3]])


@given(SPECS, st.lists(st.integers(0, 6), min_size=1, max_size=9), st.integers(0, 99))
def test_rows_and_gradients_are_those_of_the_whole_quantized_weight(spec, indices, seed):
    check_rows_and_gradients(qat.layers.embedding, spec, indices, seed)


@given(
    SPECS,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([(), (3,), (2, 3), (1, 2, 2), (0,), (2, 0)]),
    st.booleans(),
)
def test_frozen_is_trained_to_the_bit(spec, dtype, shape, narrow):
    layer = prepared(spec, dtype=dtype)
    indices = torch.randint(0, 7, shape, dtype=torch.int32 if narrow else torch.int64)
    with torch.no_grad():
        expected, whole = layer(indices), layer.weight_quantizer(layer.weight)
    tensor = layer.weight_quantizer.quantize(layer.weight)
    frozen = qat.freeze(nn.Sequential(layer))[0]
    assert type(frozen) is FrozenEmbedding and not dict(frozen.named_parameters())
    found = frozen(indices)
    assert found.dtype == dtype and torch.equal(found, expected) and found.shape == (*shape, 12)
    assert torch.equal(frozen(torch.arange(7)), whole) and torch.equal(tensor.dequantize(dtype), whole)
    assert frozen.double()(indices).dtype == torch.float64


def test_no_indices_leave_the_gradients_empty():
    layer = prepared(qat.QuantSpec(group_size=4))
    layer(torch.empty(2, 0, dtype=torch.int64)).sum().backward()
    assert not layer.weight.grad.any()


def test_zero_points_of_rows():
    check_frozen_rows(qat.layers.packed)


def test_padding_and_a_delayed_start():
    check_padding(qat.layers.embedding)
    layer = prepared(qat.QuantSpec())
    layer.weight_quantizer.enabled = False
    assert torch.equal(layer(torch.tensor([1])), layer.weight[1:2])


def test_only_a_rule_quantizes_an_embedding(capsys):
    policy = qat.QuantPolicy.from_yaml("lm_w4")
    assert type(qat.prepare(gpt(), policy, verbose=False).tokens) is nn.Embedding
    policy = qat.QuantPolicy(rules=[RULE, {"match": "positions", "weight": None}])
    model = qat.prepare(gpt(), policy)
    assert type(model.tokens) is QuantEmbedding and type(model.positions) is nn.Embedding
    printed = capsys.readouterr().out
    assert re.search(r"tokens +64x64 +int8 g32 +- +8.50", printed)
    assert "rule match='positions'" in printed
    with pytest.raises(PolicyError, match="the input of 'tokens', an Embedding, which is indices"):
        qat.prepare(gpt(), qat.QuantPolicy(rules=[{"match": "tokens", "activation": {"bits": 8}}]), verbose=False)
    with pytest.raises(LayerError, match="'0': max_norm rescales rows"):
        prepared(qat.QuantSpec(), max_norm=1.0)
    with pytest.raises(LayerError, match="'tokens': group_size=48 does not divide its 64 inputs"):
        policy = qat.QuantPolicy(rules=[{"match": "tokens", "weight": {"group_size": 48}}])
        qat.prepare(gpt(), policy, verbose=False)


def gpt(tie_embeddings=False):
    torch.manual_seed(0)
    sizes = {"vocabulary": 64, "width": 64, "depth": 1, "heads": 2, "context": 16}
    return build({"builder": "gpt", "args": {**sizes, "tie_embeddings": tie_embeddings}})


def test_a_tied_weight_has_one_quantizer():
    model = gpt(tie_embeddings=True)
    qat.prepare(model, qat.QuantPolicy(weight=qat.QuantSpec(group_size=32), rules=TIED), verbose=False)
    assert model.tokens.weight is model.lm_head.weight
    assert model.tokens.weight_quantizer is model.lm_head.weight_quantizer
    tokens = torch.arange(12)[None]
    expected = model(tokens)
    expected.sum().backward()
    assert model.tokens.weight_quantizer.step_size.grad.count_nonzero()
    frozen = qat.freeze(model)
    assert frozen.tokens.packed_weight is frozen.lm_head.packed_weight
    assert torch.equal(frozen(tokens), expected)
    with pytest.raises(LayerError, match="'lm_head': its weight is tied to the embedding 'tokens'"):
        head = {"match": "lm_head", "weight": None}
        qat.prepare(gpt(True), qat.QuantPolicy(weight=qat.QuantSpec(), rules=[RULE, head]), verbose=False)
    with pytest.raises(LayerError, match="'lm_head': its weight is tied to 'tokens', which gets another spec"):
        qat.prepare(gpt(True), qat.QuantPolicy(weight=qat.QuantSpec(), rules=[RULE]), verbose=False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_artifact_holds_it_once(tied, dtype, tmp_path):
    model = gpt(tied).to(dtype)
    qat.prepare(model, qat.QuantPolicy(weight=qat.QuantSpec(group_size=32), rules=TIED), verbose=False)
    qat.freeze(model)
    tokens = torch.arange(16)[None]
    expected = model(tokens)
    qat.save(model, tmp_path)
    stored = formats.read(tmp_path)
    assert stored.layers["tokens"].type == "Embedding" and stored.layers["tokens"].dtype == str(dtype)[6:]
    assert stored.layers["lm_head"].tied == ("tokens" if tied else None)
    loaded = qat.load(tmp_path)
    assert (loaded.tokens.packed_weight is loaded.lm_head.packed_weight) is tied
    assert loaded(tokens).dtype == dtype and torch.equal(loaded(tokens), expected)


class Rows(nn.Module):
    """An embedding and a head, so that the output is no row itself."""

    def __init__(self, width):
        super().__init__()
        self.rows, self.head = nn.Embedding(11, width), nn.Linear(width, 3)

    def forward(self, indices):
        return self.head(self.rows(indices)).sum(1)


@pytest.mark.clients
@pytest.mark.parametrize(
    ("width", "bits", "symmetric", "grid", "operator"),
    [
        (96, 4, True, {"group_size": 32}, "GatherBlockQuantized"),
        (96, 8, True, {"group_size": 48}, "GatherBlockQuantized"),
        (64, 3, True, {"granularity": "channel"}, "GatherBlockQuantized"),
        (96, 8, True, {"granularity": "tensor"}, "GatherBlockQuantized"),
        (60, 4, True, {"group_size": 12}, "DequantizeLinear"),
        (37, 8, True, {"granularity": "channel"}, "DequantizeLinear"),
        (64, 4, False, {"group_size": 32}, "DequantizeLinear"),
        (36, 8, False, {"granularity": "channel"}, "DequantizeLinear"),
    ],
)
def test_onnx_holds_rows_of_any_grid(width, bits, symmetric, grid, operator, tmp_path):
    for client in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(client)
    policy = qat.QuantPolicy(rules=[{"match": "rows", "weight": {"bits": bits, **grid}}])
    model = from_model(qat.freeze(qat.prepare(Rows(width), policy, verbose=False)))
    spec = replace(model.layers["rows"].weight, symmetric=symmetric)
    tensor = random_tensor(11, width, spec, seed=bits)
    model.layers["rows"] = replace(model.layers["rows"], weight=spec)
    model.quantized = {"rows": tensor}.__getitem__
    model.example = {"shape": [5], "dtype": "int64", "low": 0, "high": 10}
    notes = formats.module("onnx").write(model, tmp_path, Rows(width))
    assert f"1 {operator}" in notes[0]
    rows = dict(formats.module("onnx").verify(tmp_path, model, Rows(width)))
    assert rows["onnxruntime, weights"].startswith("1 layers equal q*s in every bit")
    read = formats.read(tmp_path).quantized("rows")
    assert torch.equal(read.codes, tensor.codes) and torch.equal(read.scale, tensor.scale)
    assert symmetric or torch.equal(read.zero_point, tensor.zero_point)


def quantized_llama(weight, embedding, tied=True, dynamic=None, dtype=torch.float32, trained_norms=True):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        **sizes, num_key_value_heads=1, vocab_size=96, max_position_embeddings=64, tie_word_embeddings=tied
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():  # a norm of ones leaves rows on the embedding's grid, where q8_0 meets exact halves
        for name, parameter in model.named_parameters():
            if "norm" in name and trained_norms:
                parameter.uniform_(0.5, 1.5)
    rules = [{"match": name, "weight": embedding} for name in ("Embedding", *(["lm_head"] if tied else []))]
    policy = qat.QuantPolicy(weight=weight, rules=rules, dynamic=dynamic)
    return from_model(qat.freeze(qat.prepare(model, policy, verbose=False)))


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "awq", "executorch"])
def test_formats_without_embeddings_refuse_by_name(to, tmp_path):
    model = quantized_llama({"group_size": 32}, {"group_size": 32})
    with pytest.raises(ArtifactError, match=r"'model.embed_tokens' is an Embedding, .*--to gguf, mlx or onnx holds it"):
        formats.module(to).write(model, tmp_path)


@pytest.mark.clients
@pytest.mark.parametrize("embedding", [{"bits": 8, "group_size": 32}, {"bits": 8}, {"bits": 4, "group_size": 64}])
def test_llama_cpp_takes_our_side_of_exact_halves(embedding, tmp_path):
    """Its norms' last bits decide more than a thousand of these inputs; the bar is that of any model."""
    for client in ("gguf", "xllamacpp"):
        pytest.importorskip(client)
    gguf = formats.module("gguf")
    model = quantized_llama({"group_size": 32}, embedding, trained_norms=False)
    gguf.write(model, tmp_path)
    seen = dict(gguf.verify(tmp_path, model))["llama.cpp"]
    nearer = float(re.search(r"and (\S+) \(root mean square\) of ours", seen)[1])
    assert nearer < 1e-6, seen


@pytest.mark.clients
@pytest.mark.parametrize(
    ("embedding", "tied"),
    [({"bits": 8, "group_size": 32}, True), ({"bits": 4, "group_size": 64}, True), ({"bits": 8}, False)],
)
@pytest.mark.parametrize("to", ["gguf", "mlx", "onnx"])
def test_clients_read_the_same_rows(to, embedding, tied, tmp_path):
    for client in {"gguf": ["gguf", "xllamacpp"], "mlx": ["mlx_lm"], "onnx": ["onnxruntime", "openvino"]}[to]:
        pytest.importorskip(client)
    model = quantized_llama({"group_size": 32}, embedding, tied)
    formats.module(to).write(model, tmp_path)
    rows = formats.module(to).verify(tmp_path, model)
    text = " ".join(" ".join(row) for row in rows)
    assert "0 of" in text and "not compared" not in text and "not installed" not in text, text
    if to == "gguf":
        return  # whose embeddings are read back as they are dequantized
    read = formats.read(tmp_path)
    assert read.layers["model.embed_tokens"].type == "Embedding"
    assert read.layers["lm_head"].tied == ("model.embed_tokens" if tied else None)
    tokens = torch.arange(16)[None]
    assert torch.equal(to_model(read).float()(tokens).logits, to_model(model).float()(tokens).logits)
