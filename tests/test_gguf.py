"""GGUF: blocks pinned by hand, every layer exact or refused, and the clients' own readers agree."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qat
from qat.errors import ArtifactError
from qat.formats import gguf, gguf_blocks, gguf_rounding
from qat.formats.gguf_names import language_config, rope_frequencies, row_order
from qat.formats.gguf_vocab import add_vocabulary
from qat.frozen_model import from_model, to_model
from qat.numerics import QuantizedTensor, scale_shape
from qat.quantized_model import QuantizedLayer, QuantizedModel

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 7,
}
QWEN2 = {**CONFIG, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def random_tensor(rows, inputs, spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = scale_shape((rows, inputs), spec)

    def integers(*size):
        return torch.randint(-spec.q_n, spec.q_p + 1, size, dtype=torch.int8, generator=generator)

    scale = (torch.rand(shape, generator=generator) * 0.1 + 2**-12).to(getattr(torch, spec.scale_dtype))
    return QuantizedTensor(integers(rows, inputs), scale, spec, None if spec.symmetric else integers(*shape))


def model_of(tensors, config=CONFIG, activation=None):
    layers = {name: QuantizedLayer("Linear", list(t.codes.shape), t.spec, activation) for name, t in tensors.items()}
    return QuantizedModel({"transformers": config}, layers, tensors.__getitem__, {}.__getitem__, {})


def block(text):
    return torch.tensor([list(bytes.fromhex(text.replace(" ", "")))], dtype=torch.uint8)


def test_a_q4_0_block_to_the_nibble():
    codes = torch.arange(32, dtype=torch.int8)[None] % 16 - 8
    tensor = QuantizedTensor(codes, torch.tensor([[0.5]]).bfloat16(), qat.QuantSpec(group_size=32, signed=True))
    expected = block("00 38 00112233445566778899aabbccddeeff")  # fp16 0.5; low nibble i, high nibble i + 16
    assert torch.equal(gguf_blocks.encode(tensor, "Q4_0"), expected)
    codes[0, 17] = -8  # the high nibble of byte 1
    assert gguf_blocks.encode(tensor, "Q4_0")[0, 3] == 0x01


def test_a_q4_1_block_to_the_nibble():
    codes = torch.full((1, 32), -8, dtype=torch.int8)
    spec = qat.QuantSpec(group_size=32, signed=True, symmetric=False)
    tensor = QuantizedTensor(codes, torch.tensor([[0.5]]).bfloat16(), spec, torch.tensor([[-6]], dtype=torch.int8))
    assert torch.equal(gguf_blocks.encode(tensor, "Q4_1"), block("00 38 00 bc" + "00" * 16))  # m = -2 * 0.5


def test_a_minimum_that_fp16_would_round_turns_the_block_upside_down():
    """15 * (1 + 127/128) needs 12 bits; minus the step and m = 0 do not."""
    codes = torch.full((1, 32), -8, dtype=torch.int8)
    spec = qat.QuantSpec(group_size=32, signed=True, symmetric=False)
    tensor = QuantizedTensor(codes, torch.tensor([[255 / 128]]).bfloat16(), spec, torch.tensor([[7]], dtype=torch.int8))
    blocks = gguf_blocks.encode(tensor, "Q4_1")
    assert torch.equal(blocks, block("f8 bf 00 00" + "ff" * 16))
    assert torch.equal(gguf_blocks.decode(blocks, "Q4_1").dequantize(), tensor.dequantize())


def test_a_q8_0_block_to_the_byte():
    codes = torch.arange(-16, 16, dtype=torch.int8)[None]
    tensor = QuantizedTensor(codes, torch.tensor([[1.0]]).bfloat16(), qat.QuantSpec(bits=8, group_size=32, signed=True))
    expected = block("00 3c f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff 000102030405060708090a0b0c0d0e0f")
    assert torch.equal(gguf_blocks.encode(tensor, "Q8_0"), expected)


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 32, 64, 96, "tensor"]),
    symmetric=st.booleans(),
    scale=st.sampled_from(["bfloat16", "float16"]),
    rows=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_blocks_keep_every_weight(bits, group, symmetric, scale, rows, seed):
    grid = {"granularity": "tensor"} if group == "tensor" else {"group_size": group}
    spec = qat.QuantSpec(bits=bits, signed=True, symmetric=symmetric or bits > 4, scale_dtype=scale, **grid)
    tensor = random_tensor(rows, 192, spec, seed)
    kind = gguf_blocks.block_type(QuantizedLayer("Linear", [rows, 192], spec, None))
    try:
        read = gguf_blocks.decode(gguf_blocks.encode(tensor, kind), kind)
    except ArtifactError as error:  # an fp16 step times a zero point need not be an fp16 number
        assert not symmetric and scale == "float16" and "fp16 would round" in str(error)
        return
    assert torch.equal(read.dequantize(), tensor.dequantize())
    assert torch.equal(read.codes, tensor.codes)
    assert read.spec.symmetric == tensor.spec.symmetric
    assert torch.equal(read.scale.float(), gguf_blocks.spread(tensor.scale, rows, 6).float())


def test_bf16_steps_are_exact_in_q4_1_for_every_zero_point():
    bits = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)  # every significand
    spec = qat.QuantSpec(group_size=32, signed=True, symmetric=False)
    for zero_point in range(-8, 8):
        codes = (torch.arange(32) % 16 - 8).to(torch.int8).expand(128, 32)
        tensor = QuantizedTensor(codes, bits[:, None], spec, torch.full((128, 1), zero_point, dtype=torch.int8))
        read = gguf_blocks.decode(gguf_blocks.encode(tensor, "Q4_1"), "Q4_1")
        assert torch.equal(read.dequantize(), tensor.dequantize())
        assert torch.equal(read.zero_point, tensor.zero_point)


def test_negative_and_zero_steps_of_llama_cpp_keep_their_values():
    read = gguf_blocks.decode(block("00 b8" + "0f" * 16), "Q4_0")  # d = -0.5, nibbles 15 and 0
    assert read.dequantize()[0, 0] == -0.5 * 7 and read.dequantize()[0, 16] == -0.5 * -8
    assert read.zero_point.tolist() == [[-1]] and (read.scale > 0).all()
    empty = gguf_blocks.decode(block("00 00" + "0f" * 16), "Q4_0")
    assert not empty.dequantize().any() and (empty.scale > 0).all()
    with pytest.raises(ArtifactError, match="no zero point equals it"):
        gguf_blocks.decode(block("00 3c 00 b8" + "00" * 16), "Q4_1")  # d = 1, m = -0.5


def test_rows_of_q_and_k_are_reordered_per_head():
    assert row_order(CONFIG, "model.layers.0.self_attn.q_proj.weight")[:6].tolist() == [0, 16, 1, 17, 2, 18]
    assert row_order(CONFIG, "model.layers.0.self_attn.q_proj.bias").shape == (64,)
    assert row_order(CONFIG, "model.layers.0.self_attn.k_proj.weight").shape == (32,)
    assert row_order(CONFIG, "model.layers.0.self_attn.v_proj.weight") is None
    assert row_order({**CONFIG, "model_type": "qwen2"}, "model.layers.0.self_attn.q_proj.weight") is None


def test_llama_3_rotation_frequencies_equal_transformers():
    divisors = rope_frequencies({**CONFIG, "head_dim": 64, "rope_parameters": LLAMA_3})
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters=LLAMA_3)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(plain / divisors, expected)


@pytest.mark.parametrize(
    ("spec", "inputs", "message"),
    [
        ({"group_size": 48}, 96, "q_proj has groups of 48.*--to onnx"),
        ({}, 40, "q_proj has 40 inputs.*--to onnx"),
        ({"bits": 8, "symmetric": False}, 64, "q_proj has 8 bits and a zero point.*--to onnx"),
    ],
)
def test_what_blocks_cannot_hold_is_refused_by_name(tmp_path, spec, inputs, message):
    tensor = random_tensor(64, inputs, qat.QuantSpec(signed=True, **spec))
    with pytest.raises(ArtifactError, match=message):
        gguf.write(model_of({"model.layers.0.self_attn.q_proj": tensor}), tmp_path)


def test_trained_activations_and_convolutions_are_refused_by_name(tmp_path):
    tensor = random_tensor(64, 64, qat.QuantSpec(signed=True))
    model = model_of({"model.layers.0.mlp.up_proj": tensor}, activation=qat.QuantSpec(granularity="tensor"))
    with pytest.raises(ArtifactError, match=r"up_proj has a trained activation scale.*--to onnx"):
        gguf.write(model, tmp_path)
    model.layers["model.layers.0.mlp.up_proj"] = QuantizedLayer("Conv2d", [64, 64, 1, 1], tensor.spec, None)
    with pytest.raises(ArtifactError, match="up_proj is a Conv2d: use --to onnx"):
        gguf.write(model, tmp_path)
    model.layers["model.layers.0.mlp.up_proj"] = QuantizedLayer("Linear", [64, 64], None, tensor.spec)
    with pytest.raises(ArtifactError, match="up_proj has a trained activation scale"):
        gguf.write(model, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (None, "use --to onnx"),
        ({"builder": "cnn"}, "use --to onnx"),
        ({"transformers": {**CONFIG, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}}, "GPT2LMHeadModel"),
        ({"transformers": {**CONFIG, "hidden_act": "gelu"}}, "silu only"),
        ({"transformers": {**QWEN2, "head_dim": 16}}, "heads of hidden_size / num_attention_heads only"),
        ({"transformers": {**CONFIG, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}}, "'yarn'"),
    ],
)
def test_models_that_llama_cpp_would_run_otherwise_are_refused(architecture, message):
    with pytest.raises(ArtifactError, match=message):
        language_config(architecture)


def test_a_float32_step_that_fp16_would_round_is_refused():
    tensor = random_tensor(2, 32, qat.QuantSpec(signed=True, scale_dtype="float32"))
    with pytest.raises(ArtifactError, match="2 steps or minima that fp16 would round"):
        gguf_blocks.encode(tensor, "Q4_0")


class Recorder:
    """Stands in for gguf.GGUFWriter: remembers what is added."""

    def __init__(self):
        self.added = {}

    def __getattr__(self, name):
        return lambda value: self.added.__setitem__(name.removeprefix("add_"), value)


def tokenizer_folder(tmp_path, model, pre_tokenizer=None, **settings):
    added = [{"id": 2, "content": "<s>", "special": True}]
    tokenizer = {"model": {"type": "BPE", **model}, "added_tokens": added, "pre_tokenizer": pre_tokenizer}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_byte_level_tokenizer(tmp_path):
    model = {"vocab": {"a": 0, "b": 1, "ab": 3}, "merges": [["a", "b"]]}
    split = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}],
    }
    folder, writer = tokenizer_folder(tmp_path, model, split, bos_token="<s>", add_bos_token=True), Recorder()
    assert add_vocabulary(writer, folder, CONFIG) is None
    assert writer.added["tokenizer_model"] == "gpt2" and writer.added["tokenizer_pre"] == "smollm"
    assert writer.added["token_list"] == ["a", "b", "<s>", "ab", "[PAD4]", "[PAD5]", "[PAD6]"]
    assert writer.added["token_types"] == [1, 1, 3, 1, 5, 5, 5]
    assert writer.added["token_merges"] == ["a b"]
    assert writer.added["bos_token_id"] == 2 and writer.added["add_bos_token"] is True


def test_a_sentencepiece_tokenizer_scores_its_merges_in_order(tmp_path):
    model = {"vocab": {"<unk>": 0, "<0x0A>": 1, "a": 3, "aa": 4, "aaa": 5}, "merges": ["a a", "aa a", "a aa"]}
    folder, writer = tokenizer_folder(tmp_path, {**model, "byte_fallback": True, "unk_token": "<unk>"}), Recorder()
    add_vocabulary(writer, folder, CONFIG)
    assert writer.added["tokenizer_model"] == "llama"
    assert writer.added["token_types"] == [2, 6, 3, 1, 1, 1, 5]
    assert writer.added["token_scores"][3:6] == [-1e6, 0.0, -1.0]


def test_a_tokenizer_that_llama_cpp_would_split_otherwise_is_refused(tmp_path):
    folder = tokenizer_folder(tmp_path, {"vocab": {"a": 0}, "merges": []}, {"type": "Whitespace"})
    with pytest.raises(ArtifactError, match=r"\(Whitespace\)"):
        add_vocabulary(Recorder(), folder, CONFIG)
    assert "placeholder" in add_vocabulary(Recorder(), None, CONFIG)


def llama(spec=None, kind="Llama", **config):
    """Return a frozen model of two blocks."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, initializer_range=0.2, **config)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).bfloat16()
    spec = spec or qat.QuantSpec(bits=4, group_size=32)
    rules = [{"match": "lm_head", "weight": None}]
    return qat.freeze(qat.prepare(model, qat.QuantPolicy(weight=spec, rules=rules), False))


def logits(model):
    with torch.no_grad():
        return model.float()(torch.arange(20).view(2, 10)).logits


@pytest.mark.clients
@pytest.mark.parametrize(
    ("kind", "spec", "config"),
    [
        ("Llama", {"group_size": 32}, {}),
        ("Llama", {"bits": 3}, {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"granularity": "tensor"}, {"tie_word_embeddings": True}),
        ("Llama", {"bits": 8, "group_size": 32}, {"head_dim": 32}),
        ("Mistral", {"group_size": 32}, {"sliding_window": 32}),
        ("Llama", {"group_size": 32}, {"rope_parameters": LLAMA_3}),
        ("Llama", {"group_size": 32}, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("Qwen2", {"group_size": 32}, {"use_sliding_window": False}),
        ("Qwen3", {"bits": 4}, {"head_dim": 16}),
    ],
)
def test_clients_run_the_trained_integers(tmp_path, kind, spec, config):
    pytest.importorskip("xllamacpp")
    model = from_model(llama(qat.QuantSpec(**spec), kind, **config))
    notes = gguf.write(model, tmp_path)
    assert any("sliding window of 32" in note for note in notes) == (kind == "Mistral")
    rows = dict(gguf.verify(tmp_path, model))
    assert rows["gguf.dequantize"].startswith("0 of ")
    assert rows["transformers, gguf_file="].startswith("logits differ by at most 0 ")
    assert int(re.match(r"next token equal in (\d) of 8 texts", rows["llama.cpp"])[1]) >= 7
    simulated, _, plain = map(float, re.findall(r"within (\S+)", rows["llama.cpp"]))
    assert simulated < 1e-5 and simulated < plain / 1000  # its rounding explains the rest
    assert any("unquantized matrices to their own type" in note for note in notes)


@pytest.mark.clients
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_a_file_read_back_is_the_same_model(tmp_path, kind):
    model = from_model(llama(kind=kind, attention_bias=True) if kind == "Llama" else llama(kind=kind))
    gguf.write(model, tmp_path)
    read = gguf.read(tmp_path)
    assert read.layers.keys() == model.layers.keys() and set(read.dense) == set(model.dense)
    for name in model.layers:
        assert torch.equal(read.quantized(name).codes, model.quantized(name).codes), name
    assert torch.equal(logits(to_model(read)), logits(to_model(model)))


@pytest.mark.clients
def test_zero_points_in_the_gguf_package(tmp_path):
    frozen = from_model(llama())
    spec = qat.QuantSpec(group_size=32, signed=True, symmetric=False)
    tensors = {name: random_tensor(*layer.shape, spec) for name, layer in frozen.layers.items()}
    layers = {name: replace(layer, weight=spec) for name, layer in frozen.layers.items()}
    model = replace(frozen, layers=layers, quantized=tensors.__getitem__)
    notes = gguf.write(model, tmp_path)
    assert "in 14 layers of Q4_1 the sum of the 32 is rounded to fp16" in notes[1]
    rows = dict(gguf.verify(tmp_path, model))
    assert rows["gguf.dequantize"].startswith("0 of ")
    if "log probabilities" in rows["llama.cpp"]:
        simulated, _, plain = map(float, re.findall(r"within (\S+)", rows["llama.cpp"]))
        assert simulated < 1e-5 and simulated < plain / 1000


@pytest.mark.clients
@pytest.mark.parametrize("symmetric", [True, False])
def test_another_rounding_than_llama_cpps_is_noticed(tmp_path, monkeypatch, symmetric):
    """Leaving out that it rounds the head's inputs to the head's own type, or Q4_1's sums to fp16."""
    pytest.importorskip("xllamacpp")
    model = from_model(llama())
    if not symmetric:
        spec = qat.QuantSpec(group_size=32, signed=True, symmetric=False)
        tensors = {name: random_tensor(*layer.shape, spec) for name, layer in model.layers.items()}
        layers = {name: replace(layer, weight=spec) for name, layer in model.layers.items()}
        model = replace(model, layers=layers, quantized=tensors.__getitem__)
    gguf.write(model, tmp_path)
    if symmetric:
        head = model.dense["lm_head.weight"]  # of bf16 values that fp16 holds: 1 part in 2048 is not much
        model.dense["lm_head.weight"] = torch.where(head.abs() < 2**-14, 2**-30, head).bfloat16()
        gguf.write(model, tmp_path)
        monkeypatch.setitem(gguf_rounding.DTYPES, "BF16", torch.float32)
    else:
        monkeypatch.setattr(gguf_rounding, "_rounding_of_sums", lambda x: x.new_zeros(*x.shape[:-1], x.shape[-1] // 32))
    with pytest.raises(ArtifactError, match=r"log probabilities differ by .* from ours with inputs rounded"):
        gguf.verify(tmp_path, model)


@pytest.mark.clients
def test_files_of_llama_cpps_own_quantizer_are_read_exactly(tmp_path):
    package = pytest.importorskip("gguf")
    weight = torch.randn(4, 64)
    blocks = package.quants.quantize(weight.numpy(), package.GGMLQuantizationType.Q4_0)
    expected = package.dequantize(blocks, package.GGMLQuantizationType.Q4_0)
    read = gguf_blocks.decode(torch.from_numpy(blocks), "Q4_0")
    assert not read.spec.symmetric
    assert torch.equal(read.dequantize(), torch.from_numpy(expected))


@pytest.mark.clients
def test_rows_left_in_transformers_order_are_noticed(tmp_path, monkeypatch):
    model = from_model(llama())
    monkeypatch.setattr(gguf, "row_order", lambda config, name: None)
    gguf.write(model, tmp_path)
    with pytest.raises(ArtifactError, match="q_proj differs"):
        gguf.verify(tmp_path, model)


@pytest.mark.clients
def test_one_flipped_nibble_is_noticed(tmp_path):
    package = pytest.importorskip("gguf")
    model = from_model(llama())
    gguf.write(model, tmp_path)
    file = tmp_path / gguf.FILE
    tensors = {tensor.name: tensor for tensor in package.GGUFReader(file).tensors}
    content = bytearray(file.read_bytes())
    content[int(tensors["blk.1.ffn_down.weight"].data_offset) + 2] ^= 0x10
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"1\.mlp\.down_proj differs.*: 1 of"):
        gguf.verify(tmp_path, model)


@pytest.mark.clients
def test_llama_quantizes_new_scales_are_noticed(tmp_path, monkeypatch):
    package = pytest.importorskip("gguf")
    model = from_model(llama())

    def requantize(tensor, kind):
        return torch.from_numpy(
            package.quants.quantize(tensor.dequantize().numpy(), package.GGMLQuantizationType[kind])
        )

    monkeypatch.setattr(gguf_blocks, "encode", requantize)
    gguf.write(model, tmp_path)
    with pytest.raises(ArtifactError, match="differs in"):
        gguf.verify(tmp_path, model)


@pytest.mark.clients
def test_what_is_no_gguf_file_is_said(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ArtifactError, match="there is no GGUF file"):
        gguf.read(tmp_path)
    (tmp_path / gguf.FILE).write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ArtifactError, match="damaged"):
        gguf.read(tmp_path)


def test_a_norm_to_the_last_bit():
    """Against numpy's float32, one operation at a time; torch's own has other last bits in some of these rows."""
    x, weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), torch.linspace(0.5, 2, 96)
    found = gguf_rounding._norm(x, weight, 1e-5)
    for row, y in zip(x.numpy(), found.numpy(), strict=True):
        mean = np.float32(np.sum((row * row).astype(np.float64)) / 96)
        scale = np.float32(1) / np.sqrt(np.float32(mean + np.float32(1e-5)))
        assert np.array_equal(row * scale * weight.numpy(), y)
    plain = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
    assert not torch.equal(found, plain)
