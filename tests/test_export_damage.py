"""Exports that were damaged or changed by hand: read as any model, each is one error that names the folder or layer."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_quantized import random_tensor, weight

from qat import convert, formats
from qat.errors import ArtifactError, QATError
from qat.quantized_model import QuantizedLayer, QuantizedModel

LAYER = "model.layers.0.mlp.up_proj"
WRONG = [None, True, 0, -1, 3, math.inf, "4", "", [], [1], {}, {"a": 1}]
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9, "hidden_size": 64}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32}


def written(folder, name):
    """Write a layer in a format; return the folder and its config."""
    tensor = random_tensor(32, 64, weight(group_size=32))
    layers = {LAYER: QuantizedLayer("Linear", [32, 64], tensor.spec, None)}
    dense = {"model.embed_tokens.weight": torch.randn(9, 64), "lm_head.weight": torch.randn(9, 64)}
    model = QuantizedModel({"transformers": LLAMA}, layers, {LAYER: tensor}.__getitem__, {}.__getitem__, dense)
    folder.mkdir(parents=True, exist_ok=True)
    formats.module(name).write(model, folder)
    return folder, json.loads((folder / "config.json").read_text())


def places(values, path=()):
    """Return the path of every value in nested dicts and lists."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [place for key, value in pairs for place in [(*path, key), *places(value, (*path, key))]]


def change(config, path, value):
    """Return a config with a value in that place."""
    config = copy.deepcopy(config)
    at = config
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return config


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq", "mlx"])
@given(data=st.data())
def test_any_value_in_any_place_of_a_config_is_read_or_is_one_error(tmp_path_factory, name, data):
    folder, config = written(tmp_path_factory.mktemp("model"), name)
    path = data.draw(st.sampled_from(places(config)))
    config = change(config, path, data.draw(st.sampled_from(WRONG)))
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = formats.read(folder)
        for layer in model.layers:
            model.quantized(layer).dequantize()
    except QATError as error:
        assert str(folder) in str(error) or "LlamaForCausalLM" in str(error) or "transformers" in str(error)


@pytest.mark.parametrize(
    "name, path, value",
    [
        ("compressed-tensors", ("config_groups", "group_0", "targets"), 0.5),
        ("compressed-tensors", ("config_groups", "group_0"), "int4"),
        ("compressed-tensors", ("config_groups",), 7),
        ("mlx", ("group_size",), 0),
    ],
)
def test_a_changed_config_is_one_line_of_the_command(tmp_path, capsys, name, path, value):
    folder, config = written(tmp_path / "model", name)
    (folder / "config.json").write_text(json.dumps(change(config, ("quantization_config", *path), value)))
    assert convert.main([str(folder), "--to", "gptq", "--out", str(tmp_path / "out")]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {folder} is no {name} model as its writers make them (")
    assert not (tmp_path / "out").exists()


def test_a_method_that_is_no_word_is_no_format(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": ["gptq"]}}')
    with pytest.raises(ArtifactError, match="no model in a format that can be read"):
        formats.read(tmp_path)


def test_a_tensor_that_is_missing_when_it_is_asked_for_names_the_layer(tmp_path):
    folder, config = written(tmp_path, "compressed-tensors")
    path = ("quantization_config", "config_groups", "group_0", "weights", "symmetric")
    (folder / "config.json").write_text(json.dumps(change(config, path, False)))
    with pytest.raises(ArtifactError, match=rf"layer '{LAYER}' cannot be read \(KeyError\('{LAYER}.weight_zero_point"):
        formats.read(folder).quantized(LAYER)


def test_memory_that_is_short_is_no_damage(tmp_path, monkeypatch):
    folder, _ = written(tmp_path, "gptq")

    def short(path):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(formats.module("gptq"), "read", short)
    with pytest.raises(torch.OutOfMemoryError):
        formats.read(folder)
