"""ResNet-20 on CIFAR-10 with LSQ: one row of the README's table a command.

    python recipes/cifar10_lsq.py --data DIR --bits 32      full precision; run this first
    python recipes/cifar10_lsq.py --data DIR --bits 4       W4A4 from its checkpoint; likewise 3 and 2

DIR holds train.parquet and test.parquet in the Hub's column layout. A row is trained with several seeds, side by side
on one GPU, each through ``python -m qat.train``; a quantized one is converted with --verify, and evaluated from its
artifact. Quantized runs start from, and are taught by, the full-precision run of seed 0.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

RUNS = Path("runs/cifar10")
WEIGHT_DECAY = {8: 1e-4, 4: 1e-4, 3: 5e-5, 2: 2.5e-5}  # the LSQ paper's, section 3.3


def main() -> None:
    """Train, convert and evaluate a row, print it, and keep it in runs/cifar10/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--bits", type=int, choices=(32, 8, 4, 3, 2), required=True, help="32: full precision")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="further key=value for python -m qat.train")
    arguments = parser.parse_args()
    name = "fp" if arguments.bits == 32 else f"w{arguments.bits}a{arguments.bits}"
    seeds = range(arguments.seeds)
    commands = [train_command(arguments, name, seed) for seed in seeds]
    print(" ".join(commands[0]), flush=True)
    run_side_by_side(commands, [RUNS / f"{name}_{seed}.log" for seed in seeds])
    accuracies = []
    for seed in seeds:
        run = RUNS / f"{name}_{seed}"
        trained = run / "last.ckpt"
        if name != "fp":
            convert = [sys.executable, "-m", "qat.convert", str(trained), "--out", str(run / "artifact"), "--verify"]
            subprocess.run(convert, check=True)
        accuracies.append(accuracy(trained if name == "fp" else run / "artifact", arguments.data))
    row = {"bits": arguments.bits, "accuracy": accuracies, "command": " ".join(sys.argv)}
    (RUNS / f"{name}.json").write_text(json.dumps(row))
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    each = ", ".join(f"{value:.2%}" for value in accuracies)
    print(f"{name}: {statistics.mean(accuracies):.2%} +- {spread:.2%} (seeds: {each})")


def train_command(arguments: argparse.Namespace, name: str, seed: int) -> list[str]:
    """Return the training command of one seed."""
    command = [sys.executable, "-m", "qat.train", "experiment=cifar10_fp" if name == "fp" else "experiment=cifar10_lsq"]
    command += [f"data.train={arguments.data / 'train.parquet'}", f"data.test={arguments.data / 'test.parquet'}"]
    command += [f"seed={seed}", f"name=cifar10/{name}_{seed}"]
    if name != "fp":
        full_precision = RUNS / "fp_0" / "last.ckpt"
        command += [f"init_from={full_precision}", f"teacher={full_precision}"]
        command += [f"policy.weight.bits={arguments.bits}", f"policy.activation.bits={arguments.bits}"]
        command += [f"optim.weight_decay={WEIGHT_DECAY[arguments.bits]}"]
    return command + arguments.overrides


def run_side_by_side(commands: list[list[str]], logs: list[Path]) -> None:
    """Run commands at the same time, their output in a file each; exit where one fails."""
    RUNS.mkdir(parents=True, exist_ok=True)
    running = [
        subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)
        for command, log in zip(commands, logs, strict=True)
    ]
    failed = [str(log) for process, log in zip(running, logs, strict=True) if process.wait()]
    if failed:
        sys.exit(f"error: a run failed, see {', '.join(failed)}")


def accuracy(path: Path, data: Path) -> float:
    """Return the test accuracy of a checkpoint or an artifact."""
    result = RUNS / "evaluation.json"
    command = [sys.executable, "-m", "qat.evaluate", str(path), "data=cifar10", "--json", str(result)]
    command += [f"data.train={data / 'train.parquet'}", f"data.test={data / 'test.parquet'}"]
    subprocess.run(command, check=True)
    return json.loads(result.read_text())["accuracy"]


if __name__ == "__main__":
    main()
