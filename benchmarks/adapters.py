"""Adapter training steps, ours beside bitsandbytes with peft: tokens a second and peak memory, on one device.

    python -m benchmarks.adapters                        # Llama-8B's shape, 2 x 2048 tokens, bf16, on a GPU
    python -m benchmarks.adapters --small                # a tiny model in float32 on a CPU: that it runs, no figures

Every variant has the same architecture with random weights, LoRA of rank 16 on all linear layers, gradient
checkpointing and fused AdamW on the adapters, and runs in a process of its own. Weights are quantized a layer at a
time on the device. Random weights are as costly as trained ones. "lean" is what ``compile=true compile_mode=blocks
task.loss_rows=1024`` are in training: blocks are compiled, and the logits are never all there. "24 blocks checkpointed"
is ``gradient_checkpointing=24``: the last blocks spend on their activations what the logits no longer take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from qat.broken_pipe import ends_quietly

VARIANTS = (
    "bf16 LoRA, peft",
    "NF4, bitsandbytes and peft",
    "NF4, qat",
    "NF4, qat, lean",
    "NF4, qat, lean, 24 blocks checkpointed",
    "joint int4 g128 on 8 bits, qat",
    "joint int4 g128 on 8 bits, qat, lean",
    "int4 g128, qat",
)
LOSS_ROWS = 1024
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
LLAMA_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
HEAD = [{"match": "lm_head", "weight": None}]
NF4 = {"weight": {"codebook": "nf4_double", "group_size": 64}, "rules": HEAD}
INT4 = {"weight": {"bits": 4, "group_size": 128}, "rules": HEAD, "init": "minmax"}
INT8 = {"weight": {"bits": 8, "group_size": 128}, "rules": HEAD, "init": "minmax"}


@ends_quietly()
def main() -> None:
    """Run the variants, each in its process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--layers", type=int, help="instead of 32, for a smaller GPU")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    rows = []
    for variant in options.variants:
        rows.append({"variant": variant, **measured_alone("benchmarks.adapters", *sys.argv[1:], "--one", variant)})
        print(rows[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "adapters.json").write_text(json.dumps({"command": sys.argv[1:], "rows": rows}, indent=1))
    (options.out / "adapters.md").write_text(table(rows))
    print("\n" + table(rows))


def measured_alone(module: str, *arguments: str) -> dict:
    """Run a benchmark's module in its own process; return its last line, as JSON, or what stopped it."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], text=True, capture_output=True)
    if done.returncode:
        return {"problem": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, float | str]:
    """Return a variant's step time, tokens a second, memory and estimate."""
    import torch

    from qat.memory import estimate
    from qat.ptq.units import repeated
    from qat.training.chunked_loss import chunked_loss

    device = torch.device("cpu" if options.small else "cuda")
    batch, seq_len = (2, 64) if options.small else (options.batch, options.seq_len)
    model = build(options.one, options, device)
    model.train()
    cuda, lean = device.type == "cuda", "lean" in options.one
    weights = torch.cuda.memory_allocated() if cuda else 0
    optimizer = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tokens = torch.randint(0, 256, (batch, seq_len), device=device)

    def loss(model, tokens):
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            if lean:
                return chunked_loss(model, tokens[:, :-1], tokens[:, 1:], LOSS_ROWS)
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    expected, blocks = 0, repeated(model) if lean else []
    if "bitsandbytes" not in options.one:  # whose weights are more than a tensor
        expected = estimate(model, partial(torch.optim.AdamW, lr=1e-4), tokens, loss, blocks).total
    for block in blocks:
        block.compile(dynamic=False)
    stepper = optimizer(trained)
    times = []
    for step in range(options.steps):
        if cuda and step == 2:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss(model, tokens).backward()
        stepper.step()
        stepper.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    row = {"ms": 1e3 * seconds, "tokens/s": batch * seq_len / seconds, "estimate GB": expected / 1e9}
    if cuda:
        row |= {"weights GB": weights / 1e9, "peak GB": torch.cuda.max_memory_allocated() / 1e9}
        row["device"] = torch.cuda.get_device_name()
    return row


def build(variant: str, options: argparse.Namespace, device):
    """Return a variant's model on the device, its layers quantized one at a time."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    import qat
    from qat.joint_lora import joint_lora
    from qat.lora import lora
    from qat.training.gradient_checkpointing import checkpoint_gradients

    shape = SMALL if options.small else LLAMA_8B
    shape = {**shape, "num_hidden_layers": options.layers or shape["num_hidden_layers"]}
    dtype = torch.float32 if options.small else torch.bfloat16
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape, tie_word_embeddings=False), dtype=dtype)
    blocks = shape["num_hidden_layers"]
    checkpoint_gradients(model, blocks * 24 // 32 if "24 blocks" in variant else blocks)
    quantize = None
    if "qat" in variant:
        quantize = partial(quantized, policy=NF4 if "NF4" in variant else INT8 if "joint" in variant else INT4)
    elif "bitsandbytes" in variant:
        quantize = bitsandbytes_linear
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head" and quantize is not None:
            layer = nn.Linear(module.in_features, module.out_features, bias=False, device=device, dtype=dtype)
            model.set_submodule(name, quantize(layer))
        elif any(True for _ in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    if "joint" in variant:
        return joint_lora(model, qat.QuantPolicy.from_dict(INT4), rank=16, alpha=32, verbose=False)
    return lora(model.requires_grad_(False), rank=16, alpha=32)


def quantized(layer, policy: dict):
    """Return a linear layer with our codes."""
    from torch import nn

    import qat

    holder = nn.Sequential(layer)
    return qat.freeze(qat.prepare(holder, qat.QuantPolicy.from_dict({**policy, "rules": []}), verbose=False))[0]


def bitsandbytes_linear(layer):
    """Return a linear layer with bitsandbytes' doubly quantized NF4."""
    import bitsandbytes
    import torch

    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    made.weight = bitsandbytes.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
    return made.to(layer.weight.device)


def table(rows: list[dict]) -> str:
    """Return the rows in Markdown."""
    columns = ["variant", "ms", "tokens/s", "weights GB", "peak GB", "estimate GB"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = [row.get(column) or "-" for column in columns]
        lines.append([f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells])
        if "problem" in row:
            lines[-1][1] = row["problem"]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
