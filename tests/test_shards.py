"""Shards: the metadata in their headers is sorted, and safetensors reads it and the tensors as they were."""

import json

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from qat.formats.shards import SINGLE, ShardWriter

NAMES = st.text(min_size=1).filter("__metadata__".__ne__)


@given(metadata=st.dictionaries(st.text(), st.text(), min_size=2), name=NAMES)
def test_any_metadata_is_sorted_in_place(tmp_path_factory, metadata, name):
    folder = tmp_path_factory.mktemp("out")
    writer = ShardWriter(folder, metadata=metadata)
    values = torch.arange(3.0)
    writer.add(name, values)
    writer.close()
    with safe_open(folder / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt", **metadata} and torch.equal(file.get_tensor(name), values)
    stored = (folder / SINGLE).read_bytes()
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    assert list(header["__metadata__"]) == sorted({"format": "pt", **metadata})
