"""The most memory that converting takes beside what importing takes: a language model of random codes, W4 g32.

    python -m benchmarks.export_memory onnx gguf                 # Llama-8B's shape, 6 GB on disk and as much an export
    python -m benchmarks.export_memory onnx --shape small        # 1.1 GB
    python -m benchmarks.export_memory onnx --keep runs/llama    # the model stays there for the next time

A conversion reads and writes a tensor at a time; formats of several files hold a shard (``--shard`` bytes, 4 GiB unless
told) until it is written. Each runs in a process of its own, whose peak Linux counts.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

import qat
from qat.broken_pipe import ends_quietly
from qat.codebook import named_levels
from qat.formats import FORMATS, native, shards
from qat.numerics import QuantizedTensor, scale_dtype
from qat.quantized_model import QuantizedLayer, QuantizedModel

SHAPES = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "small": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "vocab_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}
# Imports what the conversion imports, notes the peak so far, converts, and prints both peaks in bytes, and the most
# that was no page of a file, looked at 20 times a second. Not getrusage: its peak of a new program includes that of the
# process which started it.
CONVERT = """
import sys, threading, time
import qat, qat.convert, qat.formats.gguf, qat.formats.compressed_tensors, qat.formats.onnx
import transformers, transformers.models.llama.modeling_llama
shard, imports, *arguments = sys.argv[1:]
exec(imports)
def memory(what): return 1024 * int(open("/proc/self/status").read().split(what + ":")[1].split()[0])
before, own = memory("VmHWM"), [memory("RssAnon")]
def watch():
    while True:
        own[0] = max(own[0], memory("RssAnon"))
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
qat.formats.shards.ShardWriter.__init__.__defaults__ = (int(shard), None)
qat.formats.onnx.SINGLE_FILE_BYTES = min(qat.formats.onnx.SINGLE_FILE_BYTES, int(shard))
if qat.convert.main(arguments): sys.exit(1)
print("peak", before, memory("VmHWM"), own[0])
"""
# torch's exporter imports at its first use.
IMPORTS = {
    "executorch": "import executorch.exir, executorch.backends.xnnpack.partition.xnnpack_partitioner, torchao",
    "onnx": "import torch; torch.onnx.export(torch.nn.Linear(1, 1), (torch.zeros(1, 1),), dynamo=True, verbose=False)",
}


@ends_quietly()
def main() -> None:
    """Write the model, convert it into each format, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="+", choices=FORMATS)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--codebook", choices=("nf4",), help="for bitsandbytes")
    parser.add_argument("--shard", type=int, default=shards.SHARD_BYTES)
    parser.add_argument("--keep", type=Path, help="folder of the model, which stays, or lies there already")
    parser.add_argument("--verify", action="store_true", help="compare the export with the model too")
    options = parser.parse_args()
    sizes = SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    with tempfile.TemporaryDirectory(dir=".") as made:
        source = options.keep or Path(made) / "model"
        if not source.exists():
            source.mkdir(parents=True)
            native.write(random_llama(sizes, options.codebook), source)
        for name in options.formats:
            start, out = time.perf_counter(), Path(made) / name
            before, peak, own = convert(source, out, name, options.shard, *(["--verify"] if options.verify else []))
            print(
                f"{name}: {folder_bytes(source):,} bytes became {folder_bytes(out):,} in "
                f"{time.perf_counter() - start:.0f} s; {(peak - before) / 2**30:.2f} GiB of memory beside "
                f"{before / 2**30:.2f} GiB of imports; {own / 2**30:.2f} GiB at most were no pages of files",
                flush=True,
            )
            shutil.rmtree(out)


class Random(Mapping[str, Tensor]):
    """Tensors that are made when asked for: matrices of noise, vectors of ones; the same each time."""

    def __init__(self, shapes: dict[str, list[int]]) -> None:
        self.shapes = shapes

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(len(name))
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def random_llama(sizes: dict[str, int], codebook: str | None = None) -> QuantizedModel:
    """Return a quantized Llama that is never in memory whole: layers have the same random codes, rolled by a number."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    spec = qat.QuantSpec(group_size=32, codebook=codebook)
    levels = None if codebook is None else named_levels(spec, torch.device("cpu"))
    names = [name.removesuffix(".weight") for name in shapes if name.endswith("_proj.weight")]
    layers = {name: QuantizedLayer("Linear", shapes.pop(f"{name}.weight"), spec, None) for name in names}
    shapes_of = {tuple(layer.shape) for layer in layers.values()}
    drawn = {shape: torch.randint(-spec.q_n, spec.q_p + 1, shape, dtype=torch.int8) for shape in shapes_of}

    def quantized(name: str) -> QuantizedTensor:
        rows, inputs = layers[name].shape
        codes = drawn[rows, inputs].roll(names.index(name), 0)
        scale = torch.full((rows, inputs // 32), 0.01, dtype=scale_dtype(spec))
        return QuantizedTensor(codes, scale, spec, None, levels)

    return QuantizedModel({"transformers": config.to_dict()}, layers, quantized, {}.__getitem__, Random(shapes))


def convert(source: Path, out: Path, to: str, shard: int, *options: str) -> tuple[int, int, int]:
    """Convert in a process of its own; return (what it held before, at most, and at most without files) in bytes.

    Raises:
        RuntimeError: it fails.
    """
    arguments = [str(shard), IMPORTS.get(to, ""), str(source), "--to", to, "--out", str(out), *options]
    run = subprocess.run([sys.executable, "-P", "-c", CONVERT, *arguments], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    print(run.stdout, end="")
    return tuple(map(int, run.stdout.split("peak ")[1].split()))


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    main()
