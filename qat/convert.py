"""``python -m qat.convert SOURCE --to FORMAT --out DIR``: a trained checkpoint, or a quantized model, in any format.

SOURCE is a checkpoint of ``python -m qat.train``, an artifact, or a folder in one of the formats themselves, ours or
another tool's. With --verify the result is read back and compared: a checkpoint's artifact in a fresh process, another
format through its client's own reader where that is installed.
"""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .broken_pipe import ends_quietly
from .errors import ArtifactError, CheckpointError, QATError, one_line
from .formats import FORMATS

if TYPE_CHECKING:
    from torch import nn

    from .quantized_model import QuantizedModel


@ends_quietly()
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status: 1 where an error or a difference was found."""
    parser = argparse.ArgumentParser(prog="python -m qat.convert", description=__doc__)
    parser.add_argument("source", type=Path, help="a checkpoint of python -m qat.train, or a quantized model")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; replaces an older one")
    parser.add_argument("--to", choices=FORMATS, default="native", help="the format to write")
    parser.add_argument("--verify", action="store_true", help="read the result back and compare")
    parser.add_argument("--model", help="package.module:function that builds an untrained model of your own")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files go along")
    parser.add_argument("--qdq", action="store_true", help="onnx: DequantizeLinear and MatMul in place of MatMulNBits")
    arguments = parser.parse_args(argv)
    try:
        where = (arguments.source, arguments.out, arguments.to, arguments.model, arguments.tokenizer)
        model = convert(*where, qdq=arguments.qdq)
        if not arguments.verify:
            return 0
        if arguments.to == "native" and is_checkpoint(arguments.source):
            return verify_artifact(arguments.source, arguments.out, arguments.model)
        return verify_export(model, arguments.out, arguments.to, arguments.model)
    except (QATError, PermissionError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def convert(
    source: Path,
    out: Path,
    to: str = "native",
    model: str | None = None,
    tokenizer: Path | None = None,
    qdq: bool = False,
) -> QuantizedModel:
    """Write a model in a format, and print what it holds; return it.

    Args:
        source: a checkpoint or a quantized model.
        out: the folder to write.
        to: a key of FORMATS.
        model: package.module:function that builds an untrained model of the user's own.
        tokenizer: a folder whose tokenizer files go along.
        qdq: write ONNX's linear weights as DequantizeLinear too, for readers without MatMulNBits.

    Raises:
        QATError: the source cannot be read, or the format cannot hold it exactly, or ``out`` cannot be written.
    """
    from . import adapters, formats
    from .atomic import atomic_folder, require_other

    require_other(out, source, "source")
    if qdq and to != "onnx":
        raise ArtifactError(f"--qdq says how --to onnx writes linear weights, and this is --to {to}: leave it out")
    if tokenizer is not None and not tokenizer.is_dir():
        raise ArtifactError(f"--tokenizer {tokenizer}: there is no such folder")
    quantized = read_source(source, model)
    if tokenizer is not None:
        quantized.files = tokenizer
    with atomic_folder(out, lambda folder: formats.format_of(folder) == to) as folder:
        options = _network(to, model) | ({"qdq": True} if qdq else {})
        notes = formats.module(to).write(quantized, folder, **options)
    for note in notes:
        print(note)
    for name in adapters.folders(quantized):
        print(f"the adapter lies beside: peft.PeftModel.from_pretrained(model, '{out / name}') puts it on")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"wrote {out} ({size:,} bytes)")
    return quantized


def is_checkpoint(source: Path) -> bool:
    """Return whether a source is to be read as a training checkpoint: any file that is in none of the formats."""
    from .formats import format_of

    return not source.is_dir() and format_of(source) is None


def read_source(source: Path, model: str | None) -> QuantizedModel:
    """Return the quantized model of a checkpoint, which is frozen and summarised, or of a folder or file.

    Raises:
        CheckpointError: a checkpoint that cannot be read, or of a full-precision model.
        ArtifactError: a folder or file that cannot be read, or is in none of the formats.
    """
    from . import formats, freezing
    from .checkpoint import TOKENIZER, read_checkpoint
    from .frozen_model import from_model
    from .table import summary

    if not is_checkpoint(source):
        return formats.read(source)
    trained = read_checkpoint(source)
    if trained.policy.quantizes_nothing():
        raise CheckpointError(
            f"{source} is a full-precision model: train it with a policy first, "
            f"python -m qat.train policy=... init_from={source}"
        )
    frozen = freezing.freeze(trained.build(build_model(model)))
    print(summary(frozen))
    quantized = from_model(frozen)
    quantized.example, quantized.source = trained.example, str(source)
    beside = source.parent / TOKENIZER
    quantized.files = beside if beside.is_dir() else None
    return quantized


def verify_artifact(checkpoint: Path, out: Path, model: str | None = None) -> int:
    """Compare an artifact, in a fresh process, with its checkpoint; print a table and return 1 where they differ.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    from .checkpoint import read_checkpoint
    from .verify import write_reference

    trained = read_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.safetensors"
        write_reference(trained.build(build_model(model)), trained.example_input(), reference)
        command = [sys.executable, "-m", "qat.verify", str(out), str(reference)]
        return subprocess.run(command + (["--model", model] if model else [])).returncode


def verify_export(quantized: QuantizedModel, out: Path, to: str, model: str | None = None) -> int:
    """Compare an export with its source through the readers that are installed; print a table and return 0.

    Raises:
        ArtifactError: anything differs.
    """
    from . import formats

    rows = formats.module(to).verify(out, quantized, **_network(to, model))
    width = max(len(what) for what, _ in rows)
    for what, result in rows:
        print(f"{what.ljust(width)}  {result}")
    print("verified: what was trained is what ships")
    return 0


def build_model(target: str | None) -> nn.Module | None:
    """Call the user's own package.module:function; None for None.

    Raises:
        CheckpointError: it cannot be imported, is not there, takes arguments, or builds something else.
    """
    if target is None:
        return None
    from torch import nn

    module, _, name = target.partition(":")
    try:
        function = getattr(import_module(module), name)
        inspect.signature(function).bind()
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(f"--model {target}: {error}; give package.module:function") from None
    except TypeError as error:
        raise CheckpointError(f"--model {target}: {error}; give a function that takes no arguments") from None
    model = function()
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"--model {target} returns a {type(model).__name__}: give a function that builds a model")
    return model


def _network(to: str, model: str | None) -> dict[str, Any]:
    """A graph format traces the network, which for a user's own model only the user can build."""
    return {"network": build_model(model)} if to in ("onnx", "executorch") else {}


if __name__ == "__main__":
    sys.exit(main())
