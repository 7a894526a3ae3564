"""GPTQ and AWQ of other tools beside ours: one model, the same calibration windows, perplexity by the same code.

    python -m benchmarks.ptq_peers --model FOLDER --train TEXT... --test TEXT [--tools "qat gptq" gptqmodel ...]

FOLDER is a transformers model in full precision, such as the one that recipes/smollm2_formats.py unpacks; peers are
those of ``pip install gptqmodel llmcompressor`` that are installed. Weights of every linear layer but lm_head are
4-bit, symmetric, in groups of 64; all else is each tool's default. Calibration is on ``--windows`` random windows
of 512 tokens of the training text, the same for every tool. Each tool runs in a process of its own and writes a folder
in its own format; that folder, opened by ``qat.hf``, is measured on the test text's first 40 windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from qat.broken_pipe import ends_quietly

LENGTH, GROUP = 512, 64
TOOLS = {  # name -> the package that it needs
    "none": "qat",
    "qat gptq": "qat",
    "gptqmodel gptq": "gptqmodel",
    "llm-compressor gptq": "llmcompressor",
    "qat awq": "qat",
    "llm-compressor awq": "llmcompressor",
}


@ends_quietly()
def main() -> None:
    """Run the tools, each in its process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", nargs="+", type=Path, required=True, help="text to calibrate with")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32, help="to calibrate with")
    parser.add_argument("--test-windows", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of which windows")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), metavar="TOOL")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ptq_peers"))
    parser.add_argument("--one", choices=TOOLS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        one(options.one, options)
        return
    rows = []
    for tool in options.tools:
        if find_spec(TOOLS[tool]) is None:
            continue
        done = subprocess.run([sys.executable, "-m", "benchmarks.ptq_peers", *sys.argv[1:], "--one", tool])
        result = options.out / f"{tool.replace(' ', '-')}.json"
        rows.append(json.loads(result.read_text()) if done.returncode == 0 else {"tool": tool, "problem": "see above"})
    print("\n| tool | version | perplexity | seconds to quantize |\n|---|---|---|---|")
    for row in rows:
        print("| {tool} | {version} | {perplexity:.2f} | {seconds:.0f} |".format(**row) if "version" in row else row)


def one(tool: str, options: argparse.Namespace) -> None:
    """Quantize by one tool, measure what it wrote, and keep the result."""
    from importlib.metadata import version

    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def windows(paths: list[Path]) -> torch.Tensor:
        text = "".join(path.read_text(encoding="utf-8") for path in paths)
        tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    rows, generator = windows(options.train), torch.Generator().manual_seed(options.seed)
    rows = rows[torch.randperm(len(rows), generator=generator)[: options.windows]]
    folder = options.out / tool.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    if tool == "none":
        folder = options.model
    else:
        {"qat": ours, "gptqmodel": gptqmodel, "llmcompressor": llm_compressor}[TOOLS[tool]](
            tool.split()[-1], options.model, rows, folder
        )
    seconds = time.perf_counter() - start
    perplexity = measure(folder, windows([options.test])[: options.test_windows])
    packages = {"qat": "qat-lsq"}
    row = {"tool": tool, "version": version(packages.get(TOOLS[tool], TOOLS[tool]))}
    row |= {"perplexity": perplexity, "seconds": seconds}
    folder.with_suffix(".json").write_text(json.dumps(row)) if tool != "none" else (
        options.out / "none.json"
    ).write_text(json.dumps(row))
    print(row, flush=True)


def measure(folder: Path, test) -> float:
    """Return the perplexity of the model in a folder, whatever its format, on windows (N, 512)."""
    import torch

    import qat.hf

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, losses = qat.hf.from_pretrained(str(folder), dtype=torch.float32).to(device).eval(), []
    with torch.inference_mode():
        for rows in test.to(device).split(4):
            losses.append(model(input_ids=rows, labels=rows).loss.item() * len(rows))
    return math.exp(sum(losses) / len(test))


def ours(method: str, model: Path, rows, out: Path) -> None:
    """Quantize with qat."""
    import torch
    from transformers import AutoModelForCausalLM

    import qat

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    policy = {"weight": {"bits": 4, "group_size": GROUP}, "rules": [{"match": "lm_head", "weight": None}]}
    qat.prepare(loaded, qat.QuantPolicy.from_dict({**policy, "init": method}), verbose=False)
    qat.calibrate(loaded, list(rows.to(loaded.device).split(4)), verbose=False)
    qat.save(qat.freeze(loaded), out)


def gptqmodel(method: str, model: Path, rows, out: Path) -> None:
    """Quantize with GPTQModel."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # read at its import; fails with its own default on 2 cores
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model, out = model.resolve(), out.resolve()
    os.chdir(out.parent)  # where it writes a folder of logs
    config = QuantizeConfig(bits=4, group_size=GROUP, sym=True)
    loaded = GPTQModel.load(str(model), config, device=device, dtype=torch.float32)
    loaded.quantize([{"input_ids": row, "attention_mask": [1] * LENGTH} for row in rows.tolist()], batch_size=4)
    loaded.save(str(out))


def llm_compressor(method: str, model: Path, rows, out: Path) -> None:
    """Quantize with llm-compressor."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():  # AWQ pins its intermediates for a GPU, and fails where there is none
        IntermediatesCache.pin_memory = lambda *_, **__: None
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    modifier = {"gptq": GPTQModifier, "awq": AWQModifier}[method](config_groups=groups, ignore=["lm_head"])
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": [[1] * LENGTH] * len(rows)})
    oneshot(model=loaded, dataset=data, recipe=modifier, max_seq_length=LENGTH, num_calibration_samples=len(rows))
    loaded.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    main()
