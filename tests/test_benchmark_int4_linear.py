"""What the int4 benchmark does with its measurements. Needs no GPU."""

import importlib
import json
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def benchmark():
    """Import benchmarks.int4_linear without the repository root on sys.path, where ``kernels`` would be found."""
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(ROOT / "benchmarks")]
    sys.modules["benchmarks"] = package
    yield importlib.import_module("benchmarks.int4_linear")
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def record(shape, tokens, kernel, us=None, size=3.0e6):
    found = {"us": us} if us is not None else {"missing": "ModuleNotFoundError: No module named 'peer'"}
    return {"shape": shape, "kernel": kernel, "bytes": size, "tokens": tokens} | found


RECORDS = [
    record("8x16", 1, "qat", 2.0),
    record("8x16", 1, "peer", 4.0),
    record("8x16", 4, "qat", 4.0),
    record("8x16", 4, "peer", 4.0),
    record("32x16", 1, "qat", 1.0, 6.0e6),
    record("32x16", 1, "peer", 8.0, 6.0e6),
    record("32x16", 4, "qat", 5.0, 6.0e6),
    record("32x16", 4, "peer", None, 6.0e6),
]


def test_table(benchmark):
    lines = benchmark.table(RECORDS, ["qat", "peer"], (1, 4), ceiling=3e12).splitlines()
    assert lines[2] == "| 8x16 | 1 | 2.0 | 4.0 | 1.0 | 50% |"
    assert lines[5] == "| 32x16 | 4 | 5.0 | - | 2.0 | 40% |"
    assert len({line.count("|") for line in lines}) == 1


def test_ratios_are_geometric_means_over_the_shapes_that_both_have(benchmark):
    assert benchmark.ratios(RECORDS, ["qat", "peer"], (1, 4)).splitlines()[2] == "| peer | 4.00 | 1.00 | 2.52 |"


def test_what_is_not_installed_is_named(benchmark):
    assert benchmark.missing(RECORDS) == ["peer not measured: ModuleNotFoundError: No module named 'peer'"]


def test_report_writes_a_table_and_a_plot_a_regime(benchmark, tmp_path):
    pytest.importorskip("matplotlib")
    data = {"header": "a day, a GPU", "device": "a GPU", "read_ceiling": 3e12, "names": ["qat", "peer"]}
    data |= {"regimes": {"decode": (1,), "small batch": (4,), "prefill": (9,)}, "records": {"bfloat16": RECORDS}}
    text = benchmark.report(json.loads(json.dumps(data)), tmp_path)
    assert "| 8x16 | 4 | 4.0 | 4.0 |" in text and "peer not measured" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "int4_linear.json",
        "int4_linear_decode_bfloat16.md",
        "int4_linear_decode_bfloat16.svg",
        "int4_linear_small_batch_bfloat16.md",
        "int4_linear_small_batch_bfloat16.svg",
    ]
