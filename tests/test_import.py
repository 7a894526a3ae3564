"""What `import qat` loads, and what it costs, each seen from a fresh process."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import qat

HEAVY = {"torch", "lightning", "pytorch_lightning", "hydra", "omegaconf", "transformers", "triton", "torchmetrics"}
ALL_NAMES = "import qat; [getattr(qat, name) for name in qat.__all__]"


def loaded_by(code: str) -> set[str]:
    """Return which heavy packages a statement imports."""
    code += f"\nimport sys; print(*{HEAVY} & set(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def test_import_alone_loads_nothing_heavy():
    assert loaded_by("import qat") == set()


def test_commands_start_without_torch():
    """So that --help and a mistake in the words are answered at once."""
    commands = [path.stem for path in Path(qat.__file__).parent.glob("*.py") if "def main(" in path.read_text("utf-8")]
    assert {"train", "convert", "compare"} < set(commands)
    assert loaded_by("\n".join(f"import qat.{command}" for command in commands)) == {"hydra", "omegaconf"}


def test_public_names_load_torch_and_no_framework():
    assert loaded_by(ALL_NAMES) == {"torch"}


def test_import_takes_at_most_1_2_times_that_of_torch():
    """Interleaved, and the best of each: other load on the machine only ever adds time."""
    ours, torchs = [], []
    for _ in range(8):
        torchs.append(seconds("import torch"))
        ours.append(seconds(ALL_NAMES))
        if len(ours) > 1 and min(ours) <= 1.2 * min(torchs):
            return
    pytest.fail(f"public names of qat took {min(ours):.2f} s, torch alone {min(torchs):.2f} s")


@pytest.mark.parametrize("name", qat.__all__)
def test_public_name_resolves_and_is_documented(name):
    value = getattr(qat, name)
    assert name in dir(qat)
    assert name == "__version__" or value.__doc__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prepair'"):
        qat.prepair  # noqa: B018
