"""What mlx-lm makes of a config: other arithmetic is refused by name, or said and simulated; else logits agree."""

import dataclasses
import importlib
import json
import math

import pytest
import torch
from random_families import frozen
from random_quantized import random_tensor, weight
from test_mlx import ONE, model_of

from qat.errors import ArtifactError
from qat.formats import mlx, mlx_client

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
TANH = "gelu_pytorch_tanh"
EXAONE4 = {"model_type": "exaone4", "hidden_size": 256, "num_attention_heads": 4}
S, F = "sliding_attention", "full_attention"


def written(folder, **entries):
    """Write a folder with these entries in its config; return the notes."""
    model = model_of({ONE: random_tensor(8, 128, weight(group_size=32))})
    model.architecture["transformers"].update({"max_position_embeddings": 64, **entries})
    return mlx.write(model, folder)


OTHER = [
    ({"model_type": "glm", "rope_parameters": {"partial_rotary_factor": 0.5}}, "glm turns whole heads.* is 0.5"),
    ({"model_type": "glm", "partial_rotary_factor": 0.5}, "glm turns whole heads"),  # as transformers 4 has it
    ({"model_type": "gemma2", "rope_parameters": LINEAR}, "gemma2 does not scale its rotation.*'linear'"),
    ({"model_type": "gemma2", "rope_scaling": {"type": "linear", "factor": 4.0}}, "gemma2 does not scale its rotation"),
    ({"model_type": "minicpm3", "rope_parameters": LINEAR}, "minicpm3 does not scale its rotation so.*'linear'"),
    ({"model_type": "llama", "rope_parameters": {**YARN, "attention_factor": 1.0}}, "llama knows no attention_factor"),
    ({"model_type": "llama", "rope_parameters": {**YARN, "truncate": False}}, "llama knows no .* truncate"),
    ({"model_type": "phi3", "rope_parameters": LONG}, "phi3 turns short texts too.*'longrope'"),
    ({"model_type": "llama", "hidden_act": "relu"}, "llama computes silu .* and this one has 'relu'"),
    ({"model_type": "cohere2", "layer_types": [F, S, F, F]}, "cohere2 has no sliding window in each nth layer only"),
]


@pytest.mark.parametrize(("entries", "said"), OTHER)
def test_another_model_than_the_config_s_is_refused(tmp_path, entries, said):
    with pytest.raises(ArtifactError, match=f"mlx-lm's {said}.*: use --to compressed-tensors or onnx"):
        written(tmp_path, **entries)


@pytest.mark.parametrize(
    "entries",
    [
        {"model_type": "glm", "rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 1e4}},
        {"model_type": "glm4", "rope_parameters": {"partial_rotary_factor": 0.5}},
        {"model_type": "llama", "rope_parameters": LINEAR},
        {"model_type": "llama", "rope_parameters": {**YARN, "attention_factor": 0.1 * math.log(4) + 1}},
        {"model_type": "minicpm3", "rope_parameters": {**LONG, "short_factor": LONG["long_factor"]}},
        {"model_type": "llama", "hidden_act": "swish"},
        {"model_type": "gpt2", "activation_function": "gelu_new"},
        {"model_type": "a kind of tomorrow", "hidden_act": "relu"},
    ],
)
def test_what_mlx_lm_computes_as_the_config_says_needs_no_word(tmp_path, entries):
    assert len(written(tmp_path, **entries)) == 1


def test_what_comes_near_is_said(tmp_path):
    said = written(tmp_path, model_type="gemma", hidden_act=TANH)[1]
    assert "mlx-lm computes gelu where this model has gelu_pytorch_tanh" in said
    said = written(tmp_path, model_type="gemma3_text", hidden_size=128, hidden_activation=TANH)[1]
    assert "multiplies the embedding by 11.3125 where this model has 11.3137" in said
    model = model_of({ONE: random_tensor(8, 64, weight(group_size=64))}, torch.bfloat16)
    model.architecture["transformers"].update(model_type="gemma3_text", hidden_size=128)
    assert len(mlx.write(model, tmp_path)) == 1  # which rounds it so itself


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"model_type": "mistral", "sliding_window": 32}, True),
        ({"model_type": "mistral", "sliding_window": None}, False),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}, False),
        ({"model_type": "gemma2", "sliding_window": 64}, False),  # no text is longer
        ({"model_type": "gemma3_text", "sliding_window": 32}, False),  # mlx-lm has its windows
    ],
)
def test_a_sliding_window_that_mlx_lm_does_not_have_is_said(tmp_path, entries, said):
    model = model_of({ONE: random_tensor(8, 128, weight(group_size=32))})
    model.architecture["transformers"].update(max_position_embeddings=64, **entries)
    notes = mlx.write(model, tmp_path)
    assert any("mlx-lm attends beyond the model's sliding window of 32 tokens" in note for note in notes) == said


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ({"model_type": "cohere2", "layer_types": [S, F, S, F]}, {"sliding_window_pattern": 2}),
        ({"model_type": "gemma3_text", "layer_types": [S, S, F, S]}, {"sliding_window_pattern": 3}),
        (
            {**EXAONE4, "layer_types": [S, F, F]},
            {"sliding_window_pattern": "LGG", "rope_scaling": None},
        ),
        ({**EXAONE4, "layer_types": [F, F]}, {"sliding_window_pattern": None, "head_dim": 64}),
        (
            {**EXAONE4, "rope_parameters": LINEAR},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
    ],
)
def test_the_config_has_the_keys_that_mlx_lm_looks_for(tmp_path, entries, found):
    written(tmp_path, **entries)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in found} == found


SMALL = {"num_hidden_layers": 4, "max_position_embeddings": 128}
MINICPM3 = {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32}
MINICPM3 |= {"num_key_value_heads": 4, "max_position_embeddings": 128}


@pytest.mark.clients
@pytest.mark.parametrize(
    ("kind", "options", "how"),
    [
        ("mistral", {"sliding_window": 8}, ", 8 tokens"),
        ("gemma2", {"sliding_window": 8, "head_dim": 64}, ", 8 tokens"),
        ("gemma", {"head_dim": 64}, f", with gelu for {TANH}"),
        ("starcoder2", {"bos_token_id": 0, "eos_token_id": 0}, f", with gelu for {TANH}"),
        ("gemma2", {"hidden_activation": "gelu", "head_dim": 64}, f", with {TANH} for gelu"),
        ("gemma3_text", {"hidden_size": 128, "num_hidden_layers": 6}, ", with 11.3125 for 11.3137"),
        ("gemma3_text", {"layer_types": [S, F, S, F], "sliding_window": 4, **SMALL}, ""),
        ("cohere2", {"layer_types": [S, S, F, S], "sliding_window": 4, **SMALL}, ""),
        ("exaone4", {"layer_types": [S, F, F, S], "sliding_window": 4, **SMALL}, ""),
        ("olmo3", {"layer_types": [S, F, F, S], "sliding_window": 4, **SMALL}, ""),
        ("smollm3", {"layer_types": [S, F, F, S], "use_sliding_window": True, "sliding_window": 4, **SMALL}, ""),
        ("glm", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}, ""),
        ("minicpm3", {"tie_word_embeddings": False, **MINICPM3}, ""),
        ("apertus", {}, ""),
        ("gpt_bigcode", {"n_embd": 64, "n_layer": 2, "n_head": 2}, f", with gelu for {TANH}"),
        ("lfm2", {"layer_types": ["conv", F]}, ""),
    ],
)
def test_mlx_lm_runs_it(tmp_path, kind, options, how):
    """And transformers reads the same config from the folder."""
    pytest.importorskip("mlx_lm")
    from transformers import AutoConfig

    model = frozen(kind, **options)
    mlx.write(model, tmp_path)
    assert dict(mlx.verify(tmp_path, model))[f"logits, mlx-lm{how}"].startswith("differ by at most")
    config = model.architecture["transformers"]
    opened = AutoConfig.from_pretrained(tmp_path)
    assert config.get("rope_parameters", {}).items() <= getattr(opened, "rope_parameters", {}).items()
    assert getattr(opened, "layer_types", None) == config.get("layer_types")


@pytest.mark.clients
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("glm", {}),
        ("gemma2", {"head_dim": 64, "rope_parameters": LINEAR}),
        ("llama", {"hidden_act": "relu"}),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.0}, "max_position_embeddings": 128}),
        ("llama", {"rope_parameters": {**YARN, "truncate": False}, "max_position_embeddings": 128}),
        ("minicpm3", {**MINICPM3, "tie_word_embeddings": False, "rope_parameters": LINEAR}),
        ("minicpm3", {**MINICPM3, "dim_model_base": 64}),
        ("minicpm3", {**MINICPM3, "rope_parameters": {**LONG, "original_max_position_embeddings": 64}}),
    ],
)
def test_mlx_lm_computes_something_else_where_that_is_refused(tmp_path, monkeypatch, kind, options):
    pytest.importorskip("mlx_lm")
    model = frozen(kind, **options)
    with pytest.raises(ArtifactError, match=f"mlx-lm's {kind} "):
        mlx.write(model, tmp_path)
    monkeypatch.setattr(mlx_client, "refuse_other_arithmetic", lambda config: None)
    monkeypatch.setattr(mlx_client, "ACTIVATIONS", {})
    mlx.write(model, tmp_path)
    with pytest.raises(ArtifactError, match="the logits of mlx-lm differ by"):
        mlx.verify(tmp_path, model)


@pytest.mark.clients
def test_mlx_lm_still_has_no_fields_for_what_it_leaves_out():
    pytest.importorskip("mlx_lm")

    def fields(kind):
        module = importlib.import_module(f"mlx_lm.models.{'llama' if kind == 'mistral' else kind}")
        return {field.name for field in dataclasses.fields(module.ModelArgs)}

    assert not [kind for kind in mlx_client.ACTIVATIONS if fields(kind) & set(mlx_client.ACTIVATION_KEYS)]
    unscaled = [kind for kind, types in mlx_client.ROTATIONS.items() if types == ("default",)]
    assert not [kind for kind in unscaled if fields(kind) & {"rope_scaling", "rope_parameters"}]
    assert not [kind for kind in mlx_client.WHOLE_HEADS if "partial_rotary_factor" in fields(kind)]


@pytest.mark.clients
def test_a_model_that_mlx_lm_does_not_open_is_said(tmp_path):
    """Its Qwen2 has heads of hidden_size / num_attention_heads, whatever the config says."""
    pytest.importorskip("mlx_lm")
    model = frozen("qwen2", head_dim=48)
    mlx.write(model, tmp_path)
    with pytest.raises(
        ArtifactError,
        match=r"mlx-lm fails to open .* or to run it \(--to compressed-tensors and onnx need it not\): ValueError: ",
    ):
        mlx.verify(tmp_path, model)


NESTED = {"sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
NESTED |= {"full_attention": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 4.0}}


@pytest.mark.clients
@pytest.mark.parametrize(
    ("kind", "options", "older"),
    [
        ("phi", {}, {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}),  # mlx-lm's default is 0.4
        ("stablelm", {}, {"partial_rotary_factor": 0.25, "rope_theta": 10000.0}),
        (
            "gemma3_text",
            {"num_hidden_layers": 6, "head_dim": 64, "rope_parameters": NESTED},
            {"rope_theta": 3e3, "rope_local_base_freq": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
    ],
)
def test_mlx_lm_finds_the_rotation_under_its_older_keys(tmp_path, kind, options, older):
    """And transformers reads the same model from the file."""
    pytest.importorskip("mlx_lm")
    from transformers import AutoConfig

    model = frozen(kind, **options)
    mlx.write(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in older} == older
    expected = model.architecture["transformers"]["rope_parameters"]
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config["rope_parameters"] == expected
    assert dict(mlx.verify(tmp_path, model))["logits, mlx-lm"].startswith("differ by at most")


@pytest.mark.clients
@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("gemma3_text", {"num_hidden_layers": 2, "head_dim": 64}, "IndexError"),  # a pattern of six layers, at least
        ("olmo", {}, "SystemExit"),  # it wants another package
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 256}, "ValueError: Model type opt not supported"),
    ],
)
def test_a_model_that_mlx_lm_fails_at_is_said(tmp_path, kind, options, reason):
    pytest.importorskip("mlx_lm")
    model = frozen(kind, **options)
    mlx.write(model, tmp_path)
    with pytest.raises(ArtifactError, match=rf"mlx-lm fails to open .* or to run it .*: {reason}"):
        mlx.verify(tmp_path, model)
