"""``python -m qat.convert CHECKPOINT --out DIR``: freeze a trained checkpoint into an artifact, and verify it."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from .errors import CheckpointError, QATError

FORMATS = ("native",)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status: 1 where an error or a difference was found."""
    parser = argparse.ArgumentParser(prog="python -m qat.convert", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint that python -m qat.train wrote")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; replaces an artifact there")
    parser.add_argument("--to", choices=FORMATS, default="native", help="the format to write")
    parser.add_argument("--verify", action="store_true", help="reload in a fresh process and compare")
    parser.add_argument("--model", help="package.module:function that builds an untrained model of your own")
    arguments = parser.parse_args(argv)
    try:
        convert(arguments.checkpoint, arguments.out, arguments.model)
        return verify(arguments.checkpoint, arguments.out, arguments.model) if arguments.verify else 0
    except QATError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def convert(checkpoint: Path, out: Path, model: str | None = None) -> None:
    """Write the artifact of a checkpoint and print what it holds.

    Raises:
        QATError: the checkpoint cannot be read or frozen, or ``out`` cannot be written.
    """
    from . import artifact, freezing
    from .checkpoint import read_checkpoint
    from .surgery import summary

    trained = read_checkpoint(checkpoint)
    if trained.policy.quantizes_nothing():
        raise CheckpointError(
            f"{checkpoint} is a full-precision model: train it with a policy first, "
            f"python -m qat.train policy=... init_from={checkpoint}"
        )
    frozen = freezing.freeze(trained.build(build_model(model)))
    print(summary(frozen))
    artifact.save(frozen, out)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"wrote {out} ({size:,} bytes)")


def verify(checkpoint: Path, out: Path, model: str | None = None) -> int:
    """Compare an artifact, in a fresh process, with its checkpoint; print a table and return 1 where they differ."""
    from .checkpoint import read_checkpoint
    from .verify import write_reference

    trained = read_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.safetensors"
        write_reference(trained.build(build_model(model)), trained.example_input(), reference)
        command = [sys.executable, "-m", "qat.verify", str(out), str(reference)]
        return subprocess.run(command + (["--model", model] if model else [])).returncode


def build_model(target: str | None):
    """Call the user's own package.module:function; None for None.

    Raises:
        CheckpointError: it cannot be imported or is not there.
    """
    if target is None:
        return None
    module, _, function = target.partition(":")
    try:
        return getattr(import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(f"--model {target}: {error}; give package.module:function") from None


if __name__ == "__main__":
    sys.exit(main())
