"""One table of training runs, best first: ``python -m qat.compare FOLDER...``, of a run, a sweep, or all of runs/.

Columns are the overrides in which the runs differ, their metrics, bits per weight and bytes. Bytes are those of
the run's artifact/ where ``python -m qat.convert`` has made one, else, with a ~, about what its tensors will take.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .broken_pipe import ends_quietly
from .errors import DataError, QATError, did_you_mean
from .training.command_line import fail
from .training.result import read_result

OVERRIDES = Path(".hydra") / "overrides.yaml"
ARTIFACT = "artifact"
OF_ONE_RUN = ("name", "run_dir", "resume")  # overrides that say nothing of what was trained
SIZES = ("bits", "tensor_bytes", "artifact_bytes")
RISING = ("accuracy", "agreement")  # metrics of which more is better


@dataclass
class Run:
    """A finished run, or several that differ in what is averaged over.

    Attributes:
        folder: of the run, or of the first one.
        overrides: of the command line, by key.
        metrics: by name, a value a run.
        bits: per weight; None for an adapter.
        tensor_bytes: about what its tensors take; None for an adapter.
        artifact_bytes: of the files in artifact/; None where there is none.
    """

    folder: Path
    overrides: dict[str, str]
    metrics: dict[str, list[float]]
    bits: float | None
    tensor_bytes: int | None
    artifact_bytes: int | None


@ends_quietly()
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m qat.compare", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="holds runs, at any depth")
    parser.add_argument("--over", metavar="KEY", help="average over runs that differ in this key alone, such as seed")
    parser.add_argument("--markdown", action="store_true", help="print the table for a README")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every run there, with all of its overrides")
    options = parser.parse_args(argv)
    try:
        runs, unfinished = find_runs(options.folders)
        if options.csv is not None:
            write_csv(runs, options.csv)
        if options.over is not None:
            runs = averaged(runs, options.over)
    except QATError as error:
        fail(str(error))
    rows, common = rows_of(ordered(runs), options.over)
    print((as_markdown if options.markdown else as_text)(rows))
    if common:
        print(f"\nall with {' '.join(common)}")
    for folder in unfinished:
        print(f"no result yet: {folder}", file=sys.stderr)


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """Return the finished runs below some folders, and the folders of those that are not.

    Raises:
        DataError: a folder that is not there, or holds no finished run.
    """
    runs, unfinished = {}, []
    for folder in folders:
        found = sorted(path.parents[1] for path in folder.rglob(str(OVERRIDES)))
        if not found:
            what = "there is no such folder" if not folder.is_dir() else "there is no run of python -m qat.train in it"
            raise DataError(f"{folder}: {what}")
        for run_dir in found:
            result = read_result(run_dir)
            if result is None:
                unfinished.append(run_dir)
                continue
            files = [file for file in (run_dir / ARTIFACT).rglob("*") if file.is_file()]
            artifact = sum(file.stat().st_size for file in files) if files else None
            metrics = {name: [value] for name, value in result["metrics"].items()}
            size = result["bits_per_weight"], result["bytes"], artifact
            overrides = result["overrides"] or read_overrides(run_dir / OVERRIDES)  # older results hold none
            runs[run_dir.resolve()] = Run(run_dir, by_key(overrides), metrics, *size)
    if not runs:
        raise DataError(f"no run has come to its end yet: {', '.join(map(str, unfinished))}")
    return list(runs.values()), unfinished


def read_overrides(path: Path) -> list[str]:
    """Return the overrides that Hydra wrote."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def by_key(words: Sequence[str]) -> dict[str, str]:
    """Return overrides as {key: value}, without those that only name the run."""
    pairs = (word.lstrip("+").partition("=") for word in words)
    return {key: value for key, _, value in pairs if key not in OF_ONE_RUN}


def averaged(runs: Sequence[Run], over: str) -> list[Run]:
    """Return one run for all that differ in a key alone.

    A size in which they differ is None.

    Raises:
        DataError: no run has that key, or two differ in nothing, so that one would count twice.
    """
    known = list(dict.fromkeys(key for run in runs for key in run.overrides))
    if over not in known:
        raise DataError(f"--over {over}: no run was given {over}=VALUE{did_you_mean(over, known)}")
    groups: dict[tuple, Run] = {}
    members: dict[tuple, dict[str | None, Run]] = {}
    for run in runs:
        overrides = {key: value for key, value in run.overrides.items() if key != over}
        key = tuple(sorted(overrides.items()))
        twin = members.setdefault(key, {}).setdefault(run.overrides.get(over), run)
        if twin is not run:
            same = f"{over}={run.overrides[over]}" if over in run.overrides else f"no {over}"
            raise DataError(f"--over {over}: {twin.folder} and {run.folder} both have {same}: leave one of them out")
        if key not in groups:
            groups[key] = Run(run.folder, overrides, {}, run.bits, run.tensor_bytes, run.artifact_bytes)
        for size in SIZES:
            if getattr(groups[key], size) != getattr(run, size):
                setattr(groups[key], size, None)
        for name, values in run.metrics.items():
            groups[key].metrics.setdefault(name, []).extend(values)
    return list(groups.values())


def ordered(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, the best of the first metric first; those without it come last."""
    first = next(iter(runs[0].metrics), "")
    sign = -1 if first in RISING else 1

    def rank(run: Run) -> tuple[bool, float]:
        mean = statistics.fmean(run.metrics[first]) if first in run.metrics else float("nan")
        return mean != mean, sign * mean  # NaN last

    return sorted(runs, key=rank)


def rows_of(runs: Sequence[Run], over: str | None = None) -> tuple[list[list[str]], list[str]]:
    """Return the table, its heads first, and the overrides that all runs share."""
    keys = list(dict.fromkeys(key for run in runs for key in run.overrides))
    differ = [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]
    common = [f"{key}={runs[0].overrides[key]}" for key in keys if key not in differ]
    told_apart = len({tuple(run.overrides.get(key) for key in differ) for run in runs}) == len(runs) > 1
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    heads = [*([] if told_apart else ["run"]), *differ, *metrics, "bits/weight", "bytes"]
    rows = [[*heads, f"{over}s"] if over else heads]
    for run in runs:
        cells = [] if told_apart else [str(run.folder)]
        cells += [run.overrides.get(key, "-") for key in differ]
        cells += [_figure(run.metrics.get(name)) for name in metrics]
        cells.append("-" if run.bits is None else f"{run.bits:.2f}")
        size = "-" if run.tensor_bytes is None else f"~{run.tensor_bytes:,}"
        cells.append(size if run.artifact_bytes is None else f"{run.artifact_bytes:,}")
        if over:
            cells.append(str(max(len(values) for values in run.metrics.values())))
        rows.append(cells)
    return rows, common


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as a table of Markdown."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """Write a row a run: its folder, overrides, metrics and sizes.

    Raises:
        DataError: the file cannot be written.
    """
    rows = []
    for run in runs:
        values = {name: value for name, (value,) in run.metrics.items()}
        sizes = {"bits_per_weight": run.bits, "tensor_bytes": run.tensor_bytes, "artifact_bytes": run.artifact_bytes}
        rows.append({"run": str(run.folder), **run.overrides, **values, **sizes})
    heads = list(dict.fromkeys(name for row in rows for name in row))
    try:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, heads)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise DataError(f"--csv {path} cannot be written: {error.strerror}") from None


def _figure(values: Sequence[float] | None) -> str:
    if values is None:
        return "-"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


if __name__ == "__main__":
    main()
