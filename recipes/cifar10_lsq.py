"""ResNet-20 on CIFAR-10 with LSQ: one row of the README's table a command.

    python recipes/cifar10_lsq.py --data DIR --bits 32      full precision, and its teacher; run this first
    python recipes/cifar10_lsq.py --data DIR --bits 4       W4A4 from its checkpoint; likewise 3 and 2

DIR holds train.parquet and test.parquet in the Hub's column layout. A row is trained with several seeds, side by side
on the GPUs there are, each through ``python -m qat.train``; a quantized one is converted with --verify, and evaluated
from its artifact. Every row is taught by the same full-precision network, four times as wide; quantized runs start from
the full-precision run of seed 0.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

RUNS = Path("runs/cifar10")
TEACHER = RUNS / "teacher"
WEIGHT_DECAY = {8: 1e-4, 4: 1e-4, 3: 5e-5, 2: 2.5e-5}  # the LSQ paper's, section 3.3
ON_A_GPU = ["compile=true", "compile_mode=reduce-overhead", "trainer.precision=bf16-mixed"]


def main() -> None:
    """Train, convert and evaluate a row, print it, and keep it in runs/cifar10/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--bits", type=int, choices=(32, 8, 4, 3, 2), required=True, help="32: full precision")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="further key=value for python -m qat.train")
    arguments = parser.parse_args()
    data = [f"data.train={arguments.data / 'train.parquet'}", f"data.test={arguments.data / 'test.parquet'}"]
    if arguments.bits == 32 and not (TEACHER / "last.ckpt").exists():
        run_side_by_side({TEACHER: teacher_command() + data + arguments.overrides})
    name = "fp" if arguments.bits == 32 else f"w{arguments.bits}a{arguments.bits}"
    runs = [RUNS / f"{name}_{seed}" for seed in range(arguments.seeds)]
    commands = [row_command(arguments.bits, name, seed) + data + arguments.overrides for seed in range(arguments.seeds)]
    run_side_by_side(dict(zip(runs, commands, strict=True)))
    shipped = [run / "last.ckpt" for run in runs]
    if name != "fp":
        for run in runs:
            convert = ["qat.convert", str(run / "last.ckpt"), "--out", str(run / "artifact"), "--verify"]
            subprocess.run([sys.executable, "-m", *convert], check=True)
        shipped = [run / "artifact" for run in runs]
    accuracies = [accuracy(path, data) for path in shipped]
    row = {"bits": arguments.bits, "accuracy": accuracies, "command": " ".join(sys.argv)}
    (RUNS / f"{name}.json").write_text(json.dumps(row))
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    each = ", ".join(f"{value:.2%}" for value in accuracies)
    print(f"{name}: {statistics.mean(accuracies):.2%} +- {spread:.2%} (seeds: {each})")


def teacher_command() -> list[str]:
    """Return the training command of the wide network that teaches the others."""
    keys = [
        "name=cifar10/teacher",
        "model.args.width=64",
        "trainer.max_epochs=80",
        "trainer.check_val_every_n_epoch=20",
    ]
    return train_command("cifar10_fp", *keys)


def row_command(bits: int, name: str, seed: int) -> list[str]:
    """Return the training command of one seed of a row."""
    keys = [f"seed={seed}", f"name=cifar10/{name}_{seed}", f"teacher={TEACHER / 'last.ckpt'}"]
    if bits == 32:
        return train_command("cifar10_fp", *keys)
    keys += [f"init_from={RUNS / 'fp_0' / 'last.ckpt'}", f"optim.weight_decay={WEIGHT_DECAY[bits]}"]
    return train_command("cifar10_lsq", *keys, f"policy.weight.bits={bits}", f"policy.activation.bits={bits}")


def train_command(experiment: str, *keys: str) -> list[str]:
    """Return a training command, made fast where there is a GPU."""
    fast = ON_A_GPU if torch.cuda.is_available() else []
    return [sys.executable, "-m", "qat.train", f"experiment={experiment}", *keys, *fast]


def run_side_by_side(commands: dict[Path, list[str]]) -> None:
    """Run each run's command at the same time, its output in a file; exit where one fails."""
    RUNS.mkdir(parents=True, exist_ok=True)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    running = {}
    for position, (run, command) in enumerate(commands.items()):
        log = run.with_suffix(".log")
        print(" ".join(command), f"> {log}", flush=True)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[position % len(gpus)]}
        running[log] = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment)
    failed = [str(log) for log, process in running.items() if process.wait()]
    if failed:
        sys.exit(f"error: a run failed, see {', '.join(failed)}")


def accuracy(path: Path, data: list[str]) -> float:
    """Return the test accuracy of a checkpoint or an artifact."""
    result = RUNS / "evaluation.json"
    command = [sys.executable, "-m", "qat.evaluate", str(path), "data=cifar10", "--json", str(result), *data]
    subprocess.run(command, check=True)
    return json.loads(result.read_text())["accuracy"]


if __name__ == "__main__":
    main()
