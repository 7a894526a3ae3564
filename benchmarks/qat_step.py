"""``python -m benchmarks.qat_step --out DIR``: what quantization-aware training costs, next to training as it is.

On one GPU it measures the optimizer step of a Llama-1B shape (W4 in groups of 128, and W4A8 with int8 tokens), eager
and compiled, against the plain model, LSQ as one writes it down in torch, and torchao's QAT if it is installed;
ResNet-50 in channels_last with W4A4; the kernels alone next to a copy and their gradients next to float64; and 500
steps on real text with fused kernels, compiled, and with the reference. It writes tables (Markdown and CSV) and a plot,
after every row, so that a run cut short leaves what it found. ``--parts``, ``--modes`` and ``--variants`` run less.

Times are medians of CUDA events after warm-up; memory is the peak of a step. Every variant runs in this one process, on
the same data. ``--repeats 0`` only compiles, for the caches on disk. ``--small`` runs every piece on a CPU, to see that
it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import qat
from benchmarks.models import Decoder, ResNet50, training_step
from benchmarks.peers import straightforward_lsq, torchao_qat
from qat.backend import set_traced_rounding
from qat.broken_pipe import ends_quietly
from qat.numerics import MIN_SCALE

LLAMA_1B = {"hidden": 2048, "layers": 16, "mlp": 8192, "vocabulary": 32000, "heads": 32}
SMALL = {"hidden": 128, "layers": 2, "mlp": 128, "vocabulary": 64, "heads": 4}
BARS = {  # of the time ratio
    ("W4 g128", "eager"): 1.05,
    ("W4 g128", "compiled"): 1.02,
    ("W4A8", "eager"): 1.10,
    ("W4A8", "compiled"): 1.05,
    ("ResNet-50 W4A4", "eager"): 1.10,
    ("ResNet-50 W4A4", "compiled"): 1.10,
}
MEMORY_BAR = 1.02
Row = dict[str, str | float]


def quantize(model: nn.Module, policy: qat.QuantPolicy, batch=None) -> tuple[nn.Module, Callable[[], None]]:
    """Return the prepared (and calibrated) model, and what a training loop does after each optimizer step."""
    model = qat.prepare(model, policy, verbose=False)
    if batch is not None:
        qat.calibrate(model, [batch], forward=lambda model, batch: model(batch))
    steps = [parameter for name, parameter in model.named_parameters() if name.endswith("step_size")]
    return model, torch.no_grad()(lambda: torch._foreach_clamp_min_(steps, MIN_SCALE))


def setting(text: str) -> tuple[str, int | bool]:
    """Return ("key", 1) of "key=1", and True of "true"."""
    key, _, value = text.partition("=")
    return key, json.loads(value)


def language_variants() -> dict[tuple[str, str], Callable]:
    """Return {(what, variant): model -> (model, what follows a step)}; the head stays as it is, for all."""

    def wanted(name: str) -> bool:
        return name != "lm_head"

    def policy(round_input: bool) -> qat.QuantPolicy:
        return qat.QuantPolicy(
            weight=qat.QuantSpec(bits=4, group_size=128),
            dynamic="int8_token" if round_input else None,
            rules=[{"match": "lm_head", "weight": None}],
        )

    variants: dict[tuple[str, str], Callable] = {("Llama-1B shape", "plain"): lambda model: (model, lambda: None)}
    kinds = {"W4 g128": False, "W4A8": True}
    for what, rounds in kinds.items():
        variants[what, "qat"] = lambda model, rounds=rounds: quantize(model, policy(rounds))
    for what, rounds in kinds.items():
        variants[what, "torchao"] = lambda model, rounds=rounds: (torchao_qat(model, wanted, rounds), lambda: None)
        variants[what, "LSQ in torch"] = lambda model, rounds=rounds: (
            straightforward_lsq(model, wanted, rounds),
            lambda: None,
        )
    return variants


def measure(step: Callable[[], torch.Tensor], device: torch.device, warmup: int, repeats: int) -> tuple[float, float]:
    """Return the median milliseconds of a step and its peak gigabytes."""
    for _ in range(warmup if repeats else 1):
        loss = step()
    if not torch.isfinite(loss):
        raise RuntimeError("the loss is not finite")
    if device.type != "cuda" or not repeats:
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start), 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 1e9
    return statistics.median(start.elapsed_time(end) for start, end in times), peak


def profile(step: Callable[[], torch.Tensor], file: Path, device: torch.device) -> None:
    """Write what the kernels of two steps take."""
    kind = "CUDA" if device.type == "cuda" else "CPU"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.__members__[kind]]) as profiler:
        for _ in range(2):
            step().item()
    file.parent.mkdir(parents=True, exist_ok=True)
    order = "self_device_time_total" if kind == "CUDA" else "self_cpu_time_total"
    file.write_text(profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90))


def rows_of(
    variants: dict[tuple[str, str], Callable],
    build: Callable[[], nn.Module],
    batch,
    options: argparse.Namespace,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> Iterator[Row]:
    """Yield one row a variant and mode, with ratios to the plain model's, the first of the variants."""
    for mode in options.modes:
        plain = None
        for (what, name), change in variants.items():
            if options.variants and name not in options.variants:
                continue
            gc.collect()
            torch._dynamo.reset()
            row = {"what": what, "mode": mode, "variant": name}
            start = time.perf_counter()
            try:
                model, after = change(build())
                if mode == "compiled":
                    model.compile_parts(dynamic=False, options=dict(map(setting, options.inductor)))
                step = training_step(model, batch, autocast, after)
                ms, peak = measure(step, device, 4, options.repeats)
                if options.profile:
                    profile(step, options.out / f"{what} {mode} {name}.txt".replace(" ", "_"), device)
            except ImportError as error:
                yield row | {"note": f"not installed: {error}"}
                continue
            except Exception as error:  # a peer's failure is a row, not the end of the table
                yield row | {"note": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
                continue
            finally:
                model = after = step = None
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            row |= {"ms": round(ms, 2), "GB": round(peak, 2), "took, s": round(time.perf_counter() - start)}
            if name == "plain":
                plain = ms, peak
            if plain is not None:
                row["time ratio"] = round(ms / plain[0], 4)
                row["memory ratio"] = round(peak / plain[1], 4) if plain[1] else 0.0
            if plain is not None and name == "qat":
                row["time bar"], row["memory bar"] = BARS[what, mode], MEMORY_BAR
            yield row


def language_rows(device: torch.device, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of the Llama shape: plain, W4 and W4A8."""
    shape = SMALL if options.small else LLAMA_1B
    tokens = torch.randint(shape["vocabulary"], (4, 17 if options.small else 2049), device=device)

    def build() -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            return Decoder(**shape).bfloat16()

    yield from rows_of(language_variants(), build, tokens, options, device)


def vision_rows(device: torch.device, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of ResNet-50 in channels_last: bf16 autocast, W4A4, with 8 bits in the first and last layer."""
    small = options.small
    size, batch_size = (32, 2) if small else (224, 256)
    images = torch.randn(batch_size, 3, size, size, device=device).to(memory_format=torch.channels_last)
    batch = images, torch.randint(10 if small else 1000, (batch_size,), device=device)
    wide = {"weight": {"bits": 8}, "activation": {"bits": 8}}
    policy = qat.QuantPolicy(
        weight=qat.QuantSpec(bits=4, granularity="channel"),
        activation={"bits": 4},
        rules=[{"match": "stem", **wide}, {"match": "fc", **wide}],
    )

    def build() -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            model = ResNet50(10, 16, (1, 1, 1, 1)) if small else ResNet50()
        return model.to(memory_format=torch.channels_last)

    variants = {
        ("ResNet-50", "plain"): lambda model: (model, lambda: None),
        ("ResNet-50 W4A4", "qat"): lambda model: quantize(model, policy, batch),
    }
    yield from rows_of(variants, build, batch, options, device, torch.bfloat16)


def found(rows: Iterator[Row], out: Path, name: str, device: str, plotted: bool = False) -> None:
    """Print each row as it comes and write the table so far; a part that fails says so."""
    seen: list[Row] = []
    try:
        for row in rows:
            seen.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            write(seen, out, name, device)
    except Exception as error:  # the parts that follow still run
        print(f"{name}: {type(error).__name__}: {error}", flush=True)
    if seen:
        print((out / f"{name}.md").read_text(), flush=True)
        if plotted:
            plot(seen, out / f"{name}.svg")


def write(rows: list[Row], out: Path, name: str, device: str) -> None:
    """Write rows as CSV and Markdown."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    lines = [device, "", f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
    lines += [f"| {' | '.join(str(row.get(key, '')) for key in keys)} |" for row in rows]
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")


def plot(rows: list[Row], file: Path) -> None:
    """Draw the time and memory ratios as bars."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    measured = [row for row in rows if "time ratio" in row and row["variant"] != "plain"]
    if not measured:
        return
    figure = Figure(figsize=(9, 0.4 * len(measured) + 1.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = [f"{row['what']}, {row['mode']}, {row['variant']}" for row in measured]
    for axis, key in zip(axes, ("time ratio", "memory ratio"), strict=True):
        colours = ["C0" if row["variant"] == "qat" else "0.7" for row in measured]
        axis.barh(names, [row[key] for row in measured], color=colours)
        axis.axvline(1.0, color="0.3", linewidth=0.8)
        axis.set_xlim(0.9, None)
        axis.set_xlabel(f"{key} to the plain model")
        axis.invert_yaxis()
    axes[1].invert_yaxis()
    figure.savefig(file)


@ends_quietly()
def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.qat_step", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/qat_step"), help="folder for tables and the plot")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--variants", nargs="+", help="plain, qat, torchao, 'LSQ in torch'; all, if left out")
    parser.add_argument("--repeats", type=int, default=12, help="timed steps; 0 only compiles")
    parser.add_argument("--inductor", nargs="*", default=[], metavar="KEY=VALUE", help="options of torch.compile")
    parser.add_argument("--traced", action="store_true", help="see qat.backend.set_traced_rounding")
    parser.add_argument("--profile", action="store_true", help="also write what each variant's kernels take")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on a CPU too")
    options = parser.parse_args(argv)
    set_traced_rounding(options.traced)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    where = f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}"
    print(where, flush=True)
    for part in options.parts:
        found(PARTS[part](device, options), options.out, part, where, part in ("language", "vision"))


def kernel_part(device: torch.device, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of benchmarks.fake_quant_kernels, which needs Triton."""
    from benchmarks.fake_quant_kernels import kernel_rows

    yield from kernel_rows(device, options.small)


def loss_part(device: torch.device, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of benchmarks.losses."""
    from benchmarks.losses import loss_rows

    yield from loss_rows(device, options.small)


PARTS = {"language": language_rows, "vision": vision_rows, "kernels": kernel_part, "losses": loss_part}


if __name__ == "__main__":
    main()
