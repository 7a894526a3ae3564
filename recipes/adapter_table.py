"""The losses of smollm2_adapters.py: each recipe's best, as a table, and next to what was asked for.

python recipes/adapter_table.py runs/smollm2_adapters/adapters.json       the table of results kept there
"""

import argparse
import json
import math
from importlib.util import find_spec
from pathlib import Path

from qat.broken_pipe import ends_quietly

LORA, QLORA, JOINT = "bf16 LoRA", "QLoRA", "joint LSQ + LoRA"
AFTER, TORCHAO = "LoRA then PTQ", "torchao QAT + LoRA"


def row(name: str, weights: str, lr: str, metrics: dict[str, float]) -> dict:
    """Return a line of the results."""
    return {"recipe": name, "weights": weights, "lr": lr, **{key: metrics[key] for key in ("loss", "perplexity")}}


def best(rows: list[dict]) -> list[dict]:
    """Return each recipe's row with the lowest loss, and in it the losses of its other learning rates."""
    found = {entry["recipe"]: entry for entry in sorted(rows, key=lambda entry: -entry["loss"])}
    for name, entry in found.items():
        others = [other for other in rows if other["recipe"] == name and other is not entry]
        entry["others"] = ", ".join(f"{other['lr']}: {other['loss']:.4f}" for other in others)
    return sorted(found.values(), key=lambda entry: entry["loss"])


def bars(chosen: list[dict]) -> list[str]:
    """Return what was asked for, what was found, and whether that is enough; of several starts or methods the best."""

    def first(name: str) -> dict | None:
        return next((entry for entry in chosen if entry["recipe"].startswith(name)), None)

    lines = []
    for ours, theirs, margin in ((QLORA, LORA, 0.01), (JOINT, AFTER, 0.0), (JOINT, TORCHAO, 0.0)):
        what = f"{ours} {f'within {margin:.0%} of' if margin else 'ahead of'} {theirs}"
        a, b = first(ours), first(theirs)
        if a is None or b is None:
            missing = " (torchao is not installed)" if theirs == TORCHAO and not find_spec("torchao") else ""
            lines.append(f"{what}: not measured{missing}")
            continue
        holds = a["loss"] <= b["loss"] * (1 + margin) if margin else a["loss"] < b["loss"]
        pair = f"{a['recipe']} {a['loss']:.4f}, {b['recipe']} {b['loss']:.4f}, {a['loss'] / b['loss'] - 1:+.2%}"
        lines.append(f"{what}: {pair}: {'holds' if holds else 'DOES NOT HOLD'}")
    return lines


def table(chosen: list[dict]) -> str:
    """Return the losses as a table of Markdown."""
    base = next((entry["loss"] for entry in chosen if entry["recipe"] == LORA), math.nan)
    lines = ["| recipe | what ships | lr | held-out loss | perplexity | to bf16 LoRA | other rates |"]
    lines.append("|---|---|---|---|---|---|---|")
    for entry in chosen:
        numbers = f"{entry['loss']:.4f} | {entry['perplexity']:.3f} | {entry['loss'] / base - 1:+.2%}"
        names = f"{entry['recipe']} | {entry['weights']} | {entry['lr']}"
        lines.append(f"| {names} | {numbers} | {entry['others']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with ends_quietly():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("results", type=Path, help="adapters.json, as smollm2_adapters.py writes it")
        chosen = best(json.loads(parser.parse_args().results.read_text())["rows"])
        print("\n".join([table(chosen), *bars(chosen)]))
