"""Artifacts: what is saved is what is read, atomically, and whatever is wrong is said by name."""

import functools
import json
import operator
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import qat
from qat.errors import ArtifactError, StateError
from qat.formats import native
from qat.formats.native import checksum
from qat.formats.stored_tensors import StoredTensors
from qat.layers import PackedWeight
from qat.models import build

W4 = qat.QuantSpec(bits=4)
A4 = qat.QuantSpec(bits=4, granularity="tensor")


class Net(nn.Module):
    """Conv, BatchNorm, linear, and two linears that share a weight."""

    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width * 16, 12)
        self.a = nn.Linear(12, 12, bias=False)
        self.b = nn.Linear(12, 12)
        self.b.weight = self.a.weight

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.b(torch.relu(self.a(torch.relu(self.fc(x)))))


def images(batch=4):
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def prepared(width=8, weight=W4, activation=A4, rules=()):
    torch.manual_seed(0)
    model = qat.prepare(Net(width), qat.QuantPolicy(weight=weight, activation=activation, rules=list(rules)), False)
    model(images()) if activation is None else qat.calibrate(model, [images()])
    return model.eval()


def saved(path, **options):
    """Return (fake-quant output, fake-quant tensors) of a model saved at path."""
    model = prepared(**options)
    output, tensors = model(images()).detach(), qat.quantized_tensors(model)
    qat.save(qat.freeze(model), path)
    return output, tensors


def assert_same(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.codes, others[name].codes), name
        assert torch.equal(tensor.scale, others[name].scale), name
        assert tensor.spec == others[name].spec, name


def test_a_loaded_model_has_the_trained_integers_and_outputs(tmp_path):
    output, tensors = saved(tmp_path / "out")
    model = qat.load(tmp_path / "out", model=Net())
    assert torch.equal(model(images()), output)
    assert_same(tensors, qat.quantized_tensors(model))
    assert not model.training


@given(bits=st.integers(2, 8), group=st.sampled_from([None, 3, 6, 12]), scale=st.sampled_from(["bfloat16", "float32"]))
def test_any_bits_and_groups_survive(tmp_path_factory, bits, group, scale):
    path = tmp_path_factory.mktemp("artifact") / "out"
    spec = qat.QuantSpec(bits=bits, group_size=group, scale_dtype=scale)
    rules = [
        {"match": "conv", "weight": {"granularity": "channel"}},
        {"match": "fc", "weight": {"granularity": "tensor"}},
    ]
    output, tensors = saved(path, weight=spec, activation=None, rules=rules)
    model = qat.load(path, model=Net())
    assert torch.equal(model(images()), output)
    assert_same(tensors, qat.quantized_tensors(model))


def test_four_bit_codes_lie_two_a_byte_and_ties_are_stored_once(tmp_path):
    saved(tmp_path / "out")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["fc.packed_weight.packed"].shape == (12, 8 * 16 // 2)
    assert "fc.weight" not in stored
    assert sorted(name for name in stored if name.endswith(".packed") and name[0] in "ab") == ["a.packed_weight.packed"]


def test_ties_are_restored(tmp_path):
    saved(tmp_path / "out")
    model = qat.load(tmp_path / "out", model=Net())
    assert model.a.packed_weight is model.b.packed_weight


def test_full_precision_ties_and_dtypes_survive(tmp_path):
    model = prepared(activation=None, rules=[{"match": "re:[ab]", "weight": None}]).bfloat16()
    tensors = qat.quantized_tensors(model)
    qat.save(qat.freeze(model), tmp_path / "out")
    loaded = qat.load(tmp_path / "out", model=Net())
    assert loaded.a.weight is loaded.b.weight
    assert loaded.a.weight.dtype == torch.bfloat16
    assert_same(tensors, qat.quantized_tensors(loaded))


def test_a_layer_with_only_its_input_quantized(tmp_path):
    output, _ = saved(tmp_path / "out", rules=[{"match": "fc", "weight": None}])
    assert torch.equal(qat.load(tmp_path / "out", model=Net())(images()), output)


def test_save_wants_a_frozen_model(tmp_path):
    with pytest.raises(StateError, match=r"qat\.freeze"):
        qat.save(prepared(), tmp_path / "out")
    with pytest.raises(StateError, match="nothing to save"):
        qat.save(Net(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_load_wants_a_fresh_model(tmp_path):
    saved(tmp_path / "out")
    with pytest.raises(StateError, match="fresh instance"):
        qat.load(tmp_path / "out", model=prepared())


def test_load_without_an_architecture_says_what_to_type(tmp_path):
    saved(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"model=YourModel\(\)"):
        qat.load(tmp_path / "out")


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


@pytest.mark.parametrize("at_a_place", [True, False])
def test_threads_read_tensors_side_by_side(tmp_path, monkeypatch, at_a_place):
    if not at_a_place:  # as on Windows
        monkeypatch.delattr(os, "preadv")
    made = {f"t{i}": torch.randn(300, 70) for i in range(40)}
    save_file(made, tmp_path / "a.safetensors")
    stored = StoredTensors([tmp_path / "a.safetensors"])
    with ThreadPoolExecutor(8) as threads:
        for name, found in zip([*made] * 5, threads.map(stored.__getitem__, [*made] * 5), strict=True):
            assert torch.equal(found, made[name])


def test_an_artifact_that_is_replaced_while_it_is_read_is_read_whole(tmp_path):
    _, tensors = saved(tmp_path / "out")
    with native.reading(tmp_path / "out") as model:
        saved(tmp_path / "out", weight=qat.QuantSpec(bits=2))
        owners = "conv", "fc", "a"
        assert_same({name: tensors[name] for name in owners}, {name: model.quantized(name) for name in owners})


def test_codes_of_another_shape_are_refused(tmp_path):
    saved(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["layers"]["fc"]["weight"]["bits"] = 2
    config["quantization_config"]["checksum"] = checksum(config)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"damaged in the layer 'fc': codes of \(12, 128\) in 2 bits"):
        qat.load(tmp_path / "out", model=Net())


@pytest.mark.parametrize("codebook", [None, "nf4", "nf4_double"])
def test_a_gpu_lays_each_weight_out_once(tmp_path, monkeypatch, codebook):
    def made():
        return nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 96), nn.Linear(96, 64, bias=False))

    spec = qat.QuantSpec(codebook=codebook, group_size=32, symmetric=codebook is not None)
    rules = [{"match": "0", "weight": {"codebook": None, "symmetric": True}}]
    model = qat.prepare(made(), qat.QuantPolicy(weight=spec, rules=rules), verbose=False)
    tensors = qat.quantized_tensors(model)
    qat.save(qat.freeze(model), tmp_path / "out")
    calls, prepack = [], PackedWeight.prepack
    monkeypatch.setattr(PackedWeight, "_on_gpu", lambda self: self.packed.device.type != "meta")
    monkeypatch.setattr(PackedWeight, "prepack", lambda self: (calls.append(self), prepack(self)))
    loaded = qat.load(tmp_path / "out", model=made())
    packed = [layer.packed_weight for layer in loaded]
    assert len(calls) == 3 and all(a is b for a, b in zip(calls, packed, strict=True))
    assert all(weight.gpu_operands for weight in packed)
    before = [weight.gpu_operands for weight in packed]
    loaded.to("cpu").to(torch.bfloat16)
    assert all(weight.gpu_operands is operands for weight, operands in zip(packed, before, strict=True))
    assert_same(tensors, qat.quantized_tensors(loaded))
    loaded.to_empty(device="cpu")
    assert all(weight.gpu_operands is not operands for weight, operands in zip(packed, before, strict=True))


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


def test_a_folder_that_is_no_artifact_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="exists and is not of the format to be written"):
        saved(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_write_that_fails_leaves_the_old_artifact(tmp_path):
    """A file size limit stops the write half-way, as a full disk does."""
    saved(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    script = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1]); import test_artifact as t, pathlib\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))\n"
        "t.saved(pathlib.Path(sys.argv[2]), width=32)"
    )
    folder = str(__import__("pathlib").Path(__file__).parent)
    command = [sys.executable, "-c", script, folder, str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert "the artifact that stood there is unchanged" in run.stderr, run.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"], "a half-written folder was left behind"


def test_a_read_only_disk_is_said():
    with pytest.raises(ArtifactError, match=r"cannot write /proc/.*nothing was left there"):
        saved("/proc/nothing-can-be-made-here/out")


def test_readers_see_the_old_artifact_or_the_new_one(tmp_path):
    """While one thread replaces the artifact over and over, every read is one of the two, whole."""
    torch.manual_seed(0)
    models = [qat.freeze(prepared(weight=qat.QuantSpec(bits=bits), activation=None)) for bits in (4, 8)]
    expected = [model(images()) for model in models]
    qat.save(models[0], tmp_path / "out")
    stop, written, failures = threading.Event(), [0], []

    def write():
        try:
            while not stop.is_set():
                written[0] += 1
                qat.save(models[written[0] % 2], tmp_path / "out")
        except Exception as error:  # a thread's own exception would be lost
            failures.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    try:
        for _ in range(60):
            output = qat.load(tmp_path / "out", model=Net())(images())
            seen.add([torch.equal(output, one) for one in expected].index(True))
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert seen == {0, 1} and written[0] > 3


@given(bits=st.integers(2, 8), group=st.sampled_from([None, 3, 6]), seed=st.integers(0, 99))
def test_zero_points_survive(tmp_path_factory, bits, group, seed):
    """An asymmetric weight, as other formats hold them, goes through modules and the artifact unchanged."""
    from qat.formats import native
    from qat.frozen_model import to_model
    from qat.numerics import QuantizedTensor, scale_shape
    from qat.quantized_model import QuantizedLayer, QuantizedModel

    generator = torch.Generator().manual_seed(seed)
    spec = qat.QuantSpec(bits=bits, group_size=group, signed=True, symmetric=False)
    shape = scale_shape((5, 6), spec)

    def integers(*size):
        return torch.randint(-spec.q_n, spec.q_p + 1, size, dtype=torch.int8, generator=generator)

    scale = (torch.rand(shape, generator=generator) + 0.1).bfloat16()
    tensor = QuantizedTensor(integers(5, 6), scale, spec, integers(*shape))
    layer = QuantizedLayer("Linear", [5, 6], spec, None)
    folder = tmp_path_factory.mktemp("artifact")
    native.write(QuantizedModel(None, {"0": layer}, lambda name: tensor, {}.__getitem__, {}), folder)
    model = to_model(native.read(folder), nn.Sequential(nn.Linear(6, 5, bias=False)))
    read = qat.quantized_tensors(model)["0"]
    assert torch.equal(read.zero_point, tensor.zero_point)
    rows, groups = shape
    values = (tensor.codes.view(rows, groups, -1).double() - tensor.zero_point[..., None]) * scale[..., None].double()
    assert torch.equal(model(torch.eye(6)).t().double(), values.view(5, 6))
