"""Which plans of ``int4_plans`` ``python -m benchmarks.tune`` times."""

from __future__ import annotations

from .int4_layout import INPUTS, ROWS
from .int4_plans import (
    MOST_STAGES,
    SHARED_BYTES,
    Batch,
    Decode,
    Dequantize,
    Int8,
    Plan,
    Stream,
    deepest,
    few,
    shared_out,
)


def candidates(tokens: int, outputs: int, inputs: int, capability: int, multiprocessors: int) -> list[Plan]:
    """Return the plans worth timing."""
    early = 2 if capability >= 90 else 0
    plans: list[Plan] = []
    if tokens == 1 and capability == 90:
        k_tiles = -(-inputs // INPUTS)
        for tiles, start in ((8, 1), (8, 2), (8, 3), (4, 1), (4, 2), (4, 3)):
            plan = deepest(Stream(8, tiles, 0, multiprocessors, start), k_tiles)
            if plan is not None:
                plans += [plan._replace(stages=stages) for stages in {plan.stages, max(2, plan.stages - 1)}]
        deep = Stream(8, 8, MOST_STAGES, multiprocessors, 3)
        if deep not in plans and deep.shared_bytes(k_tiles) <= SHARED_BYTES:
            plans.append(deep)
    if 1 < tokens <= 8 and capability == 90:
        for plan in few(-(-outputs // ROWS), -(-inputs // INPUTS), multiprocessors)[:3]:
            plans += [plan._replace(early=start) for start in (1, 2, 3)]
    if tokens <= 8:
        for warps, blocks, ahead in ((8, 1, 4), (16, 1, 4), (8, 2, 4), (4, 4, 2), (4, 2, 4), (4, 1, 8)):
            plans += [Decode(warps, blocks, 8, ahead, stages, early) for stages in (0, 2)]
            if early:  # an early start pays where it cannot stack programs on a few multiprocessors
                plans += [Decode(warps, blocks, 8, ahead, stages, start) for stages, start in ((0, 1), (0, 0), (3, 1))]
    elif tokens <= 16:
        plans += [
            Decode(*shape, early)
            for shape in ((8, 2, 16, 2, 3), (8, 1, 16, 4, 2), (4, 4, 16, 2, 2), (16, 1, 16, 2, 2), (4, 8, 16, 1, 2))
        ]
    if capability == 90 and tokens > 1:
        plans += _batches(tokens, -(-outputs // ROWS), -(-inputs // INPUTS), early, multiprocessors)
    if tokens >= 64 or not plans:
        plans.append(Dequantize())
    return plans


def _batches(tokens: int, blocks: int, tiles: int, early: int, multiprocessors: int) -> list[Batch]:
    plans = []
    if tokens > 64:
        for kind in ((4, 128, 8, 2, 4), (8, 128, 8, 2, 4), (8, 256, 4, 1, 4)):
            if kind[1] < 2 * tokens:
                options = shared_out(Batch(*kind, 1, early), tokens, blocks, tiles, multiprocessors)
                plans += [plan for plan, *_ in options]
        return plans
    block_m = next(size for size in (8, 16, 32, 64) if size >= tokens)
    for warps, ahead, step in ((4, 8, 2), (8, 8, 2), (8, 16, 4), (4, 4, 1)):
        programs = -(-blocks // warps)
        splits = [s for s in (1, 2, 4, 8) if s == 1 or (programs * s <= 5 * multiprocessors and s * ahead <= tiles)]
        splits = [s for s in splits if programs * s >= multiprocessors // 2] or splits[-1:]
        if ahead == 16 and block_m == 64:
            continue
        kind = Batch(warps, block_m, ahead, step, 4, 1, early)
        plans += [kind._replace(split=split) for split in splits]
        if 1 in splits:
            plans.append(kind._replace(early=1))
            for side_by_side in (2, 3, 4, 5):  # programs on a multiprocessor, of which the last wave is in parts
                options = shared_out(kind, tokens, blocks, tiles, side_by_side * multiprocessors)
                plans += [plan for plan, *_ in options if plan.unsplit]
    return list(dict.fromkeys(plans))


def int8_candidates(tokens: int, multiprocessors: int) -> list[Int8]:
    """Return the plans worth timing."""
    kinds = ((64, 6), (64, 8), (128, 4), (128, 6))
    return [Int8(*kind, multiprocessors) for kind in kinds if kind[0] < 2 * tokens or kind[0] == 64]
