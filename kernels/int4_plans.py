"""Which int4 kernel runs for M tokens on an N x K weight: a table for known GPUs, a heuristic for all others.

There is no search at run time. ``python -m benchmarks.tune`` measures ``int4_candidates`` on the GPU at hand and
writes a table to ``cache_path()``, which goes before the one that ships in ``int4_plans.json``. A table is found by
the name of the device, a plan by "NxK" and by the smallest listed number of tokens that is not below M: up to 8 tokens
by no more than 8, and one by itself alone. What was timed with fp16 or int8 codes has that behind the name, "NxK
float16", and fp16 takes what bf16 has where it has nothing.
"""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .int4_layout import INPUTS, ROWS

PLANS_VERSION = 3  # of what a table lists


class Decode(NamedTuple):
    """Constants of ``int4_decode.decode_kernel``."""

    warps: int
    blocks: int
    block_m: int
    tiles: int
    stages: int
    early: int


class Stream(NamedTuple):
    """Constants of ``int4_stream.stream_kernel``, and how many programs run, at most one a multiprocessor."""

    warps: int
    tiles: int
    stages: int
    programs: int
    early: int

    def shared_bytes(self, tiles: int) -> int:
        """Return the shared memory of a program, for rows of so many K tiles, with a 16-bit scale for each tile."""
        span = self.warps * self.tiles
        ring = self.stages * span * (ROWS * INPUTS // 2 + ROWS * 2)
        return ring + -(-tiles // span) * span * INPUTS * 2 + self.warps * ROWS * 4


class Few(NamedTuple):
    """Constants of ``int4_few.few_kernel``, how many parts K is shared out to, and how many programs a part has."""

    warps: int
    tiles: int
    stages: int
    programs: int
    split: int
    early: int


class Batch(NamedTuple):
    """Constants of ``int4_batch.batch_kernel``, and what it is launched with.

    Attributes:
        unsplit: how many blocks of outputs, the first ones, are not split.
        programs: how many run at the most, each with several items; 0 for as many as there are items.
    """

    warps: int
    block_m: int
    tiles: int
    step: int
    stages: int
    split: int
    early: int
    unsplit: int = 0
    programs: int = 0


class Dequantize(NamedTuple):
    """Dequantize the whole weight, then use the library's matmul."""


class Int8(NamedTuple):
    """Constants of ``int8_batch.int8_batch_kernel``, and how many programs run, at most one a multiprocessor."""

    block_m: int
    stages: int
    programs: int


Plan = Decode | Stream | Few | Batch | Dequantize
_KINDS = {"decode": Decode, "stream": Stream, "few": Few, "batch": Batch, "dequantize": Dequantize, "int8": Int8}

# For any number of tokens, where a token's result must not depend on how many there are (``qat.backend``).
ANY_TOKENS = Batch(8, 64, 8, 2, 4, 1, 2)

# Shared memory of a program that leaves room for one of the next kernel, on Hopper; and all of it, less what scales in
# float32, or for every 32 inputs, take beside those that are counted.
RESIDENT_BYTES = 113 * 1024
SHARED_BYTES = 208 * 1024
# K tiles that a program reads for one token, from which on a deeper ring is worth more than that room.
LONG = 1000
MOST_STAGES = 3  # more was slower, of few row blocks and of many

MOST_PARTS = 8  # of K, for few tokens

# Beyond this many tokens the library's matmul hides the dequantization, whatever the shape.
MANY_TOKENS = 4096
# With a table of levels the kernel does more for each weight and product, and gives way earlier.
MANY_TOKENS_BY_TABLE = 2048


def choose(
    tokens: int,
    outputs: int,
    inputs: int,
    device_name: str,
    capability: int,
    multiprocessors: int,
    kind: str = "bfloat16",
) -> Plan:
    """Return the plan for M tokens on an NVIDIA GPU of compute capability ``capability`` (90 for 9.0).

    ``kind`` is the dtype of x, bfloat16 or float16.
    """
    listed = None
    for name in dict.fromkeys((plan_name(outputs, inputs, kind), plan_name(outputs, inputs))):
        listed = _listed(device_name, name, tokens) if listed is None else listed
    return heuristic(tokens, outputs, inputs, capability, multiprocessors) if listed is None else listed


def choose_int8(tokens: int, outputs: int, inputs: int, device_name: str, multiprocessors: int) -> Int8:
    """Return the plan for the codes of M tokens on a Hopper GPU."""
    listed = _listed(device_name, plan_name(outputs, inputs, "int8"), tokens)
    return int8_heuristic(tokens, outputs, multiprocessors) if listed is None else listed


def plan_name(outputs: int, inputs: int, kind: str = "bfloat16") -> str:
    """Return the name that a table lists plans under, for bfloat16, float16 or int8."""
    return f"{outputs}x{inputs}" + ("" if kind == "bfloat16" else f" {kind}")


def _listed(device_name: str, name: str, tokens: int) -> Plan | Int8 | None:
    for table in (_user_table(), _shipped_table()):
        by_tokens = table.get(device_name, {}).get(name, {})
        # One token has a kernel of its own, and so have 2 to 8: what is listed for more says nothing about them.
        most = next((most for most in (1, 8) if tokens <= most), math.inf)
        fitting = sorted(int(bound) for bound in by_tokens if tokens <= int(bound) <= most)
        if fitting:
            return plan_from_json(by_tokens[str(fitting[0])])
    return None


def heuristic(tokens: int, outputs: int, inputs: int, capability: int, multiprocessors: int) -> Plan:
    """Return a plan from the shape alone, after what was measured on an H100 and an H200 (benchmarks/NOTES.md)."""
    blocks, tiles = -(-outputs // ROWS), -(-inputs // INPUTS)
    hopper = capability == 90
    if tokens == 1 and hopper:
        plan = _stream(blocks, tiles, multiprocessors)
        if plan is not None:
            return plan
    if tokens <= 8 and hopper:
        plans = few(blocks, tiles, multiprocessors)
        if plans:
            return plans[0]
    if tokens <= 8 or (tokens <= 16 and not hopper):
        return _decode(8 if tokens <= 8 else 16, blocks, capability, multiprocessors)
    if not hopper or tokens > MANY_TOKENS:
        return Dequantize()
    if tokens > 64:
        return _large_batch(tokens, blocks, tiles, multiprocessors)
    block_m, narrow = next(size for size in (16, 32, 64) if size >= tokens), -(-blocks // 4)
    if block_m == 64 and tiles > 256:
        return Batch(8, 64, 8, 2, 4, _parts(-(-blocks // 8), 1.9 * multiprocessors, tiles), 2)
    if narrow > (3 if block_m == 64 else 2.4) * multiprocessors:
        if block_m == 64 or narrow <= 5 * multiprocessors:
            return Batch(8, block_m, 8, 2, 4, 1, 1)
        plan = Batch(4, block_m, 8, 2, 4, 1, 2)
        options = shared_out(plan, tokens, blocks, tiles, 5 * multiprocessors) if block_m == 16 else []
        return next((option for option, *_ in options if option.unsplit), plan._replace(early=1))
    # 64 outputs a program, of which several run side by side; with fewer tiles ahead, five.
    if block_m < 64 and multiprocessors < narrow <= 1.25 * multiprocessors and tiles >= 64:
        return Batch(4, block_m, 4, 1, 4, 4, 2)
    split = _parts(narrow, (1.9 if block_m == 64 else 2.4) * multiprocessors, tiles)
    return Batch(4, block_m, 8, 2, 4, split, 2)


def _parts(programs: int, wanted: float, tiles: int) -> int:
    """Return how many parts of K make enough programs, each of 16 tiles or more."""
    return next((split for split in (1, 2, 4) if programs * split >= wanted or tiles < 32 * split), 8)


def _decode(block_m: int, blocks: int, capability: int, multiprocessors: int) -> Decode:
    """Return a plan that needs as little as 99 KiB of shared memory; nothing measured."""
    shape = (8, 1) if blocks <= 3 * multiprocessors else (4, 2)
    return Decode(*shape, block_m, 32 // block_m, 2, 2 if capability >= 90 else 0)


def _large_batch(tokens: int, blocks: int, tiles: int, multiprocessors: int) -> Batch:
    """Return the plan that takes least: by the microseconds of a K tile, of a program, and of adding up parts of K.

    They were measured on an H200, where what it takes is within 2 % of the best plan in 31 of 32 cases of 128 to 1024
    tokens.
    """
    kinds = [(0.323, Batch(8, 128, 8, 2, 4, 1, 2)), (0.215, Batch(4, 128, 8, 2, 4, 1, 2))]
    if tokens > 128:
        kinds.append((0.626, Batch(8, 256, 4, 1, 4, 1, 2)))
    options = []
    for of_tile, kind in kinds:
        for plan, programs, in_a_row in shared_out(kind, tokens, blocks, tiles, multiprocessors):
            in_parts = 4 * plan.split * tokens * (blocks - plan.unsplit * plan.warps) * ROWS if plan.split > 1 else 0
            options.append((in_a_row * of_tile + 2 * programs + 0.57e-6 * in_parts, plan))
    return min(options, key=lambda option: option[0])[1]


def shared_out(plan: Batch, tokens: int, blocks: int, tiles: int, multiprocessors: int) -> list[tuple[Batch, int, int]]:
    """Return the plan with sums over K in one part, in several, and in several where they would start a last round.

    With each comes how many programs, and how many K tiles of them, a multiprocessor has, if it runs one at a time.
    Parts are of 16 tiles or more, and all run at once.
    """
    along_m, along_n, steps = -(-tokens // plan.block_m), -(-blocks // plan.warps), -(-tiles // plan.tiles)
    rounds = -(-along_m * along_n // multiprocessors)
    several = multiprocessors if plan.block_m == 256 and rounds > 1 else 0  # it pays where a round takes long
    options = [(plan._replace(programs=several), rounds, rounds * tiles)]
    for unsplit in sorted({0, along_m * along_n // multiprocessors * multiprocessors // along_m}):
        rounds = -(-along_m * unsplit // multiprocessors)
        free = (rounds + 1) * multiprocessors - along_m * unsplit
        for split in (2, 3, 4):
            if unsplit < along_n and along_m * (along_n - unsplit) * split <= free and tiles >= 16 * split:
                in_parts = plan._replace(split=split, unsplit=unsplit, programs=several)
                options.append((in_parts, rounds + 1, rounds * tiles + -(-steps // split) * plan.tiles))
    return options


def band(inputs: int, block_m: int) -> int:
    """Return how many blocks of 16-bit tokens a band has (see ``bands``): as many as stay in the L2 cache.

    All programs read a band's tokens again and again, and each band the whole weight.
    """
    return max(1, 16 * 2**20 // (2 * inputs * block_m))


def _stream(row_blocks: int, tiles: int, multiprocessors: int) -> Stream | None:
    """Return the plan for one token; None where x and a ring are too large for it."""
    blocks, ahead = -(-row_blocks // multiprocessors), next((ahead for ahead in (1, 2, 4, 8) if 8 * ahead >= tiles), 4)
    deep = Stream(8, 8, MOST_STAGES, multiprocessors, 3)
    if blocks * tiles >= LONG and tiles > 32 and deep.shared_bytes(tiles) <= SHARED_BYTES:
        return deep
    plan = deepest(deep._replace(tiles=ahead, early=1), tiles)
    if plan is None:
        return None
    steps = blocks * -(-tiles // (8 * ahead))
    # A ring that holds all of it is full when x comes, and the next kernel's would only delay x.
    return plan._replace(stages=max(2, min(plan.stages, steps)), early=3 if steps <= plan.stages else 1)


def deepest(plan: Stream, tiles: int) -> Stream | None:
    """Return the plan with as many stages as leave room for a second program; None if they are too few."""
    none = plan._replace(stages=0).shared_bytes(tiles)
    stages = min(MOST_STAGES, (RESIDENT_BYTES - none) // (plan._replace(stages=1).shared_bytes(tiles) - none))
    return plan._replace(stages=stages) if stages >= 2 else None


def few(row_blocks: int, tiles: int, multiprocessors: int) -> list[Few]:
    """Return the plans for 2 to 8 tokens, by what they take: counted in K tiles that a multiprocessor reads.

    A row block costs ten beside its tiles; x, which each program loads, four for each tile; a sum of parts 200
    (measured on an H200, where a tile takes 16 ns).
    """
    plans = []
    for warps, ahead in ((8, 8), (8, 4), (8, 2), (8, 1), (16, 8)):
        span = warps * ahead
        split = -(-tiles // span)
        if split > min(MOST_PARTS, multiprocessors):
            continue
        programs = multiprocessors // split
        blocks = -(-row_blocks // programs)
        stages = max(2, min(blocks, MOST_STAGES if span <= 64 else 2))
        early = 3 if blocks <= stages else 2 if split > 1 else 1
        cost = blocks * (span + 10) + 4 * span + (200 if split > 1 else 0)
        plans.append((cost, Few(warps, ahead, stages, programs, split, early)))
    return [plan for _, plan in sorted(plans)]


def int8_heuristic(tokens: int, outputs: int, multiprocessors: int) -> Int8:
    """Return a plan from the shape alone: an item of 64 tokens takes 0.65 of the time of one of 128, on an H200."""

    def rounds(block_m: int) -> int:
        return -(-(-(-outputs // 128) * -(-tokens // block_m)) // multiprocessors)

    if rounds(64) * 0.65 < rounds(128):
        return Int8(64, 8, multiprocessors)
    return Int8(128, 6, multiprocessors)


def plan_to_json(plan: Plan | Int8) -> list:
    """Return ["decode" | "batch" | "dequantize" | "int8", constants...]."""
    return [type(plan).__name__.lower(), *plan]


def plan_from_json(values: list) -> Plan | Int8:
    """Undo ``plan_to_json``."""
    return _KINDS[values[0]](*values[1:])


def cache_path() -> Path:
    """Return where ``benchmarks.tune`` writes, and ``choose`` looks first; QAT_CACHE moves it."""
    root = os.environ.get("QAT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qat"
    return Path(root) / f"int4_plans_v{PLANS_VERSION}.json"


@cache
def _user_table() -> dict:
    return _read(cache_path())


@cache
def _shipped_table() -> dict:
    return _read(Path(__file__).with_name("int4_plans.json"))


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}
