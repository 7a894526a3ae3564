"""W4A16 matmul beside other projects' kernels, in one process: python -m benchmarks.int4_linear [--quick]

Prints and saves one table and one plot a regime (decode, small batch, prefill) and dtype: microseconds a call by the
method of benchmarks/timing.py, with the time in which the weight's bytes alone would be read at the measured ceiling.
Peers come from the package index: pip install humming-kernels gemlite bitsandbytes (tinygemm is in torch).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.problem import KERNELS, LLAMA_8B, LLAMA_70B, MOST_TOKENS, Kernels, Problem, parse_shape
from benchmarks.timing import copy_ceiling, graph_time, read_ceiling, require_gpu
from qat.broken_pipe import ends_quietly

Regimes = dict[str, tuple[int, ...]]
REGIMES = {"decode": (1, 2, 4, 8, 16), "small batch": (32, 64, 128, 256), "prefill": (512, 1024, 2048, 4096)}
QUICK = {"decode": (1, 8, 16), "small batch": (32, 64, 128, 256), "prefill": (1024, 4096)}
PACKAGES = ("torch", "triton", "humming-kernels", "gemlite", "bitsandbytes")


def measure(
    outputs: int, inputs: int, dtype: torch.dtype, tokens: list[int], names: list[str], kernels: Kernels = KERNELS
) -> list[dict]:
    """Return one record a kernel and number of tokens: microseconds, or why there are none."""
    problem = Problem.random(outputs, inputs, dtype)
    records = []
    for name in names:
        known = {"shape": f"{outputs}x{inputs}", "kernel": name, "bytes": problem.weight_bytes(name)}
        try:
            calls = kernels[name](problem)
        except Exception as error:
            records += [known | {"tokens": m, "missing": f"{type(error).__name__}: {error}"[:200]} for m in tokens]
            continue
        for m in tokens:
            if m > MOST_TOKENS.get(name, math.inf):
                continue
            x = (torch.randn(m, inputs, device="cuda") * 0.1).to(dtype)
            try:
                found = {"us": graph_time([partial(call, x) for call in calls])}
            except Exception as error:
                found = {"missing": f"{type(error).__name__}: {error}"[:200]}
            records.append(known | {"tokens": m} | found)
        del calls
        torch.cuda.empty_cache()
    return records


def lines_of(records: list[dict]) -> str:
    """Return the records of one shape as they come, a line a kernel: who waits for a table sees how far it is."""
    kernels: dict[str, list[str]] = {}
    for record in records:
        measured = f"{record['us']:.1f}" if "us" in record else "-"
        kernels.setdefault(f"{record['shape']} {record['kernel']}", []).append(f"M={record['tokens']} {measured}")
    return "\n".join(f"{kernel}, us: {', '.join(found)}" for kernel, found in kernels.items())


def table(records: list[dict], names: list[str], tokens: tuple[int, ...], ceiling: float) -> str:
    """Return the records of one regime as a Markdown table, a row a shape and number of tokens."""
    found = {(r["shape"], r["tokens"], r["kernel"]): r for r in records}
    shapes = list(dict.fromkeys(r["shape"] for r in records))
    lines = [
        "| N x K | M | " + " | ".join(names) + " | bytes at the ceiling | of the ceiling |",
        "|" + "---|" * (len(names) + 4),
    ]
    for shape in shapes:
        for m in tokens:
            row = [found.get((shape, m, name), {}) for name in names]
            times = [f"{r['us']:.1f}" if "us" in r else "-" for r in row]
            size = next(r["bytes"] for r in row if r)
            floor = size / ceiling * 1e6
            share = f"{floor / row[0]['us']:.0%}" if "us" in row[0] else "-"
            lines.append(f"| {shape} | {m} | " + " | ".join(times) + f" | {floor:.1f} | {share} |")
    return "\n".join(lines)


def ratios(records: list[dict], names: list[str], tokens: tuple[int, ...]) -> str:
    """Return how many times longer than ours each peer takes, as geometric means over shapes, by number of tokens."""
    found = {(r["shape"], r["tokens"], r["kernel"]): r["us"] for r in records if "us" in r}
    shapes = list(dict.fromkeys(r["shape"] for r in records))
    lines = ["| time / ours | " + " | ".join(f"M={m}" for m in tokens) + " | all |", "|" + "---|" * (len(tokens) + 2)]
    for name in names[1:]:
        logs = {
            m: [math.log(found[s, m, name] / found[s, m, names[0]]) for s in shapes if (s, m, name) in found]
            for m in tokens
        }
        every = [value for values in logs.values() for value in values]
        means = [f"{math.exp(sum(v) / len(v)):.2f}" if v else "-" for v in (*logs.values(), every)]
        lines.append(f"| {name} | " + " | ".join(means) + " |")
    return "\n".join(lines)


def missing(records: list[dict]) -> list[str]:
    """Return one line for each kernel that gave no number."""
    reasons = {(r["kernel"], r["missing"]) for r in records if "missing" in r}
    return [f"{kernel} not measured: {reason}" for kernel, reason in sorted(reasons)]


def plot(records: list[dict], names: list[str], tokens: tuple[int, ...], title: str, path: Path) -> None:
    """Draw microseconds over tokens, a panel a shape; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(r["shape"] for r in records))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.6), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for name in names:
            points = sorted(
                (r["tokens"], r["us"])
                for r in records
                if (r["shape"], r["kernel"]) == (shape, name) and "us" in r and r["tokens"] in tokens
            )
            axis.plot(*zip(*points, strict=True), marker="o", label=name) if points else None
        axis.set(xscale="log", yscale="log", title=shape, xlabel="tokens")
    axes[0][0].set_ylabel("microseconds")
    axes[0][-1].legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def report(data: dict, folder: Path) -> str:
    """Write a table and a plot for each regime and dtype below ``folder``; return what is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    what, stem = data.get("what", "W4A16"), data.get("stem", "int4_linear")
    (folder / f"{stem}.json").write_text(json.dumps(data, indent=1))
    parts = [data["header"]]
    for dtype, records in data["records"].items():
        for regime, tokens in data["regimes"].items():
            chosen = [r for r in records if r["tokens"] in tokens]
            names = [n for n in data["names"] if any(r["kernel"] == n and "us" in r for r in chosen)]
            if not names or names[0] != data["names"][0]:
                continue
            title = f"{what}, {regime}, {dtype}, group 128, microseconds"
            text = table(chosen, names, tokens, data["read_ceiling"]) + "\n\n" + ratios(chosen, names, tokens)
            name = f"{stem}_{regime.replace(' ', '_')}_{dtype}"
            (folder / f"{name}.md").write_text(f"# {title}\n\n{data['header']}\n\n{text}\n")
            try:
                plot(chosen, names, tokens, f"{title} ({data['device']})", folder / f"{name}.svg")
            except ImportError:
                parts.append("no plot: matplotlib is not installed")
            parts += [f"## {title}", text]
        parts += missing(records)
    return "\n\n".join(dict.fromkeys(parts))


@ends_quietly()
def main(
    what: str = "W4A16",
    stem: str = "int4_linear",
    description: str | None = __doc__,
    kernels: Kernels = KERNELS,
    all_regimes: Regimes = REGIMES,
    few_regimes: Regimes = QUICK,
) -> None:
    """Read the arguments, measure, report."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="bf16, the shapes of Llama 8B, fewer numbers of tokens")
    parser.add_argument("--shapes", nargs="*", type=parse_shape, metavar="NxK", help="Llama 8B and 70B by default")
    parser.add_argument("--tokens", nargs="*", type=int, help="of those that are measured, these alone")
    parser.add_argument("--dtypes", nargs="*", choices=("bfloat16", "float16"), help="of x, both by default")
    parser.add_argument("--kernels", nargs="*", choices=kernels, default=list(kernels))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further shape after this long")
    parser.add_argument("--draw", type=Path, help="write tables and plots from the JSON file of an earlier run")
    options = parser.parse_args()
    if options.draw:
        print(report(json.loads(options.draw.read_text()), options.out))
        return
    require_gpu()
    start = time.time()
    regimes = few_regimes if options.quick else all_regimes
    if options.tokens:
        chosen = {name: tuple(m for m in tokens if m in options.tokens) for name, tokens in regimes.items()}
        regimes = {name: tokens for name, tokens in chosen.items() if tokens}
    shapes = options.shapes or [*LLAMA_8B.values()] + ([] if options.quick else [*LLAMA_70B.values()])
    dtypes = options.dtypes or ["bfloat16"] + ([] if options.quick else ["float16"])
    tokens = [m for ms in regimes.values() for m in ms]
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    ceiling, device = read_ceiling(), torch.cuda.get_device_name()
    header = (
        f"{datetime.date.today()}, {device}, {', '.join(versions)}; read ceiling {ceiling / 1e12:.2f} TB/s, "
        f"copy {copy_ceiling() / 1e12:.2f} TB/s; python -m benchmarks.{stem}{' --quick' if options.quick else ''}"
    )
    records: dict[str, list[dict]] = {}
    data = {"header": header, "device": device, "read_ceiling": ceiling, "regimes": regimes, "records": records}
    data |= {"names": options.kernels, "what": what, "stem": stem}
    for dtype in dtypes:
        for outputs, inputs in shapes:
            if time.time() - start < options.seconds:
                found = measure(outputs, inputs, getattr(torch, dtype), tokens, options.kernels, kernels)
                print(lines_of(found), flush=True)
                records.setdefault(dtype, []).extend(found)
                text = report(data, options.out)
                torch.cuda.empty_cache()
    print(text)


if __name__ == "__main__":
    main()
