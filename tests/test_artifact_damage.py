"""Artifacts that are damaged, of another model, or no artifacts: each is said by name, and changes nothing."""

import functools
import json
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_artifacts import W4, Net, assert_same, images, prepared, saved
from torch import nn

import qat
from qat.errors import ArtifactError, StateError
from qat.formats import native
from qat.formats.native import checksum
from qat.models import build


def test_another_model_is_refused_by_name(tmp_path):
    saved(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"'conv' is \[9, 3, 3, 3\].*\[8, 3, 3, 3\]"):
        qat.load(tmp_path / "out", model=Net(9))
    with pytest.raises(ArtifactError, match="has no layer 'conv'"):
        qat.load(tmp_path / "out", model=nn.Sequential(nn.Linear(2, 2)))
    bigger = Net()
    bigger.extra = nn.Linear(2, 2)
    with pytest.raises(ArtifactError, match=r"missing extra\.bias, extra\.weight"):
        qat.load(tmp_path / "out", model=bigger)


def test_a_truncated_tensor_file_is_named(tmp_path):
    saved(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=r"model\.safetensors has \d+ bytes instead of \d+"):
        qat.load(tmp_path / "out", model=Net())
    file.unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors is missing"):
        qat.load(tmp_path / "out", model=Net())


def test_the_shard_that_is_damaged_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "SHARD_BYTES", 700)
    output, _ = saved(tmp_path / "out")
    assert torch.equal(qat.load(tmp_path / "out", model=Net())(images()), output)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=rf"{shard.name} is damaged \(its SHA-256"):
            qat.load(tmp_path / "out", model=Net())
        shard.write_bytes(content)


def test_damage_is_told_instead_of_what_came_of_it(tmp_path):
    saved(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    with pytest.raises(ZeroDivisionError), native.reading(tmp_path / "out"):
        raise ZeroDivisionError
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="SHA-256"), native.reading(tmp_path / "out"):
        raise ZeroDivisionError


def test_a_class_in_the_place_of_a_model_is_named(tmp_path):
    saved(tmp_path / "out")
    with pytest.raises(StateError, match=r"expected a torch.nn.Module, got Net: call it: Net\(\)"):
        qat.load(tmp_path / "out", model=Net)


@pytest.mark.parametrize("wrong", ["a damaged file", "a layer more", "a wider layer"])
def test_a_given_model_is_as_it_was_after_an_error(tmp_path, wrong):
    class Attends(Net):
        def __init__(self, width=12):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
            self.last = nn.Linear(width, 12)
            if wrong == "a layer more" and width == 12:
                self.more = nn.Linear(2, 2)

        def forward(self, x):
            x = super().forward(x)[:, None]
            return self.attention(x, x, x)[0]

    torch.manual_seed(0)
    plain = Attends(13 if wrong == "a wider layer" else 12)
    model = qat.freeze(qat.prepare(plain, qat.QuantPolicy(weight=W4), False))
    if wrong == "a layer more":
        del model.more
    qat.save(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    content = file.read_bytes()
    if wrong == "a damaged file":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    given, seen = Attends(), []
    handle = given.fc.register_forward_hook(lambda *_: seen.append(1))
    modules, output = [(name, module, type(module)) for name, module in given.named_modules()], given(images())
    state, attributes = given.state_dict(keep_vars=True), vars(given.fc).keys() | set()
    with pytest.raises(ArtifactError):
        qat.load(tmp_path / "out", model=given)
    assert [(name, module, type(module)) for name, module in given.named_modules()] == modules
    after = given.state_dict(keep_vars=True)
    assert after.keys() == state.keys() and all(after[name] is state[name] for name in state)
    assert vars(given.fc).keys() == attributes and not given.fc._non_persistent_buffers_set
    assert given.training and given.b.weight is given.a.weight
    assert torch.equal(given(images()), output) and len(seen) == 2
    handle.remove()
    given(images())
    assert len(seen) == 2
    if wrong == "a damaged file":
        file.write_bytes(content)
        assert_same(qat.quantized_tensors(qat.load(tmp_path / "out", model=given)), qat.quantized_tensors(model))


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        ({"bits": 2}, r"codes of \(12, 128\) in 2 bits, group, are stored as \(12, 32\), not as \(12, 64\)"),
        ({"group_size": 16}, r"scale of .* as \(12, 8\), not as \(12, 4\)"),
        ({"group_size": 128}, r"scale of .* as \(12, 1\), not as \(12, 4\)"),
        ({"granularity": "tensor", "group_size": None}, r"scale of .* as \(1, 1\), not as \(12, 4\)"),
        ({"scale_dtype": "float16"}, r"scale is torch.bfloat16, not torch.float16"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_the_grid_are_refused(tmp_path, edit, problem):
    """With a true checksum: a kernel would read past the end of scales that are not there."""
    grouped = qat.QuantSpec(bits=4, group_size=32)
    saved(tmp_path / "out", rules=[{"match": "fc", "weight": grouped.to_dict()}])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["layers"]["fc"]["weight"].update(edit)
    config["quantization_config"]["checksum"] = checksum(config)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=f"damaged in the layer 'fc': {problem}"):
        qat.load(tmp_path / "out", model=Net())
    with pytest.raises(ArtifactError, match=f"damaged in the layer 'fc': {problem}"):
        native.read(tmp_path / "out").quantized("fc")


@given(where=st.floats(0, 0.999), bit=st.integers(0, 7), name=st.sampled_from(["config.json", "model.safetensors"]))
def test_any_flipped_bit_is_noticed(tmp_path_factory, where, bit, name):
    path = tmp_path_factory.mktemp("artifact") / "out"
    saved(path)
    content = bytearray((path / name).read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    (path / name).write_bytes(content)
    try:
        model = qat.load(path, model=Net())
    except ArtifactError as error:
        assert str(path) in str(error)
    else:  # white space between JSON tokens means nothing
        assert name == "config.json"
        assert json.loads(bytes(content))["quantization_config"]["checksum"]
        assert_same(qat.quantized_tensors(model), qat.quantized_tensors(qat.freeze(prepared())))


def test_an_artifact_from_a_newer_version_says_upgrade(tmp_path):
    saved(tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["version"] = 2
    config["quantization_config"]["checksum"] = checksum(config)
    file.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="artifact version 2, this package reads up to 1: upgrade"):
        qat.load(tmp_path / "out", model=Net())


def test_what_is_no_artifact_is_said(tmp_path):
    with pytest.raises(ArtifactError, match="there is no artifact at"):
        qat.load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"has no config\.json"):
        qat.load(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(ArtifactError, match="is a 'gptq' model"):
        qat.load(tmp_path)


def test_a_file_outside_the_folder_is_refused(tmp_path):
    saved(tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    files = config["quantization_config"]["files"]
    files["../secret.safetensors"] = files.pop("model.safetensors")
    config["quantization_config"]["checksum"] = checksum(config)
    file.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="outside its folder"):
        qat.load(tmp_path / "out", model=Net())


def places(value, at=()):
    """Yield the path of every value in nested ones."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(value[key], (*at, key))


def test_a_config_that_says_anything_with_a_true_checksum_is_refused_or_loads(tmp_path):
    """Whoever writes an artifact by hand, or to harm: no error but ours, whatever value stands wherever."""
    torch.manual_seed(0)
    model = qat.prepare(build({"builder": "cnn", "args": {"width": 2}}), qat.QuantPolicy(weight=W4), verbose=False)
    qat.save(qat.freeze(model), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    refused = 0
    for *path, key in places(written):
        for value in (None, -1, "x", [], {}, "gone"):
            config = json.loads(json.dumps(written))
            node = functools.reduce(operator.getitem, path, config)
            node[key] = value
            if value == "gone":
                del node[key]
            if isinstance(config.get("quantization_config"), dict):
                config["quantization_config"]["checksum"] = checksum(config)
            (tmp_path / "config.json").write_text(json.dumps(config))
            try:
                qat.load(tmp_path)
            except qat.QATError:
                refused += 1
    assert refused > 300
