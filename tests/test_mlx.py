"""MLX: pinned by hand, every layer exact or refused, and mlx agrees, on a Linux CPU too."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_quantized import LLAMA, random_tensor, rewrite, weight
from safetensors.torch import load_file

import qat
from qat.errors import ArtifactError
from qat.formats import mlx
from qat.formats.comparison import compare_own
from qat.frozen_model import from_model
from qat.numerics import QuantizedTensor
from qat.quantized_model import QuantizedLayer, QuantizedModel

ONE, TWO = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8}


def model_of(tensors, dtype=torch.float32, architecture="LlamaForCausalLM"):
    layers = {name: QuantizedLayer("Linear", list(t.codes.shape), t.spec, None) for name, t in tensors.items()}
    dense = {"model.embed_tokens.weight": torch.randn(9, 4).to(dtype), "lm_head.weight": torch.randn(9, 4).to(dtype)}
    config = {"architectures": [architecture], "model_type": "llama", "vocab_size": 9}
    return QuantizedModel({"transformers": config}, layers, tensors.__getitem__, {}.__getitem__, dense)


def written(folder, tensors, **options):
    """Return (model, stored tensors, config.json)."""
    model = model_of(tensors, **options)
    mlx.write(model, folder)
    return model, load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def test_words_scales_and_biases(tmp_path):
    codes = (torch.arange(32) % 16 - 8).to(torch.int8)[None]
    tensor = QuantizedTensor(codes, torch.tensor([[0.5]]).bfloat16(), weight(group_size=32))
    _, stored, _ = written(tmp_path, {ONE: tensor})
    assert stored[f"{ONE}.weight"].dtype == torch.uint32
    assert stored[f"{ONE}.weight"].tolist() == [[0x76543210, 0xFEDCBA98] * 2]
    assert stored[f"{ONE}.scales"].tolist() == [[0.5]] and stored[f"{ONE}.biases"].tolist() == [[-4.0]]
    shifted = QuantizedTensor(codes, tensor.scale, weight(group_size=32, symmetric=False), torch.tensor([[5]]).char())
    _, stored, _ = written(tmp_path, {ONE: shifted})
    assert stored[f"{ONE}.biases"].tolist() == [[-6.5]]  # -(5 + 8) * 0.5


def test_the_config_names_layers_that_differ(tmp_path):
    tensors = {ONE: random_tensor(8, 128, weight(group_size=32)), TWO: random_tensor(8, 128, weight(7))}
    tensors["model.layers.0.a"] = random_tensor(8, 96, weight(4))
    _, stored, config = written(tmp_path, tensors)
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"] == {
        **{"group_size": 32, "bits": 4, "mode": "affine"},  # 96 inputs per channel are three groups of 32
        TWO: {"group_size": 128, "bits": 8, "mode": "affine"},  # 7 bits lie in 8
    }
    assert stored[f"{TWO}.weight"].shape == (8, 32)


@given(
    bits=st.lists(st.integers(2, 8), min_size=1, max_size=3),
    group=st.sampled_from([None, "tensor", 32, 64, 96, 128, 256]),
    symmetric=st.booleans(),
    rows=st.integers(1, 6),
    scale=st.sampled_from(["bfloat16", "float16"]),
)
def test_any_layers_survive(tmp_path_factory, bits, group, symmetric, rows, scale):
    folder = tmp_path_factory.mktemp("out")
    options = {"granularity": group} if group == "tensor" else {"group_size": group}
    tensors = {}
    for index, count in enumerate(bits):
        spec = weight(count, **options, symmetric=symmetric, scale_dtype=scale)
        tensors[f"model.layers.{index}.a"] = random_tensor(rows + index, 768, spec, index)
    model = model_of(tensors)
    mlx.write(model, folder)
    read = mlx.read(folder)
    compare_own(model, read)
    for name, tensor in tensors.items():
        made = read.quantized(name)
        assert torch.equal(made.codes, tensor.codes)
        repeats = made.scale.shape[1] // tensor.scale.shape[1]
        assert torch.equal(made.scale, tensor.scale.float().repeat_interleave(repeats, 1).expand_as(made.scale))


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    for spec, inputs, dtype, message in (
        (weight(group_size=48), 96, "float32", f"'{TWO}' has groups of 48, and mlx has 32, 64, 128"),
        (weight(), 80, "float32", f"'{TWO}' has groups of 80"),
        (weight(scale_dtype="float32"), 64, "float32", f"'{TWO}' has scales of more than 16 bits"),
        (
            weight(symmetric=False),
            64,
            "bfloat16",
            rf"'{TWO}' has \d+ of \d+ scales or biases that bfloat16 cannot hold",
        ),
    ):
        tensors = {ONE: random_tensor(8, 64, weight(group_size=64)), TWO: random_tensor(64, inputs, spec)}
        with pytest.raises(ArtifactError, match=message):
            mlx.write(model_of(tensors, getattr(torch, dtype)), tmp_path)


def test_a_grid_without_an_integer_zero_point_is_refused(tmp_path):
    """As mlx_lm.convert makes them from full precision."""
    written(tmp_path, {ONE: random_tensor(8, 64, weight(group_size=64))})
    rewrite(tmp_path, lambda stored: stored[f"{ONE}.biases"].mul_(1.01))
    with pytest.raises(ArtifactError, match=f"layer '{ONE}' cannot be read .its biases are no whole multiples"):
        mlx.read(tmp_path)


def flip_a_nibble(stored):
    words = stored[f"{ONE}.weight"].view(torch.int32)
    words[1, 1] ^= 1 << 9


def round_the_scales_again(stored):
    for part in ("scales", "biases"):
        stored[f"{ONE}.{part}"] = stored[f"{ONE}.{part}"].to(torch.float8_e5m2).float()


def move_the_zero_points(stored):
    stored[f"{ONE}.biases"] += stored[f"{ONE}.scales"]


@pytest.mark.parametrize("mutant", [flip_a_nibble, round_the_scales_again, move_the_zero_points])
def test_verify_notices_a_mutant(tmp_path, mutant):
    model, _, _ = written(tmp_path, {ONE: random_tensor(16, 64, weight(group_size=32))})
    compare_own(model, mlx.read(tmp_path))
    rewrite(tmp_path, mutant)
    with pytest.raises(ArtifactError, match=f"(?s)read by qat, the export differs.*'{ONE}'"):
        mlx.verify(tmp_path, model)


@pytest.mark.clients
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, "tensor", 32, 64, 128, 256]),
    symmetric=st.booleans(),
    rows=st.integers(1, 20),
    scale=st.sampled_from(["bfloat16", "float16"]),
)
def test_mlx_reads_q_times_s(tmp_path_factory, bits, group, symmetric, rows, scale):
    pytest.importorskip("mlx_lm")
    folder = tmp_path_factory.mktemp("out")
    options = {"granularity": group} if group == "tensor" else {"group_size": group}
    tensor = random_tensor(rows, 256, weight(bits, **options, symmetric=symmetric, scale_dtype=scale))
    model = model_of({ONE: tensor}, architecture="LlamaModel")
    mlx.write(model, folder)
    assert dict(mlx.verify(folder, model))["weights, mlx"] == "equal to q*s in every float32 bit"


def test_bf16_models_keep_bf16_scales(tmp_path):
    tensor = random_tensor(8, 64, weight(group_size=64))
    _, stored, _ = written(tmp_path, {ONE: tensor}, dtype=torch.bfloat16)
    assert torch.equal(stored[f"{ONE}.scales"], tensor.scale)
    assert torch.equal(stored[f"{ONE}.biases"], -8 * tensor.scale)


@pytest.mark.clients
@pytest.mark.parametrize(
    ("spec", "rules", "options"),
    [
        (weight(group_size=32), [], {"model_type": "qwen2", "tie_word_embeddings": True}),
        (weight(group_size=32), [], {"tie_word_embeddings": True}),
        (weight(group_size=64), [{"match": "*.down_proj", "weight": {"bits": 8}}], {"attention_bias": True}),
        (weight(group_size=128), [{"match": "*.0.mlp.*", "weight": None}], {"rope_parameters": LLAMA_3}),
        (weight(), [{"match": "lm_head", "weight": {"bits": 6, "group_size": 64}}], {"tie_word_embeddings": True}),
    ],
)
def test_mlx_lm_runs_it_with_the_trained_logits(tmp_path, spec, rules, options):
    pytest.importorskip("mlx_lm")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{"model_type": "llama"} | LLAMA | options)
    policy = qat.QuantPolicy(weight=spec, rules=[{"match": "lm_head", "weight": None}, *rules])
    model = qat.prepare(AutoModelForCausalLM.from_config(config), policy, verbose=False)
    for name, parameter in model.named_parameters():
        if name.endswith("step_size"):
            parameter.data.mul_(1 + torch.rand_like(parameter))
    quantized = from_model(qat.freeze(model))
    mlx.write(quantized, tmp_path)
    rows = dict(mlx.verify(tmp_path, quantized))
    assert rows["codes, mlx"].startswith("0 of")
    assert rows["logits, mlx-lm"].startswith("differ by at most")
