"""Converting streams: a language model larger than the memory that it takes goes from folder to folder."""

import importlib
import sys
import types
from pathlib import Path

import pytest

from qat.formats import native, shards

ROOT = Path(__file__).resolve().parents[1]
SHARD = 2**26
SLACK = 2**29  # torch, its allocator and one layer's temporaries; the promise for 4 GiB shards is 2 GiB


@pytest.fixture(scope="module")
def export_memory():
    """Import benchmarks.export_memory without the repository root on sys.path, where ``kernels`` would be found."""
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(ROOT / "benchmarks")]
    sys.modules["benchmarks"] = package
    yield importlib.import_module("benchmarks.export_memory")
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("to", ["compressed-tensors", "gguf", "gptq", "awq", "mlx", "torchao", "onnx", "bitsandbytes"])
def test_converting_holds_one_shard_of_the_model(tmp_path, monkeypatch, export_memory, to):
    if to == "gguf":
        pytest.importorskip("gguf")
    if to == "onnx":
        pytest.importorskip("onnxscript")
    pytest.importorskip("transformers")
    (tmp_path / "native").mkdir()
    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (SHARD, None))
    native.write(
        export_memory.random_llama(export_memory.SHAPES["small"], "nf4" if to == "bitsandbytes" else None),
        tmp_path / "native",
    )
    size = export_memory.folder_bytes(tmp_path / "native")
    before, peak, _ = export_memory.convert(tmp_path / "native", tmp_path / "out", to, SHARD)
    print(f"{to}: {size:,} bytes converted with {peak - before:,} bytes of memory beside {before:,} of imports")
    assert size > SHARD + SLACK
    assert peak - before < SHARD + SLACK
