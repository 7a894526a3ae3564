"""Tensors in files: the same values, and no copies of them."""

import copy

import torch
from torch import nn

from qat.formats.executorch_disk import LEAST_BYTES, OnDisk, share_when_copied_


def test_large_tensors_lie_in_files_and_small_ones_in_memory(tmp_path):
    disk = OnDisk(tmp_path)
    large = torch.randint(-128, 128, (LEAST_BYTES // 16, 16), dtype=torch.int8)
    small = torch.randn(3, 2)
    assert torch.equal(disk.keep(large.t()), large.t()) and disk.keep(small) is not None
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == large.nbytes
    kept = disk.keep(large)
    kept[0] = 0  # a private copy of a page, and not the file's
    assert torch.equal(disk.keep(large), large) and torch.equal(disk.keep(small), small)


def test_a_module_computes_the_same_from_files(tmp_path):
    layer = nn.Linear(256, 128)
    x = torch.randn(4, 256)
    expected = layer(x)
    assert torch.equal(OnDisk(tmp_path).keep_(layer)(x), expected)
    assert len(list(tmp_path.iterdir())) == 1 and isinstance(layer.weight, nn.Parameter)


def test_dense_tensors_become_float32_and_others_stay(tmp_path):
    floats = OnDisk(tmp_path).floats({"a": torch.ones(2, 3, dtype=torch.bfloat16), "n": torch.tensor(7)})
    assert {name: floats[name].dtype for name in floats} == {"a": torch.float32, "n": torch.int64} and len(floats) == 2


def test_copies_of_a_program_share_its_tensors():
    program = torch.export.export(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(), (torch.randn(2, 4),))
    assert copy.deepcopy(program.state_dict["0.weight"]) is not program.state_dict["0.weight"]
    share_when_copied_(program)
    copied = copy.deepcopy(program.state_dict)
    assert copied.keys() == program.state_dict.keys()
    assert all(copied[name] is tensor for name, tensor in program.state_dict.items())
