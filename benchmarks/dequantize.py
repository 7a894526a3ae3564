"""Dequantization of 4-bit weights against a copy of the same bytes: python -m benchmarks.dequantize

Microseconds by the method of benchmarks/timing.py, bf16; the share is that of the measured copy ceiling, with the bytes
of codes, scales and the dense weight counted. bitsandbytes beside ours where it is installed.
"""

from __future__ import annotations

import datetime

import torch
from qat.kernels.int4_layout import prepack
from qat.kernels.int4_linear import int4_dequantize

from benchmarks.problem import LLAMA_8B
from benchmarks.timing import copies, copy_ceiling, graph_time, require_gpu
from qat import codebook
from qat.broken_pipe import ends_quietly
from qat.packing import pack


def rows(outputs: int, inputs: int, block: int = 64) -> dict[str, tuple[float, float]]:
    """Return {what: (microseconds, bytes)} for one shape."""
    codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, device="cuda")
    scale = torch.rand(outputs, inputs // 128, device="cuda").bfloat16()
    levels, absmax = torch.tensor(codebook.NF4, device="cuda"), torch.rand(outputs, inputs // block, device="cuda")
    packed = pack(codes, 4)
    count = copies(packed.nbytes + 2 * codes.numel())
    dense, int4, nf4 = 2 * codes.numel(), packed.nbytes + scale.nbytes, packed.nbytes + absmax.nbytes
    grids = {
        "int4 g128": (prepack(packed, scale, None, inputs, 128), int4),
        "NF4, blocks of 64": (prepack(packed, absmax, None, inputs, block, levels), nf4),
    }
    found = {}
    for name, (weight, size) in grids.items():
        weights = [weight._replace(words=weight.words.clone()) for _ in range(count)]
        calls = [lambda w=w: int4_dequantize(w, torch.bfloat16) for w in weights]
        found[name] = graph_time(calls), size + dense
    try:
        import bitsandbytes as bnb
    except ImportError:
        return found
    matrix = torch.randn(outputs, inputs, device="cuda").bfloat16()
    quantized, state = bnb.functional.quantize_4bit(matrix, quant_type="nf4", blocksize=block)
    tensors = [quantized.clone() for _ in range(count)]
    calls = [lambda t=t: bnb.functional.dequantize_4bit(t, state) for t in tensors]
    found["NF4, bitsandbytes"] = graph_time(calls), nf4 + dense
    return found


@ends_quietly()
def main() -> None:
    """Measure and print."""
    require_gpu()
    ceiling = copy_ceiling()
    print(f"{datetime.date.today()}, {torch.cuda.get_device_name()}, copy {ceiling / 1e12:.2f} TB/s, bf16")
    print("| N x K | what | us | TB/s | of the copy |\n|---|---|---|---|---|")
    for outputs, inputs in LLAMA_8B.values():
        for name, (time, size) in rows(outputs, inputs).items():
            rate = size / time * 1e6
            print(
                f"| {outputs}x{inputs} | {name} | {time:.1f} | {rate / 1e12:.2f} | {rate / ceiling:.0%} |", flush=True
            )


if __name__ == "__main__":
    main()
