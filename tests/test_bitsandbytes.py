"""bitsandbytes: bytes pinned by hand, every layer exact or refused, and bitsandbytes itself agrees to the bit."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_quantized import LLAMA, random_tensor, rewrite, weight
from safetensors.torch import load_file
from torch import nn

import qat
from qat import codebook, formats
from qat.errors import ArtifactError
from qat.formats import bitsandbytes
from qat.formats.comparison import compare_own
from qat.frozen_model import from_model
from qat.numerics import QuantizedTensor
from qat.quantized_model import QuantizedLayer, QuantizedModel

ONE, TWO = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def nf4(group_size=64, **options):
    return weight(4, group_size, codebook="nf4", **options)


def model_of(tensors, dtype=torch.float32, kind="Linear"):
    layers = {name: QuantizedLayer(kind, list(t.codes.shape), t.spec, None) for name, t in tensors.items()}
    dense = {"model.embed_tokens.weight": torch.randn(9, 4).to(dtype), "lm_head.weight": torch.randn(9, 4).to(dtype)}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9}
    return QuantizedModel({"transformers": config}, layers, tensors.__getitem__, {}.__getitem__, dense)


def written(folder, tensors, **options):
    """Return (model, stored tensors, quantization config)."""
    model = model_of(tensors, **options)
    bitsandbytes.write(model, folder)
    config = json.loads((folder / "config.json").read_text())
    return model, load_file(folder / "model.safetensors"), config["quantization_config"]


def with_state(change):
    """Return a mutation of the JSON beside ONE's weight."""
    key = f"{ONE}.weight.quant_state.bitsandbytes__nf4"

    def mutate(stored):
        state = json.loads(bytes(stored[key].tolist()))
        change(state)
        stored[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return mutate


def test_nibbles_scales_and_state(tmp_path):
    codes = (torch.arange(128) % 16).to(torch.int8).view(2, 64)
    tensor = QuantizedTensor(codes, torch.tensor([[0.1, 3.0], [2.0, 4.0]]), nf4(32))
    _, stored, quantization = written(tmp_path, {ONE: tensor}, dtype=torch.bfloat16)
    assert stored[f"{ONE}.weight"].shape == (64, 1)
    assert stored[f"{ONE}.weight"].flatten().tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 8
    assert stored[f"{ONE}.weight.absmax"].tolist() == torch.tensor([0.1, 3.0, 2.0, 4.0]).tolist()
    assert stored[f"{ONE}.weight.quant_map"].tolist() == torch.tensor(codebook.NF4).tolist()
    state = json.loads(bytes(stored[f"{ONE}.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert state == {"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [2, 64]}
    assert quantization["quant_method"] == "bitsandbytes" and quantization["load_in_4bit"]
    assert quantization["llm_int8_skip_modules"] == ["model.embed_tokens", "lm_head"]
    assert formats.format_of(tmp_path) == "bitsandbytes"


@given(
    sizes=st.lists(st.sampled_from([None, "tensor", 32, 64, 96, 128, 256]), min_size=1, max_size=3),
    rows=st.integers(1, 6),
    inputs=st.sampled_from([768, 8448]),
    codebook=st.sampled_from(["nf4", "nf4_double"]),
)
def test_any_layers_survive(tmp_path_factory, sizes, rows, inputs, codebook):
    folder, tensors = tmp_path_factory.mktemp("out"), {}
    for index, size in enumerate(sizes):
        options = {"granularity": "tensor"} if size == "tensor" else {}
        spec = weight(4, None if size == "tensor" else size, codebook=codebook, **options)
        tensors[f"model.layers.{index}.a"] = random_tensor(rows + index, inputs, spec, index)
    model = model_of(tensors)
    bitsandbytes.write(model, folder)
    read = bitsandbytes.read(folder)
    compare_own(model, read)
    for name, tensor in tensors.items():
        made = read.quantized(name)
        assert torch.equal(made.codes, tensor.codes) and made.scale.dtype == torch.float32
        repeats = made.scale.shape[1] // tensor.scale.shape[1]
        assert torch.equal(made.scale, tensor.scale.repeat_interleave(repeats, 1).expand_as(made.scale))
        kept = codebook == "nf4_double" and tensor.spec.group_size in bitsandbytes.BLOCK_SIZES
        assert made.spec.codebook == ("nf4_double" if kept else "nf4")
        if kept:
            assert torch.equal(made.nested.codes, tensor.nested.codes)
            assert torch.equal(made.nested.factor, tensor.nested.factor)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    for spec, inputs, message in (
        (
            weight(group_size=64),
            64,
            f"'{TWO}' has int4 g64 weights, whose levels bitsandbytes does not have; --to comp",
        ),
        (nf4(48), 96, f"'{TWO}' has groups of 48, and bitsandbytes has 32, 64.*--to native"),
        (nf4(None), 80, f"'{TWO}' has groups of 80"),
    ):
        tensors = {ONE: random_tensor(8, 64, nf4()), TWO: random_tensor(8, inputs, spec)}
        with pytest.raises(ArtifactError, match=message):
            bitsandbytes.write(model_of(tensors), tmp_path)
    alike = model_of({"model.lm_head": random_tensor(8, 64, nf4())})
    with pytest.raises(ArtifactError, match=r"'model.lm_head' would be skipped with 'lm_head'"):
        bitsandbytes.write(alike, tmp_path)
    with pytest.raises(ArtifactError, match="is a Conv2d, and bitsandbytes holds linear layers only; --to native"):
        bitsandbytes.write(model_of({ONE: random_tensor(8, 64, nf4())}, kind="Conv2d"), tmp_path)


@pytest.mark.parametrize("name", [name for name in formats.FORMATS if name not in ("native", "bitsandbytes")])
def test_other_formats_refuse_nf4_by_name(tmp_path, name):
    model = model_of({ONE: random_tensor(64, 64, nf4())})
    model.architecture["transformers"] |= LLAMA
    with pytest.raises(ArtifactError, match=f"{ONE}.*has nf4 g64 weights, whose levels .*; --to bitsandbytes holds it"):
        formats.module(name).write(model, tmp_path)


def test_a_custom_codebook_is_kept_by_native_only(tmp_path):
    tensor = random_tensor(8, 64, nf4())
    tensor = QuantizedTensor(tensor.codes, tensor.scale, weight(4, 64, codebook="custom"), None, tensor.levels)
    with pytest.raises(ArtifactError, match=f"'{ONE}' has codebook4 g64 weights.*--to native holds it"):
        bitsandbytes.write(model_of({ONE: tensor}), tmp_path)


def test_double_quantization_is_read_by_hand(tmp_path):
    """absmax = map[u] * nested_absmax + offset, 256 of absmax for each of nested_absmax."""
    _, stored, _ = written(tmp_path, {ONE: random_tensor(258, 32, nf4(32))})
    weights = stored[f"{ONE}.weight"]

    def nest(stored):
        stored[f"{ONE}.weight.absmax"] = torch.tensor([255, *[0] * 255, 0, 1], dtype=torch.uint8)
        stored[f"{ONE}.weight.nested_absmax"] = torch.tensor([0.5, 4.0])
        stored[f"{ONE}.weight.nested_quant_map"] = torch.arange(256) / 256
        with_state(lambda state: state.update(nested_blocksize=256, nested_dtype="float32", nested_offset=3.0))(stored)

    rewrite(tmp_path, nest)
    tensor = bitsandbytes.read(tmp_path).quantized(ONE)
    assert tensor.scale[[0, 1, 255, 256, 257], 0].tolist() == [255 / 512 + 3, 3.0, 3.0, 3.0, 1 / 64 + 3]
    high = (weights.view(258, 16) >> 4).to(torch.int8)
    assert torch.equal(tensor.codes[:, ::2], high)


def test_double_quantization_is_written_as_it_was_trained(tmp_path):
    tensor = random_tensor(9, 64, weight(4, 32, codebook="nf4_double"))
    plain = random_tensor(8, 64, nf4(32))
    model = model_of({ONE: tensor, TWO: plain})
    notes = bitsandbytes.write(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored[f"{ONE}.weight.absmax"].dtype == torch.uint8 and f"{TWO}.weight.nested_absmax" not in stored
    assert 'use_double_quant": true' in (tmp_path / "config.json").read_text()
    assert any(f"'{TWO}' has float32 scales" in note for note in notes)
    read = bitsandbytes.read(tmp_path)
    assert {name: str(layer.weight) for name, layer in read.layers.items()} == {ONE: "nf4_double g32", TWO: "nf4 g32"}


def test_scales_in_other_blocks_are_refused(tmp_path):
    written(tmp_path, {ONE: random_tensor(4, 64, nf4(32))})
    rewrite(tmp_path, with_state(lambda state: state.update(nested_blocksize=64, nested_offset=0.0)))
    with pytest.raises(ArtifactError, match="its scales are quantized in blocks of 64, and runtimes know 256"):
        bitsandbytes.read(tmp_path)


def swap_the_kind(stored):
    key = f"{ONE}.weight.quant_state.bitsandbytes__"
    stored[f"{key}fp4"] = stored.pop(f"{key}nf4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_the_kind, "its levels are FP4's: only NF4 can be read"),
        (with_state(lambda state: state.update(blocksize=128)), r"blocks of 128 span the rows of its \[4, 64\]"),
        (lambda stored: stored[f"{ONE}.weight.quant_map"].mul_(0.5), "other levels than NF4's"),
        (lambda stored: stored.pop(f"{ONE}.weight.quant_map"), "quant_map"),
        (lambda stored: stored.update({f"{ONE}.weight": stored[f"{ONE}.weight"][:-1]}), "127 bytes and 4 scales"),
        (lambda stored: stored.update({f"{ONE}.weight.absmax": torch.ones(3)}), "128 bytes and 3 scales"),
        (
            lambda stored: stored.update({f"{ONE}.weight.absmax": torch.ones(4, dtype=torch.uint8)}),
            f"{ONE}.weight.nested_absmax",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, change, message):
    written(tmp_path, {ONE: random_tensor(4, 64, nf4())})
    rewrite(tmp_path, change)
    with pytest.raises(ArtifactError, match=f"layer '{ONE}' cannot be read: .*{message}"):
        bitsandbytes.read(tmp_path)


def test_int8_folders_are_refused(tmp_path):
    written(tmp_path, {ONE: random_tensor(4, 64, nf4())})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= {"load_in_8bit": True, "load_in_4bit": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"LLM.int8.. weights"):
        bitsandbytes.read(tmp_path)


def swap_nibbles(stored):
    packed = stored[f"{ONE}.weight"]
    stored[f"{ONE}.weight"] = (packed << 4) | (packed >> 4)


def flip_a_nibble(stored):
    stored[f"{ONE}.weight"][5, 0] ^= 1


def round_the_scales(stored):
    stored[f"{ONE}.weight.absmax"] = stored[f"{ONE}.weight.absmax"].bfloat16().float()


def turn_the_blocks(stored):
    stored[f"{ONE}.weight.absmax"] = stored[f"{ONE}.weight.absmax"].view(16, 2).t().flatten()


def turn_the_weight(stored):
    stored[f"{ONE}.weight"] = stored[f"{ONE}.weight"].view(16, 32).t().reshape(-1, 1)


@pytest.mark.parametrize("mutant", [swap_nibbles, flip_a_nibble, round_the_scales, turn_the_blocks, turn_the_weight])
def test_verify_notices_a_mutant(tmp_path, mutant):
    model, _, _ = written(tmp_path, {ONE: random_tensor(16, 64, nf4(32))})
    compare_own(model, bitsandbytes.read(tmp_path))
    rewrite(tmp_path, mutant)
    with pytest.raises(ArtifactError, match=f"(?s)read by qat, the export differs.*'{ONE}'"):
        bitsandbytes.verify(tmp_path, model)


@pytest.mark.clients
@given(
    block=st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]),
    rows=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
    spread=st.sampled_from([1e-4, 1.0, 1e3]),
)
def test_training_makes_the_codes_of_bitsandbytes(block, rows, dtype, seed, spread):
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(rows, 4096, generator=generator) * spread).to(dtype)
    w[0, :block] = 0
    w[-1, 7] = 60 * spread  # an outlier
    layer = nn.Sequential(nn.Linear(4096, rows, bias=False, dtype=dtype))
    layer[0].weight.data = w.clone()
    qat.prepare(layer, qat.QuantPolicy(weight=qat.QuantSpec(codebook="nf4", group_size=block)), verbose=False)
    packed, state = functional.quantize_4bit(w, blocksize=block, quant_type="nf4")
    tensor = qat.quantized_tensors(layer)["0"]
    assert torch.equal(torch.stack([packed >> 4, packed & 15], -1).view(rows, -1), tensor.codes)
    assert torch.equal(state.absmax, tensor.scale.flatten())
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(layer[0].weight_quantizer(layer[0].weight), expected)
    assert torch.equal(qat.freeze(layer)[0].packed_weight.dequantize(dtype), expected)


@pytest.mark.clients
@given(
    size=st.sampled_from([None, "tensor", 32, 64, 128, 256]),
    rows=st.integers(1, 200),
    codebook=st.sampled_from(["nf4", "nf4_double"]),
)
def test_bitsandbytes_reads_level_times_scale(tmp_path_factory, size, rows, codebook):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("out")
    options = {"granularity": "tensor"} if size == "tensor" else {"group_size": size}
    model = model_of({ONE: random_tensor(rows, 256, weight(4, codebook=codebook, **options))})
    model.architecture["transformers"]["architectures"] = ["LlamaModel"]
    bitsandbytes.write(model, folder)
    assert dict(bitsandbytes.verify(folder, model))["codes, bitsandbytes"].startswith("0 of")


@pytest.mark.clients
@pytest.mark.parametrize(
    ("rules", "options", "dtype"),
    [
        ([], {}, torch.float32),
        ([{"match": "*_proj", "weight": {"codebook": "nf4_double"}}], {}, torch.float32),
        ([{"match": "*.v_proj", "weight": {"codebook": "nf4_double", "group_size": 32}}], {}, torch.bfloat16),
        ([], {"tie_word_embeddings": True}, torch.float32),
        ([{"match": "*.down_proj", "weight": {"group_size": 32}}], {"attention_bias": True}, torch.float32),
        ([{"match": "*.0.mlp.*", "weight": None}], {"model_type": "qwen2"}, torch.bfloat16),
        ([{"match": "lm_head", "weight": {"group_size": 128}}], {}, torch.float32),
    ],
)
def test_transformers_runs_it_with_the_trained_logits(tmp_path, rules, options, dtype):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{"model_type": "llama"} | LLAMA | options)
    rules = [{"match": "lm_head", "weight": None}, *rules]
    policy = qat.QuantPolicy(weight=qat.QuantSpec(codebook="nf4", group_size=64), rules=rules)
    model = qat.prepare(AutoModelForCausalLM.from_config(config).to(dtype), policy, verbose=False)
    quantized = from_model(qat.freeze(model))
    bitsandbytes.write(quantized, tmp_path)
    rows = dict(bitsandbytes.verify(tmp_path, quantized))
    assert rows["weights, bitsandbytes"] == "equal to q*s in every float32 bit"
    assert rows["logits, transformers"].startswith("differ by at most 0 ")


@pytest.mark.clients
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_what_transformers_quantized_keeps_its_codes(tmp_path, double, storage):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "full")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
    )
    options = {"quantization_config": config, "device_map": "cpu", "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "full", **options)
    theirs.save_pretrained(tmp_path / "theirs")
    read = bitsandbytes.read(tmp_path / "theirs")
    name = "model.layers.1.mlp.down_proj"
    module = theirs.get_submodule(name)
    expected = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    assert torch.equal(read.quantized(name).dequantize(torch.float32), expected)
    assert read.layers.keys() == {name for name, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    (tmp_path / "ours").mkdir()
    bitsandbytes.write(read, tmp_path / "ours")
    assert dict(bitsandbytes.verify(tmp_path / "ours", read))["logits, transformers"].startswith("differ by at most 0 ")
    theirs, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key in ours:
        if "quant_state" not in key:  # whose JSON holds the offset with other digits
            here, there = (stored[key].flatten().view(torch.uint8) for stored in (ours, theirs))
            assert torch.equal(here, there), key
    # and it is a starting point: the next training forward uses the same codes
    layer = nn.Sequential(nn.Linear(512, 256, bias=False))
    layer[0].weight.data = read.quantized(name).dequantize(torch.float32)
    spec = qat.QuantSpec(codebook="nf4", group_size=64)
    qat.prepare(layer, qat.QuantPolicy(weight=spec), verbose=False)
    again = qat.quantized_tensors(layer)["0"]
    assert torch.equal(again.codes, read.quantized(name).codes) and torch.equal(again.scale, read.quantized(name).scale)
