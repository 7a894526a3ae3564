"""GPU memory and time of a post-training quantization of an 8B model that lies in CPU memory, one block at a time.

    python -m benchmarks.ptq_memory gptq blockwise            # Llama-8B's shape, on a GPU
    python -m benchmarks.ptq_memory gptq --layers 8           # fewer of its blocks: the peak is that of one block
    python -m benchmarks.ptq_memory gptq blockwise --small    # a tiny model on a CPU: that it runs, no figures

Weights are random, in bf16: they cost what trained ones do. Calibration is on random tokens, ``--batches`` of 1 x 512
(GPTQ wants more tokens than the widest layer has inputs), 4-bit weights are in groups of 128, and each method runs in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from qat.broken_pipe import ends_quietly

from .adapters import HEAD, LLAMA_8B, SMALL, measured_alone

METHODS = ("gptq", "gptaq", "awq", "signround", "blockwise")


@ends_quietly()
def main() -> None:
    """Run the methods, each in its process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", choices=METHODS)
    parser.add_argument("--layers", type=int, help="instead of 32")
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50, help="of training a block, for signround and blockwise")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    rows = []
    for method in options.methods:
        arguments = (method, "--one", *sys.argv[1 + len(options.methods) :])
        rows.append({"method": method, **measured_alone("benchmarks.ptq_memory", *arguments)})
        print(rows[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ptq_memory.json").write_text(json.dumps({"command": sys.argv[1:], "rows": rows}, indent=1))


def measure(options: argparse.Namespace) -> dict[str, float | str]:
    """Return blocks, seconds a block, the GPU's peak memory, and the losses over round-to-nearest's."""
    import torch

    import qat
    from qat.ptq import Options

    cuda = not options.small
    model = build(options, "cuda" if cuda else "cpu")
    policy = {"weight": {"bits": 4, "group_size": 32 if options.small else 128}, "rules": HEAD}
    qat.prepare(model, qat.QuantPolicy.from_dict({**policy, "init": options.methods[0]}), verbose=False)
    generator, length = torch.Generator().manual_seed(0), 64 if options.small else 512
    batches = [torch.randint(0, 256, (1, length), generator=generator) for _ in range(options.batches)]
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    options_of_it = Options(steps=options.steps, device="cuda" if cuda else None)
    qat.calibrate(model, batches, options=options_of_it, verbose=False)
    seconds, layers = time.perf_counter() - start, model.config.num_hidden_layers
    waiting = [name for name, layer in model.named_modules() if getattr(layer, "weight_quantizer", None) is not None]
    assert len(qat.quantized_tensors(model)) == len(waiting) == 7 * layers
    row = {"blocks": layers, "seconds": seconds, "seconds a block": seconds / layers}
    if cuda:
        row |= {
            "peak GB": torch.cuda.max_memory_allocated() / 1e9,
            "reserved GB": torch.cuda.max_memory_reserved() / 1e9,
        }
        row["device"] = torch.cuda.get_device_name()
    return row


def build(options: argparse.Namespace, device: str):
    """Return a random model in CPU memory; a device makes the random numbers, one parameter at a time."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SMALL if options.small else LLAMA_8B
    shape = {**shape, "num_hidden_layers": options.layers or shape["num_hidden_layers"]}
    dtype = torch.float32 if options.small else torch.bfloat16
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape, tie_word_embeddings=False), dtype=dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            made = torch.empty(parameter.shape, dtype=dtype, device=device)
            nn.init.normal_(made, std=0.02) if made.dim() > 1 else nn.init.ones_(made)
            setattr(module, name, nn.Parameter(made.cpu()))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


if __name__ == "__main__":
    main()
