"""GGUF files: every layer exact or refused, and the clients' own readers agree."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf_models import CONFIG, LLAMA_3, QWEN2, model_of, random_tensor

import qat
from qat.errors import ArtifactError
from qat.formats import gguf, gguf_blocks, gguf_client, gguf_rounding
from qat.formats.gguf_names import language_config, rope_frequencies, row_order
from qat.formats.gguf_vocab import add_vocabulary
from qat.frozen_model import from_model, to_model
from qat.quantized_model import QuantizedLayer


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
        ("Mistral", {"group_size": 32}, {"sliding_window": 8}),  # of which no text is longer, as the note asks for
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
    assert any("attends beyond the model's sliding window of" in note for note in notes) == (kind == "Mistral")
    rows = dict(gguf.verify(tmp_path, model))
    assert rows["gguf.dequantize"].startswith("0 of ")
    assert rows["transformers, gguf_file="].startswith("logits differ by at most 0 ")
    assert int(re.match(r"next token equal in (\d) of 8 texts", rows["llama.cpp"])[1]) >= 7
    simulated, _, plain = map(float, re.findall(r"within (\S+)", rows["llama.cpp"]))
    assert simulated < 1e-5 and simulated < plain / 1000  # its rounding explains the rest
    assert any("unquantized matrices to their own type" in note for note in notes)


@pytest.mark.clients
def test_next_tokens_that_are_half_a_character_are_compared(tmp_path):
    """Half of a byte-level tokenizer's bytes are part of a longer character, which llama.cpp waits for."""
    pytest.importorskip("xllamacpp")
    model = from_model(llama())
    texts = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    vocab = {text: number for number, text in enumerate([*texts[:2], "<s>", *texts[2:], "he"])}
    bpe = {"vocab": vocab, "merges": ["h e"]}
    model.files = tokenizer_folder(tmp_path, bpe, {"type": "ByteLevel"}, bos_token="<s>")
    out = tmp_path / "out"
    out.mkdir()
    gguf.write(model, out)
    assert dict(gguf.verify(out, model))["llama.cpp"].startswith("next token equal in 8 of 8 texts")


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


@pytest.mark.clients
def test_what_llama_cpp_does_not_open_is_said_in_one_line(tmp_path):
    pytest.importorskip("xllamacpp")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ArtifactError, match=r"llama.cpp does not run .*/model.gguf: \w+Error: .+") as caught:
        gguf_client._run_llama_cpp(tmp_path / "model.gguf", torch.zeros(1, 3, dtype=torch.int64))
    assert "\n" not in str(caught.value)
