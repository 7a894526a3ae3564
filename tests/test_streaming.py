"""Converting streams: a language model larger than the memory that it takes goes from folder to folder."""

import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch

import qat
from qat.formats import native, shards
from qat.numerics import QuantizedTensor
from qat.quantized_model import QuantizedLayer, QuantizedModel

SHARD = 2**26
SLACK = 2**29  # torch, its allocator and one layer's temporaries; the promise for 4 GiB shards is 2 GiB
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 32, "vocab_size": 4096}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
# Imports what any conversion imports, notes the peak so far, converts, and prints both peaks in bytes. Not getrusage:
# its peak of a new program includes that of the process which started it.
CONVERT = """
import sys
import qat, qat.convert, qat.formats.gguf, qat.formats.compressed_tensors, transformers, transformers.models.llama
def peak(): return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
qat.formats.shards.ShardWriter.__init__.__defaults__ = (int(sys.argv.pop()), None)
if qat.convert.main(sys.argv[1:]): sys.exit(1)
print("peak", before, peak())
"""


class Dense(Mapping):
    """Tensors that are made when asked for."""

    def __init__(self, shapes):
        self.shapes = shapes

    def __getitem__(self, name):
        return torch.zeros(self.shapes[name], dtype=torch.bfloat16)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


def lazy_llama(sizes, heads):
    """A quantized Llama that is never in memory whole: every layer has the same random codes, rolled by its number."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, **heads, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    spec = qat.QuantSpec(group_size=32)
    names = [name.removesuffix(".weight") for name in shapes if name.endswith("_proj.weight")]
    layers = {name: QuantizedLayer("Linear", shapes.pop(f"{name}.weight"), spec, None) for name in names}
    drawn = {tuple(layer.shape): torch.randint(-8, 8, layer.shape, dtype=torch.int8) for layer in layers.values()}

    def quantized(name):
        rows, inputs = layers[name].shape
        codes = drawn[rows, inputs].roll(names.index(name), 0)
        return QuantizedTensor(codes, torch.full((rows, inputs // 32), 0.01).bfloat16(), spec, None)

    return QuantizedModel({"transformers": config.to_dict()}, layers, quantized, {}.__getitem__, Dense(shapes))


def convert(source, out, to, shard):
    """Convert in a process of its own; return (what it held before, at most) in bytes."""
    arguments = [str(source), "--to", to, "--out", str(out), str(shard)]
    run = subprocess.run([sys.executable, "-P", "-c", CONVERT, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return tuple(map(int, run.stdout.split("peak ")[1].split()))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("to", ["compressed-tensors", "gguf", "gptq", "awq", "mlx", "torchao"])
def test_converting_holds_one_shard_of_the_model(tmp_path, monkeypatch, to):
    if to == "gguf":
        pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    (tmp_path / "native").mkdir()
    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (SHARD, None))
    native.write(lazy_llama(SIZES, HEADS), tmp_path / "native")
    size = sum(file.stat().st_size for file in (tmp_path / "native").iterdir())
    before, peak = convert(tmp_path / "native", tmp_path / "out", to, SHARD)
    print(f"{to}: {size:,} bytes converted with {peak - before:,} bytes of memory beside {before:,} of imports")
    assert size > SHARD + SLACK
    assert peak - before < SHARD + SLACK
