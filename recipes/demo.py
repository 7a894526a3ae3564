"""`make demo`: train a small network, make it a 4-bit and a 2-bit one, ship both, and compare all in one table.

Every command is printed before it runs, to be copied. Results go to runs/demo, which is emptied first. Overrides for
every training run may follow: python recipes/demo.py trainer.accelerator=gpu. About 2 minutes on two CPU cores.

"rounded" takes the trained full-precision weights to the nearest code (step sizes max|v|/Q_P, inputs calibrated on 8
batches) and trains no further; "trained" goes on from the same weights with learned step sizes. First and last layers
have 8 bits in both (conf/policy/conv_w4a4.yaml).
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from qat.broken_pipe import ends_quietly

OUT = Path("runs/demo")
BASELINE = OUT / "full_precision" / "last.ckpt"
ROUNDED = ("policy.init=minmax", "trainer.max_epochs=0")
TWO_BITS = ("policy.weight.bits=2", "policy.activation.bits=2")
# What the table calls a quantized model, and the overrides that make it from the baseline.
QUANTIZED = {
    "W4A4 rounded": ROUNDED,
    "W4A4 trained": (),
    "W2A2 rounded": (*TWO_BITS, *ROUNDED),
    "W2A2 trained": TWO_BITS,
}


@dataclass
class Row:
    """One line of the table; the baseline has neither an artifact's accuracy nor codes."""

    model: str
    training_accuracy: float
    bytes_on_disk: int
    bits_per_weight: float
    shipped_accuracy: float | None = None
    codes: int | None = None
    differing: int | None = None

    def cells(self) -> tuple[str, ...]:
        """Return what the table prints."""
        shipped = "-" if self.shipped_accuracy is None else f"{self.shipped_accuracy:.1%}"
        codes = "-" if self.codes is None else f"{self.differing} of {self.codes:,}"
        numbers = f"{self.training_accuracy:.1%}", shipped, f"{self.bytes_on_disk:,}", f"{self.bits_per_weight:.2f}"
        return self.model, *numbers, codes


def folder(name: str) -> Path:
    """Return where a model of the table lives."""
    return OUT / name.lower().replace(" ", "_")


def train_commands(overrides: list[str]) -> dict[str, list[str]]:
    """Return {name: the arguments of its training command}."""
    start = ["-m", "qat.train"]
    commands = {"full precision": [*start, "experiment=mnist_fp", f"run_dir={BASELINE.parent}", *overrides]}
    for name, more in QUANTIZED.items():
        where = [f"init_from={BASELINE}", f"run_dir={folder(name)}"]
        commands[name] = [*start, "experiment=mnist_w4a4", *where, *overrides, *more]
    return commands


def run(arguments: list[str]) -> None:
    """Print a command and run it; a failure ends the demo with the command's own message."""
    print("\n$ python " + " ".join(arguments), flush=True)
    status = subprocess.run([sys.executable, *arguments]).returncode
    if status:
        sys.exit(status)


def measure() -> list[Row]:
    """Read each checkpoint and artifact back from disk and test it."""
    from safetensors.torch import save_file

    import qat
    from qat.checkpoint import read_checkpoint
    from qat.training.evaluation import evaluate
    from qat.training.image_data import ImageData

    data = ImageData("mnist5k", mean=[0.1307], std=[0.3081], batch_size=50)
    baseline = read_checkpoint(BASELINE).build()
    weights = folder("full precision") / "model.safetensors"  # the checkpoint also holds the optimizer's state
    save_file(baseline.state_dict(), weights)
    rows = [Row("full precision", evaluate(baseline, data)["accuracy"], weights.stat().st_size, 32)]
    for name in QUANTIZED:
        artifact = folder(name) / "artifact"
        trained, shipped = read_checkpoint(folder(name) / "last.ckpt").build(), qat.load(artifact)
        before, after = qat.quantized_tensors(trained), qat.quantized_tensors(shipped)
        codes = sum(tensor.codes.numel() for tensor in after.values())
        rows.append(
            Row(
                name,
                training_accuracy=evaluate(trained, data)["accuracy"],
                shipped_accuracy=evaluate(shipped, data)["accuracy"],
                bytes_on_disk=sum(file.stat().st_size for file in artifact.iterdir()),
                bits_per_weight=sum(t.codes.numel() * t.bits_per_weight for t in after.values()) / codes,
                codes=codes,
                differing=sum(int((before[layer].codes != after[layer].codes).sum()) for layer in after),
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """Return the rows under their heads, in columns."""
    heads = ("model", "in training", "shipped", "bytes on disk", "bits/weight", "codes that differ")
    lines = [heads, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]

    def text(line: tuple[str, ...]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  ".join([line[0].ljust(widths[0]), *numbers])

    return "\n".join(map(text, lines))


def main(overrides: list[str]) -> None:
    """Run the whole demo."""
    start = time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread saves little here, and waits long on a busy machine
    print(f"$ export OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}")
    shutil.rmtree(OUT, ignore_errors=True)
    for arguments in train_commands(overrides).values():
        run(arguments)
    for name in QUANTIZED:
        run(["-m", "qat.convert", str(folder(name) / "last.ckpt"), "--out", str(folder(name) / "artifact"), "--verify"])
    rows = measure()
    seconds = time.perf_counter() - start
    print(f"\nTest accuracy on 1,000 MNIST images, {seconds:.0f} s in all; everything is in {OUT}:\n")
    print(table(rows))


if __name__ == "__main__":
    with ends_quietly():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every training run")
        main(parser.parse_args().overrides)
