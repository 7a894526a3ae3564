"""torchao: pinned by hand, every layer exact or refused, and torchao and transformers agree to the bit."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_quantized import LLAMA, random_tensor, rewrite, weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qat
from qat import formats
from qat.errors import ArtifactError
from qat.formats import torchao
from qat.formats.comparison import compare_own
from qat.formats.shards import ShardWriter
from qat.frozen_model import from_model
from qat.numerics import QuantizedTensor
from qat.quantized_model import QuantizedLayer, QuantizedModel

ONE, TWO = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def model_of(tensors, dtype=torch.float32, architecture="LlamaForCausalLM"):
    layers = {name: QuantizedLayer("Linear", list(t.codes.shape), t.spec, None) for name, t in tensors.items()}
    dense = {"model.embed_tokens.weight": torch.randn(9, 4).to(dtype), "lm_head.weight": torch.randn(9, 4).to(dtype)}
    config = {"architectures": [architecture], "model_type": "llama", "vocab_size": 9}
    return QuantizedModel({"transformers": config}, layers, tensors.__getitem__, {}.__getitem__, dense)


def written(folder, tensors, **options):
    """Return (model, stored tensors, the files' metadata, quantization config)."""
    model = model_of(tensors, **options)
    torchao.write(model, folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    config = json.loads((folder / "config.json").read_text())
    return model, load_file(folder / "model.safetensors"), metadata, config["quantization_config"]


def change_metadata(folder, change):
    """Apply a change to what the metadata says of ONE's weight."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata[f"{ONE}.weight"])
    change(about)
    metadata[f"{ONE}.weight"] = json.dumps(about)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata=metadata)


def change_tensors(folder, change):
    """Apply a mutation to the stored tensors, and keep the metadata."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    rewrite(folder, change)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata=metadata)


def test_codes_scales_and_metadata(tmp_path):
    codes = (torch.arange(64) % 16 - 8).to(torch.int8).view(2, 32)
    scale = torch.tensor([[0.5, 2.0], [1.0, 4.0]]).bfloat16()
    zero_point = torch.tensor([[-8, 0], [7, -1]], dtype=torch.int8)
    tensor = QuantizedTensor(codes, scale, weight(3, 16, symmetric=False), zero_point)
    other = random_tensor(4, 32, weight(4))
    _, stored, metadata, quantization = written(tmp_path, {ONE: tensor, TWO: other}, dtype=torch.bfloat16)
    assert torch.equal(stored[f"{ONE}._weight_qdata"], codes) and torch.equal(stored[f"{ONE}._weight_scale"], scale)
    assert torch.equal(stored[f"{ONE}._weight_zero_point"], zero_point)
    assert stored[f"{TWO}._weight_zero_point"].tolist() == [[0]] * 4
    about = json.loads(metadata[f"{ONE}.weight"])
    assert about["_type"] == "IntxUnpackedToInt8Tensor"
    assert about["_data"]["target_dtype"]["_data"] == "int3" and about["_data"]["block_size"] == [1, 16]
    assert about["_data"]["dtype"]["_data"] == "bfloat16"
    assert json.loads(metadata["lm_head.weight"]) == {"_type": "Tensor"} and metadata["format"] == "pt"
    assert set(json.loads(metadata["tensor_names"])) == set(metadata) - {"tensor_names", "format"}
    assert quantization["quant_method"] == "torchao" and "lm_head" in quantization["modules_to_not_convert"]
    assert formats.format_of(tmp_path) == "torchao"


@given(
    bits=st.lists(st.integers(2, 8), min_size=1, max_size=3),
    group=st.sampled_from([None, "tensor", 3, 8, 32, 96]),
    symmetric=st.booleans(),
    rows=st.integers(1, 6),
    scale=st.sampled_from(["bfloat16", "float16", "float32"]),
)
def test_any_layers_survive(tmp_path_factory, bits, group, symmetric, rows, scale):
    folder = tmp_path_factory.mktemp("out")
    options = {"granularity": group} if group == "tensor" else {"group_size": group}
    tensors = {}
    for index, count in enumerate(bits):
        spec = weight(count, **options, symmetric=symmetric, scale_dtype=scale)
        tensors[f"model.layers.{index}.a"] = random_tensor(rows + index, 96, spec, index)
    model = model_of(tensors)
    torchao.write(model, folder)
    read = torchao.read(folder)
    compare_own(model, read)
    for name, tensor in tensors.items():
        made = read.quantized(name)
        assert torch.equal(made.codes, tensor.codes) and made.spec.bits == tensor.spec.bits
        assert torch.equal(made.scale, tensor.scale.float().expand_as(made.scale))
        if made.zero_point is not None:
            assert torch.equal(made.zero_point, tensor.zero_point.expand_as(made.zero_point))
        else:
            assert symmetric or not tensor.zero_point.any()


def test_scales_that_the_model_s_dtype_cannot_hold_are_refused(tmp_path):
    tensor = random_tensor(8, 32, weight(group_size=32, scale_dtype="float32"))
    with pytest.raises(ArtifactError, match=rf"'{ONE}' has \d+ of 8 scales or biases that bfloat16 cannot hold"):
        torchao.write(model_of({ONE: tensor}, dtype=torch.bfloat16), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(_type="Int4Tensor"), "it is an Int4Tensor: only IntxUnpackedToInt8Tensor can be"),
        (
            lambda about: about["_data"].update(activation_quantization="int8_asym_per_token"),
            "its input is rounded as int8_asym_per_token",
        ),
        (lambda about: about["_data"].update(block_size=[1, 16]), r"blocks of \[1, 16\] in a weight of \[4, 64\]"),
        (lambda about: about.pop("_data"), "_data"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, change, message):
    written(tmp_path, {ONE: random_tensor(4, 64, weight(4, 32))})
    change_metadata(tmp_path, change)
    with pytest.raises(ArtifactError, match=f"layer '{ONE}' cannot be read: .*{message}"):
        torchao.read(tmp_path)


def test_float_zero_points_are_refused(tmp_path):
    written(tmp_path, {ONE: random_tensor(4, 64, weight(4, 32))})
    key = f"{ONE}._weight_zero_point"
    change_tensors(tmp_path, lambda stored: stored.update({key: stored[key].float() + 0.5}))
    with pytest.raises(ArtifactError, match="its zero points are floats"):
        torchao.read(tmp_path)


def flip_a_code(stored):
    stored[f"{ONE}._weight_qdata"][3, 5] ^= 1


def turn_the_groups(stored):
    stored[f"{ONE}._weight_scale"] = stored[f"{ONE}._weight_scale"].flatten().view(2, 16).t()


def round_the_scales(stored):
    scale = stored[f"{ONE}._weight_scale"]
    stored[f"{ONE}._weight_scale"] = scale.to(torch.float8_e5m2).to(scale.dtype)


def move_the_zero_points(stored):
    stored[f"{ONE}._weight_zero_point"] += 1


@pytest.mark.parametrize("mutant", [flip_a_code, turn_the_groups, round_the_scales, move_the_zero_points])
def test_verify_notices_a_mutant(tmp_path, mutant):
    model, *_ = written(tmp_path, {ONE: random_tensor(16, 64, weight(4, 32))})
    compare_own(model, torchao.read(tmp_path))
    change_tensors(tmp_path, mutant)
    with pytest.raises(ArtifactError, match=f"(?s)read by qat, the export differs.*'{ONE}'"):
        torchao.verify(tmp_path, model)


@pytest.mark.clients
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, "tensor", 4, 32, 96]),
    symmetric=st.booleans(),
    rows=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_torchao_reads_q_times_s(tmp_path_factory, bits, group, symmetric, rows, dtype):
    pytest.importorskip("torchao")
    folder = tmp_path_factory.mktemp("out")
    options = {"granularity": group} if group == "tensor" else {"group_size": group}
    tensor = random_tensor(rows, 192, weight(bits, **options, symmetric=symmetric))
    model = model_of({ONE: tensor}, dtype, architecture="LlamaModel")
    torchao.write(model, folder)
    assert dict(torchao.verify(folder, model))["weights, torchao"] == "equal to q*s in every float32 bit"


@pytest.mark.clients
@pytest.mark.parametrize(
    ("spec", "rules", "options", "dtype"),
    [
        (weight(group_size=32), [], {"model_type": "qwen2"}, torch.float32),
        (weight(group_size=32), [], {"tie_word_embeddings": True}, torch.bfloat16),
        (weight(group_size=64), [{"match": "*.down_proj", "weight": {"bits": 8}}], {"attention_bias": True}, None),
        (weight(group_size=128), [{"match": "*.0.mlp.*", "weight": None}], {}, None),
        (weight(3), [{"match": "lm_head", "weight": {"bits": 6, "group_size": 64}}], {}, None),
    ],
)
def test_transformers_runs_it_with_the_trained_logits(tmp_path, monkeypatch, spec, rules, options, dtype):
    pytest.importorskip("torchao")
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr(torchao, "ShardWriter", partial(ShardWriter, shard_bytes=2**19))
    config = AutoConfig.for_model(**{"model_type": "llama"} | LLAMA | options)
    policy = qat.QuantPolicy(weight=spec, rules=[{"match": "lm_head", "weight": None}, *rules])
    model = qat.prepare(AutoModelForCausalLM.from_config(config).to(dtype), policy, verbose=False)
    quantized = from_model(qat.freeze(model))
    torchao.write(quantized, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    rows = dict(torchao.verify(tmp_path, quantized))
    assert rows["codes, torchao"].startswith("0 of")
    assert rows["logits, transformers"].startswith("differ by at most 0 ")


@pytest.mark.clients
def test_a_model_whose_cache_transformers_fails_at_runs_as_it_trained(tmp_path):
    """Training makes no cache; Qwen3-Next of linear attention alone fails where it asks one for its length."""
    pytest.importorskip("torchao")
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    sizes = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "linear_num_key_heads": 2}
    sizes |= {"shared_expert_intermediate_size": 32, "linear_num_value_heads": 2, "linear_key_head_dim": 32}
    sizes |= {"linear_value_head_dim": 32, "layer_types": ["linear_attention"] * 2}
    torch.manual_seed(0)
    policy = qat.QuantPolicy(weight=weight(group_size=4), rules=[{"match": "lm_head", "weight": None}])
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**LLAMA, **sizes))
    quantized = from_model(qat.freeze(qat.prepare(model, policy, verbose=False)))
    torchao.write(quantized, tmp_path)
    assert dict(torchao.verify(tmp_path, quantized))["logits, transformers"].startswith("differ by at most 0 ")


@pytest.mark.clients
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
def test_what_torchao_quantized_keeps_its_codes(tmp_path, mapping):
    pytest.importorskip("torchao")
    from torchao.quantization import IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerGroup
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "full")
    config = IntxWeightOnlyConfig(torch.int4, PerGroup(32), getattr(MappingType, mapping))
    quantization = TorchAoConfig(config, modules_to_not_convert=["lm_head"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=quantization)
    theirs.save_pretrained(tmp_path / "theirs")
    read = torchao.read(tmp_path / "theirs")
    name = "model.layers.1.mlp.down_proj"
    expected = theirs.get_submodule(name).weight
    assert torch.equal(read.quantized(name).codes, expected.qdata)
    assert torch.equal(read.quantized(name).dequantize(torch.float32), expected.dequantize())
    assert read.layers[name].weight.symmetric == (mapping == "SYMMETRIC") and len(read.layers) == 14
    (tmp_path / "ours").mkdir()
    torchao.write(read, tmp_path / "ours")
    assert dict(torchao.verify(tmp_path / "ours", read))["logits, transformers"].startswith("differ by at most 0 ")
