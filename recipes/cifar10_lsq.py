"""ResNet-20 on CIFAR-10 with LSQ: one row of the README's table a command.

    python recipes/cifar10_lsq.py --data DIR --bits 32      full precision; run this first
    python recipes/cifar10_lsq.py --data DIR --bits 4       W4A4 from its checkpoint; likewise 3 and 2

DIR holds train.parquet and test.parquet in the Hub's column layout. A row is trained with several seeds, side by side
on the GPUs there are, each through ``python -m qat.train``; a quantized one is converted with --verify, and evaluated
from its artifact. Quantized runs start from the full-precision run of seed 0, which also teaches them, as in the LSQ
paper's section on knowledge distillation; two bits go on from where three came to.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from qat.broken_pipe import ends_quietly

RUNS = Path("runs/cifar10")
FULL_PRECISION = RUNS / "fp_0" / "last.ckpt"
STARTS = {2: RUNS / "w3a3_0" / "last.ckpt"}
# The fewer bits, the longer, with less weight decay: the LSQ paper's section 3.3 halves it for 3 bits. For 2 bits Adam
# and levels that are not symmetric around 0 did better than SGD and those that are (benchmarks/NOTES.md).
SETTINGS = {
    8: ["optim.lr=0.05", "optim.weight_decay=5e-4", "trainer.max_epochs=90"],
    4: ["optim.lr=0.1", "optim.weight_decay=5e-4", "trainer.max_epochs=150"],
    3: ["optim.lr=0.1", "optim.weight_decay=2.5e-4", "trainer.max_epochs=200"],
    2: [
        *("optim=adamw", "optim.lr=5e-4", "optim.weight_decay=0.1", "task.step_size_lr_scale=0.3", "task.warmup=0.005"),
        *("policy.weight.symmetric=false", "policy.weight.zero_point_dtype=float16", "trainer.max_epochs=600"),
    ],
}
ON_A_GPU = ["compile=true", "compile_mode=reduce-overhead", "trainer.precision=bf16-mixed"]


@ends_quietly()
def main() -> None:
    """Train, convert and evaluate a row, print it, and keep it in runs/cifar10/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--bits", type=int, choices=(32, 8, 4, 3, 2), required=True, help="32: full precision")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="further key=value for python -m qat.train")
    arguments = parser.parse_intermixed_args()
    bits, data = arguments.bits, [f"data.{part}={arguments.data / part}.parquet" for part in ("train", "test")]
    if bits != 32:
        for needed, first in ((FULL_PRECISION, 32), (STARTS.get(bits, FULL_PRECISION), bits + 1)):
            if not needed.exists():
                sys.exit(f"error: {needed} is missing: run --bits {first} first")
    name = "fp" if bits == 32 else f"w{bits}a{bits}"
    runs = [RUNS / f"{name}_{seed}" for seed in range(arguments.seeds)]
    side_by_side("train", {run: train_command(bits, run, data + arguments.overrides) for run in runs}, first_gpu=bits)
    shipped = {run: run / "last.ckpt" for run in runs}
    if bits != 32:
        shipped = {run: run / "artifact" for run in runs}
        convert = ("qat.convert", "--verify")
        side_by_side("convert", {run: [*convert, str(run / "last.ckpt"), "--out", str(shipped[run])] for run in runs})
    measure = ("data=cifar10", *data)
    side_by_side(
        "evaluate", {run: ["qat.evaluate", str(shipped[run]), *measure, "--json", f"{run}.json"] for run in runs}
    )
    accuracies = [json.loads(Path(f"{run}.json").read_text())["accuracy"] for run in runs]
    row = {"bits": bits, "accuracy": accuracies, "command": " ".join(sys.argv)}
    (RUNS / f"{name}.json").write_text(json.dumps(row))
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    each = ", ".join(f"{value:.2%}" for value in accuracies)
    print(f"{name}: {statistics.mean(accuracies):.2%} +- {spread:.2%} (seeds: {each})")


def train_command(bits: int, run: Path, overrides: list[str]) -> list[str]:
    """Return the training command of a run, whose folder ends in its seed."""
    command = ["qat.train", f"name=cifar10/{run.name}", f"seed={run.name.rpartition('_')[2]}"]
    if bits == 32:
        command += ["experiment=cifar10_fp"]
    else:
        start = STARTS.get(bits, FULL_PRECISION)
        command += ["experiment=cifar10_lsq", f"init_from={start}", f"teacher={FULL_PRECISION}"]
        command += [f"policy.weight.bits={bits}", f"policy.activation.bits={bits}", *SETTINGS[bits]]
    return [*command, *(ON_A_GPU if torch.cuda.is_available() else []), *overrides]


def side_by_side(step: str, commands: dict[Path, list[str]], first_gpu: int = 0) -> None:
    """Run the module and arguments of each run at the same time, output in RUN.STEP.log; exit where one fails.

    The GPUs there are take turns, from ``first_gpu`` on, so that the runs of several rows spread over them.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    running = {}
    for position, (run, command) in enumerate(commands.items(), first_gpu):
        log = Path(f"{run}.{step}.log")
        print("python -m", *command, ">", log, flush=True)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[position % len(gpus)]}
        started = [sys.executable, "-m", *command]
        running[log] = subprocess.Popen(started, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment)
    failed = [str(log) for log, process in running.items() if process.wait()]
    if failed:
        sys.exit(f"error: it failed, see {', '.join(failed)}")


if __name__ == "__main__":
    main()
