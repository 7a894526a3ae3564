"""Artifacts: what is saved is what is read, and an artifact is replaced whole or not at all."""

import gc
import os
import shutil
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_artifacts import Net, assert_same, images, prepared, saved
from torch import nn

import qat
from qat.atomic import atomic_folder
from qat.errors import ArtifactError, StateError
from qat.formats import native
from qat.formats.stored_tensors import StoredTensors
from qat.layers import PackedWeight


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


class Buffers(nn.Module):
    """Beside its layer: rotations as complex numbers, a buffer that is a part of another, and what is no parameter."""

    def __init__(self, extra=None):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("rotation", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("table", torch.arange(16.0))
        self.register_buffer("second", self.table[8:])
        self.register_buffer("rows", self.table.view(2, 8))
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, extra):
        self.extra = extra

    def forward(self, x):
        turned = torch.view_as_real(torch.view_as_complex(x.view(-1, 4, 2)) * self.rotation).flatten(1)
        return self.fc(turned) * self.second + self.rows.sum(0)


def test_buffers_of_all_kinds_survive(tmp_path):
    torch.manual_seed(0)
    model = qat.freeze(qat.prepare(Buffers(torch.tensor(3)), {"weight": {"bits": 4}}, verbose=False))
    qat.save(model, tmp_path / "out")
    other = Buffers(torch.tensor(0))
    for buffer in other.buffers():
        buffer.zero_()
    loaded, x = qat.load(tmp_path / "out", model=other), torch.randn(2, 8)
    assert torch.equal(loaded(x), model(x)) and loaded.extra == 3
    model.extra = {"step": 3}
    with pytest.raises(ArtifactError, match="'_extra_state' in the model's state dict is a dict, and artifacts hold"):
        qat.save(model, tmp_path / "out")
    model.extra = torch.ones(2, dtype=torch.complex128)
    with pytest.raises(ArtifactError, match=r"'_extra_state' is torch.complex128, which safetensors does not store"):
        qat.save(model, tmp_path / "out")
    model.extra = torch.eye(2).to_sparse()  # as a graph's adjacency
    with pytest.raises(ArtifactError, match=r"'_extra_state' is sparse_coo, and artifacts .*persistent=False"):
        qat.save(model, tmp_path / "out")
    assert torch.equal(qat.load(tmp_path / "out", model=Buffers(torch.tensor(0)))(x), model(x))


class Versioned(nn.Linear):
    """Asks for the version of what it loads, as MNASNet of torchvision does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        assert local_metadata["version"] == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_modules_that_ask_for_a_version_are_loaded(tmp_path):
    model = qat.prepare(nn.Sequential(nn.Linear(8, 8), Versioned(8, 4)), {"weight": {"bits": 4}}, verbose=False)
    qat.save(qat.freeze(model), tmp_path / "out")
    x, loaded = torch.randn(2, 8), qat.load(tmp_path / "out", model=nn.Sequential(nn.Linear(8, 8), Versioned(8, 4)))
    assert torch.equal(loaded(x), model(x))


def test_loading_leaves_no_file_open(tmp_path, recwarn):
    saved(tmp_path / "out")
    warnings.simplefilter("always", ResourceWarning)
    qat.load(tmp_path / "out", model=Net())
    gc.collect()
    assert not [str(each.message) for each in recwarn if each.category is ResourceWarning]


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


def test_a_folder_that_is_no_artifact_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="exists and is not of the format to be written"):
        saved(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_all_files_can_be_read_by_whom_the_umask_lets(tmp_path, umask, mode):
    """A server that runs as another user could not read the weights, which safetensors writes for their owner alone."""
    before = os.umask(umask)
    try:
        saved(tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {mode}


def test_a_write_that_fails_leaves_the_old_artifact(tmp_path):
    """A file size limit stops the write half-way, as a full disk does."""
    saved(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    script = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1]); import small_artifacts as t, pathlib\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))\n"
        "t.saved(pathlib.Path(sys.argv[2]), width=32)"
    )
    folder = str(__import__("pathlib").Path(__file__).parent)
    command = [sys.executable, "-c", script, folder, str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert "the artifact that stood there is unchanged" in run.stderr, run.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"], "a half-written folder was left behind"


def test_one_of_many_files_that_cannot_be_copied_is_said(tmp_path):
    """An adapter beside a model is copied as a folder, whose error is a list of all its files."""
    failed = [(name, f"out/{name}", "No space left on device") for name in ("a", "b")]
    said = pytest.raises(ArtifactError, match="out: No space left on device; nothing was left there")
    with said, atomic_folder(tmp_path / "out", bool):
        raise shutil.Error(failed)


def test_numpys_word_for_a_full_disk_is_explained(tmp_path):
    """GGUF's package writes by it; the error has no number, and did not say what is wrong."""
    script = (
        "import resource, signal, sys, numpy; from qat.atomic import atomic_folder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))\n"
        "with atomic_folder(sys.argv[1], lambda folder: True) as folder:\n"
        "    numpy.zeros(9999).tofile(folder / 'file')"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True)
    assert "out: the disk is full, or a limit is reached (9999 requested and " in run.stderr, run.stderr
    assert not list(tmp_path.iterdir())


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path):
    (tmp_path / ".out.mine.tmp").mkdir()
    (tmp_path / ".other.0123abcd.tmp").mkdir()
    script = (
        "import sys, time; from qat.atomic import atomic_folder\n"
        "with atomic_folder(sys.argv[1], lambda folder: True) as folder:\n"
        "    (folder / 'half').touch(); print('writes', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout.readline() == "writes\n"
            expected = saved(tmp_path / "out")[0]
            (writes,) = tmp_path.glob(".out.????????.tmp")
            assert (writes / "half").exists()
        finally:
            writer.terminate()
    assert writes.exists()
    saved(tmp_path / "out")
    assert not writes.exists() and torch.equal(qat.load(tmp_path / "out", model=Net())(images()), expected)
    assert {file.name for file in tmp_path.iterdir()} == {"out", ".out.mine.tmp", ".other.0123abcd.tmp"}


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


def test_an_example_of_the_inputs_is_kept(tmp_path, monkeypatch):
    """As exports trace a network of the user's own with; only shape, dtype and range are stored."""
    model = qat.freeze(prepared())
    monkeypatch.setattr(Net, "forward", lambda self, x, y=None: x)
    for batch, dtype in ((torch.rand(4, 3, 8, 8) - 1, "float32"), (torch.randint(2, 9, (4, 12)), "int64")):
        low, high = batch.min().item(), batch.max().item()
        looks = {"shape": list(batch.shape[1:]), "dtype": dtype, "low": low, "high": high}
        several = {"x": batch, "y": batch}
        for example, stored in (
            (batch, looks),
            ((batch, batch), {"inputs": [looks, looks]}),
            (several, {"inputs": {"x": looks, "y": looks}}),
        ):
            qat.save(model, tmp_path / "out", example=example)
            assert native.read(tmp_path / "out").example == stored
    qat.save(model, tmp_path / "out")
    assert native.read(tmp_path / "out").example is None


def test_the_folder_of_a_run_is_told_where_its_artifact_is(tmp_path):
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(
        ArtifactError, match=r"it is a run's folder: give .*/artifact, which .*/last.ckpt --out .* makes"
    ):
        qat.load(tmp_path)
    (tmp_path / "artifact").mkdir()
    with pytest.raises(ArtifactError, match=r"it is a run's folder: give .*/artifact$"):
        qat.load(tmp_path)
