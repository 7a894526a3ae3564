"""``python -m benchmarks.qat_step --out DIR``: what quantization-aware training costs, next to training as it is.

On one GPU it measures the optimizer step of a Llama-1B shape (W4 in groups of 128, and W4A8 with int8 tokens), eager
and compiled, against the plain model, LSQ as one writes it down in torch, and torchao's QAT if it is installed;
ResNet-50 in channels_last with W4A4; the kernels alone next to a copy; and, with ``--parts losses``, 500 steps on real
text with fused kernels and with the reference. It writes tables (Markdown and CSV) and one plot.

Times are medians of CUDA events after warm-up; memory is the peak of a step. Every variant runs in this one process, on
the same data. ``--small`` runs every piece on a CPU, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import qat
from benchmarks.models import Decoder, ResNet50, training_step
from benchmarks.peers import straightforward_lsq, torchao_qat
from qat.numerics import MIN_SCALE

LLAMA_1B = {"hidden": 2048, "layers": 16, "mlp": 8192, "vocabulary": 32000, "heads": 32}
SMALL = {"hidden": 128, "layers": 2, "mlp": 128, "vocabulary": 64, "heads": 4}
Row = dict[str, str | float]


def quantize(model: nn.Module, policy: qat.QuantPolicy, batch=None) -> tuple[nn.Module, Callable[[], None]]:
    """Return the prepared (and calibrated) model, and what a training loop does after each optimizer step."""
    model = qat.prepare(model, policy, verbose=False)
    if batch is not None:
        qat.calibrate(model, [batch], forward=lambda model, batch: model(batch))
    steps = [parameter for name, parameter in model.named_parameters() if name.endswith("step_size")]
    return model, torch.no_grad()(lambda: torch._foreach_clamp_min_(steps, MIN_SCALE))


def language_variants(round_input: bool) -> dict[str, Callable]:
    """Return {name: model -> (model, what follows a step)}; the head stays as it is, for all."""
    weight = qat.QuantSpec(bits=4, group_size=128)
    policy = qat.QuantPolicy(
        weight=weight, dynamic="int8_token" if round_input else None, rules=[{"match": "lm_head", "weight": None}]
    )

    def wanted(name: str) -> bool:
        return name != "lm_head"

    return {
        "plain": lambda model: (model, lambda: None),
        "qat": lambda model: quantize(model, policy),
        "LSQ in torch": lambda model: (straightforward_lsq(model, wanted, round_input), lambda: None),
        "torchao": lambda model: (torchao_qat(model, wanted, round_input), lambda: None),
    }


def measure(step: Callable[[], torch.Tensor], device: torch.device, warmup: int, repeats: int) -> tuple[float, float]:
    """Return the median milliseconds of a step and its peak gigabytes."""
    for _ in range(warmup):
        loss = step()
    if not torch.isfinite(loss):
        raise RuntimeError("the loss is not finite")
    if device.type != "cuda":
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


def rows_of(
    what: str,
    variants: dict[str, Callable],
    build: Callable[[], nn.Module],
    batch,
    modes: list[str],
    device: torch.device,
    autocast: torch.dtype | None = None,
    repeats: int = 12,
) -> Iterator[Row]:
    """Yield one row a variant and mode, with ratios to the plain model's."""
    for mode in modes:
        plain = None
        for name, change in variants.items():
            gc.collect()
            torch._dynamo.reset()
            row = {"what": what, "mode": mode, "variant": name}
            try:
                model, after = change(build())
                if mode == "compiled":
                    model.compile_parts(dynamic=False)
                ms, peak = measure(training_step(model, batch, autocast, after), device, 4, repeats)
            except ImportError as error:
                yield row | {"note": f"not installed: {error}"}
                continue
            except Exception as error:  # a peer's failure is a row, not the end of the table
                yield row | {"note": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
                continue
            finally:
                model = after = None
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            plain = plain or (ms, peak)
            yield row | {
                "ms": round(ms, 2),
                "GB": round(peak, 2),
                "time ratio": round(ms / plain[0], 4),
                "memory ratio": round(peak / plain[1], 4) if plain[1] else 0.0,
            }


def language_rows(device: torch.device, small: bool, modes: list[str]) -> Iterator[Row]:
    """Yield the rows of the Llama shape: W4, then W4A8."""
    shape = SMALL if small else LLAMA_1B
    tokens = torch.randint(shape["vocabulary"], (4, 17 if small else 2049), device=device)

    def build() -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            return Decoder(**shape).bfloat16()

    for what, round_input in (("W4 g128", False), ("W4A8", True)):
        yield from rows_of(what, language_variants(round_input), build, tokens, modes, device)


def vision_rows(device: torch.device, small: bool, modes: list[str]) -> Iterator[Row]:
    """Yield the rows of ResNet-50 in channels_last: bf16 autocast, W4A4, with 8 bits in the first and last layer."""
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
        "plain": lambda model: (model, lambda: None),
        "qat": lambda model: quantize(model, policy, batch),
    }
    yield from rows_of("ResNet-50 W4A4", variants, build, batch, modes, device, torch.bfloat16)


def write(rows: list[Row], out: Path, name: str) -> None:
    """Write rows as CSV and Markdown, and print the latter."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    lines = [f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
    lines += [f"| {' | '.join(str(row.get(key, '')) for key in keys)} |" for row in rows]
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def plot(rows: list[Row], file: Path) -> None:
    """Draw the time and memory ratios as bars."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    measured = [row for row in rows if "ms" in row and row["variant"] != "plain"]
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


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.qat_step", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/qat_step"), help="folder for tables and the plot")
    parser.add_argument("--parts", nargs="+", default=["kernels", "language", "vision"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--small", action="store_true", help="tiny shapes, on a CPU too")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}", flush=True)
    rows: list[Row] = []
    if "kernels" in options.parts:
        from benchmarks.fake_quant_kernels import kernel_rows

        write(list(kernel_rows(device, options.small)), options.out, "kernels")
    if "language" in options.parts:
        rows += language_rows(device, options.small, options.modes)
    if "vision" in options.parts:
        rows += vision_rows(device, options.small, options.modes)
    if rows:
        write(rows, options.out, "steps")
        plot(rows, options.out / "steps.svg")
    if "losses" in options.parts:
        from benchmarks.losses import loss_rows

        write(list(loss_rows(device, options.small)), options.out, "losses")


if __name__ == "__main__":
    main()
