"""``python -m qat.verify ARTIFACT REFERENCE``: compare an artifact with the fake-quant model it was made from.

``python -m qat.convert --verify`` writes the reference (codes, dequantized weights, outputs) and starts this in a
fresh process, so that nothing but the files on disk is compared.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .broken_pipe import ends_quietly
from .errors import QATError

if TYPE_CHECKING:
    from torch import nn

    from .numerics import QuantizedTensor

# In the file that goes between the processes, beside codes/NAME and output/NAME.
INPUT, WEIGHT, WHY = "input", "weight/", "why the outputs are not compared"


def write_reference(model, example, path: Path) -> None:
    """Write what a prepared model's float32 training forward uses: codes, weight bits and outputs for an example."""
    import torch
    from safetensors.torch import save_file

    from .formats.outputs import outputs_of_random
    from .inputs import by_name
    from .layers import matrix, quant_layers
    from .packing import pack

    model = model.float().eval()
    tensors, about = {}, {}
    with torch.no_grad():
        for name, layer in quant_layers(model):
            if layer.weight_quantizer is not None:
                quantized = layer.weight_quantizer.quantize(matrix(layer))
                tensors[f"codes/{name}"] = pack(quantized.codes.flatten(1), quantized.spec.bits, -quantized.spec.q_n)
                about[f"{WEIGHT}{name}"] = _digest(layer.weight_quantizer(matrix(layer)))
        made = {}
        if example is None:
            about[WHY] = "the checkpoint recorded no example input"
        else:
            found = outputs_of_random(model, example)
            if isinstance(found, str):
                about[WHY] = found
            else:
                made = found
                tensors |= by_name(example, INPUT)
        for output, value in made.items():
            tensors[f"output/{output}"] = value.float().contiguous().clone()  # no file holds one memory twice
    save_file(tensors, path, metadata=about)


def compare(artifact: Path, reference: Path, model: str | None = None) -> bool:
    """Print a row for each layer that differs, and one for each output; return whether all is equal.

    Raises:
        QATError: the artifact cannot be loaded.
    """
    from safetensors import safe_open

    from .artifact import load
    from .convert import build_model
    from .freezing import quantized_tensors

    loaded = load(artifact, build_model(model)).float()
    with safe_open(reference, "pt") as file:
        about = file.metadata() or {}
        digests = {name.removeprefix(WEIGHT): digest for name, digest in about.items() if name.startswith(WEIGHT)}
        found = quantized_tensors(loaded)
        if found.keys() != digests.keys():
            print(f"layers differ: {sorted(found.keys() ^ digests.keys())}")
            return False
        equal = _same_tensors(found, file, digests)
        if WHY in about:
            print(f"output            not compared: {about[WHY]}")
            return equal
        return _same_outputs(loaded, file) and equal


def _same_tensors(found: dict[str, QuantizedTensor], file: Any, digests: dict[str, str]) -> bool:
    """Print rows of codes and weights; return whether all are equal."""
    import torch

    from .packing import unpack

    total = differing = weights_off = 0
    for name, tensor in found.items():
        spec, columns = tensor.spec, tensor.codes[0].numel()
        codes = unpack(file.get_tensor(f"codes/{name}"), spec.bits, columns, -spec.q_n)
        off = int((codes != tensor.codes.flatten(1)).sum())
        weight_off = _digest(tensor.dequantize(torch.float32)) != digests[name]
        if off or weight_off:
            print(f"{name}: {off} of {codes.numel()} codes differ; weights {'differ' if weight_off else 'equal'}")
        total, differing, weights_off = total + codes.numel(), differing + off, weights_off + weight_off
    print(f"codes             {differing} of {total:,} differ")
    print(f"weights           {weights_off} of {len(found)} layers differ in any bit")
    return not (differing or weights_off)


def _same_outputs(loaded: nn.Module, file: Any) -> bool:
    """Print a row for each output for the stored inputs; return whether all are equal."""
    import torch

    from .formats.float_error import TOLERANCE
    from .formats.outputs import gap, outputs
    from .inputs import from_names

    with torch.no_grad():
        parts = {name: file.get_tensor(name) for name in file.keys() if name.startswith(INPUT)}  # noqa: SIM118  no dict
        made = outputs(loaded, from_names(parts, INPUT))
    equal = True
    for output, value in made.items():
        off, largest = gap(value.float(), file.get_tensor(f"output/{output}"))
        what = "output" if len(made) == 1 else f"output {output}"
        print(f"{what:17} differs by at most {off:g} (largest {largest:g})")
        equal &= off <= TOLERANCE * largest
    return equal


@ends_quietly()
def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return 1 where anything differs."""
    parser = argparse.ArgumentParser(prog="python -m qat.verify", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--model", help="package.module:function that builds an untrained model of your own")
    arguments = parser.parse_args(argv)
    try:
        equal = compare(arguments.artifact, arguments.reference, arguments.model)
    except QATError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("verified: what was trained is what ships" if equal else "error: the artifact differs from its checkpoint")
    return 0 if equal else 1


def _digest(weight) -> str:
    return hashlib.sha256(weight.float().contiguous().cpu().numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
