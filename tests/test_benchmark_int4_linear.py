"""What the int4 benchmark does with its measurements. Needs no GPU."""

import argparse
import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from qat.packing import pack

pytest.importorskip("triton")
from qat.kernels.int4_layout import prepack
from qat.kernels.int8_linear import int8_linear, row_sums

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def benchmarks():
    """Import benchmarks without the repository root on sys.path, where ``kernels`` would be found."""
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(ROOT / "benchmarks")]
    sys.modules["benchmarks"] = package
    yield lambda name: importlib.import_module(f"benchmarks.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.fixture
def int4_benchmark(benchmarks):
    return benchmarks("int4_linear")


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


def test_table(int4_benchmark):
    lines = int4_benchmark.table(RECORDS, ["qat", "peer"], (1, 4), ceiling=3e12).splitlines()
    assert lines[2] == "| 8x16 | 1 | 2.0 | 4.0 | 1.0 | 50% |"
    assert lines[5] == "| 32x16 | 4 | 5.0 | - | 2.0 | 40% |"
    assert len({line.count("|") for line in lines}) == 1


def test_ratios_are_geometric_means_over_the_shapes_that_both_have(int4_benchmark):
    assert int4_benchmark.ratios(RECORDS, ["qat", "peer"], (1, 4)).splitlines()[2] == "| peer | 4.00 | 1.00 | 2.52 |"


def test_what_is_not_installed_is_named(int4_benchmark):
    assert int4_benchmark.missing(RECORDS) == ["peer not measured: ModuleNotFoundError: No module named 'peer'"]


def test_report_writes_a_table_and_a_plot_a_regime(int4_benchmark, tmp_path):
    pytest.importorskip("matplotlib")
    data = {"header": "a day, a GPU", "device": "a GPU", "read_ceiling": 3e12, "names": ["qat", "peer"]}
    data |= {"regimes": {"decode": (1,), "small batch": (4,), "prefill": (9,)}, "records": {"bfloat16": RECORDS}}
    text = int4_benchmark.report(json.loads(json.dumps(data)), tmp_path)
    assert "| 8x16 | 4 | 4.0 | 4.0 |" in text and "peer not measured" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "int4_linear.json",
        "int4_linear_decode_bfloat16.md",
        "int4_linear_decode_bfloat16.svg",
        "int4_linear_small_batch_bfloat16.md",
        "int4_linear_small_batch_bfloat16.svg",
    ]


def small_problem(benchmarks):
    codes = torch.randint(-8, 8, (32, 256), dtype=torch.int8)
    scale = (torch.rand(32, 2) * 0.01 + 0.001).bfloat16()
    return benchmarks("problem").Problem(codes, scale, [prepack(pack(codes, 4), scale, None, 256, 128)] * 2)


def test_what_the_int8_benchmark_calls(benchmarks):
    """Each makes calls of one kind of product; on a CPU the kernels are interpreted."""
    module, problem = benchmarks("int8_linear"), small_problem(benchmarks)
    x = (torch.randn(32, 256) * 0.1).bfloat16()
    y = {name: [call(x) for call in make(problem)] for name, make in module.KERNELS.items()}
    exact = x.double() @ (problem.codes * problem.scale.double().repeat_interleave(128, 1)).T
    for name in ("qat W4A8", "product alone", "qat int8 rounding + W4A16", "qat W4A16", "cuBLAS"):
        assert len(y[name]) > 1 and all((one - exact).norm() < 0.02 * exact.norm() for one in y[name]), name
    assert torch.equal(y["qat W4A8"][0], y["product alone"][0])
    assert ((y["qat W4A4"][0] - exact).norm() < 0.3 * exact.norm()) and y["codes alone"][0].dtype == torch.int8
    assert torch.equal(y["torch._int_mm"][0].long(), (x * 100).to(torch.int8).long() @ problem.codes.long().T)


def test_what_the_tuner_runs(benchmarks):
    tune, problem, x = benchmarks("tune"), small_problem(benchmarks), torch.randn(4, 256).bfloat16()
    weight = problem.weights[0]
    assert torch.equal(tune.runner(x, weight, True)(None, weight), int8_linear(x, weight, row_sums(weight), None))


def test_a_shape_that_is_none_is_refused_with_the_form(benchmarks):
    problem = benchmarks("problem")
    assert problem.parse_shape("4096x14336") == (4096, 14336)
    for text in ("12", "0x128", "128x-128", "128X128", "128x128x2", "128x100", "ax128", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text!r}: give NxK, .* such as 4096x14336"):
            problem.parse_shape(text)


@pytest.mark.parametrize("name", ["int4_linear", "int8_linear", "tune", "dequantize"])
def test_without_a_gpu_a_benchmark_of_one_says_so(benchmarks, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match=r"error: this measures a GPU, and torch .* can use none here"):
        benchmarks(name).main()
