"""Which plans of ``int4_plans`` ``python -m benchmarks.tune`` times."""

from __future__ import annotations

from .int4_layout import INPUTS, ROWS
from .int4_plans import Batch, Decode, Dequantize, Int8, Plan, Stream, deepest, few


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
    if 1 < tokens <= 16 and capability == 90:
        for plan in few(tokens, -(-outputs // ROWS), -(-inputs // INPUTS), multiprocessors)[:3]:
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
    if capability == 90 and tokens > 8:
        plans += _narrow(tokens, outputs, early, multiprocessors)
        block_ms = [size for size in (16, 32, 64, 128) if size >= tokens][:1] or [128, 256]
        for block_m in block_ms:
            programs = -(-outputs // 128) * -(-tokens // block_m)
            splits = [s for s in (1, 2, 4, 8) if s == 1 or programs * s <= 4 * multiprocessors]
            splits = [s for s in splits if programs * s >= multiprocessors // 2] or splits[-1:]
            for split in splits:
                if block_m <= 64:
                    shapes = ((4, 8, 4, 2, 4, 1), (8, 8, 4, 2, 4, 4), (4, 8, 8, 2, 4, 2), (8, 16, 4, 2, 4, 2))
                elif block_m == 128:
                    shapes = ((4, 8, 2, 1, 4, 1), (8, 8, 4, 2, 4, 2), (8, 8, 4, 2, 4, 4), (8, 16, 2, 1, 5, 2))
                else:
                    shapes = ((8, 8, 2, 1, 4, 2), (8, 8, 4, 1, 4, 2))
                for warps, blocks, ahead, step, stages, in_flight in shapes:
                    plans.append(Batch(warps, blocks, block_m, ahead, step, stages, in_flight, split, early))
                own = {128: (8, 2, 4, 2), 256: (4, 1, 4, 2)}.get(block_m, (8, 2, 4, 4))
                plans.append(Batch(8, 8, block_m, *own, split, early, 1))
                if block_m <= 32:
                    plans.append(Batch(8, 8, block_m, 16, 4, 4, 4, split, early, 1))
                    plans.append(Batch(4, 8, block_m, 8, 2, 4, 2, split, early, 1))
    if tokens >= 64 or not plans:
        plans.append(Dequantize())
    return plans


def _narrow(tokens: int, outputs: int, early: int, multiprocessors: int) -> list[Batch]:
    """Return plans of 64 outputs a program, twice as many programs."""
    plans = []
    for block_m in [size for size in (32, 64, 128) if size >= tokens][:1] or [128]:
        programs = -(-outputs // 64) * -(-tokens // block_m)
        splits = [split for split in (1, 2, 4, 8) if split == 1 or programs * split <= 3 * multiprocessors]
        splits = [split for split in splits if programs * split >= multiprocessors // 2] or splits[-1:]
        for split in splits:
            plans += [Batch(4, 4, block_m, 8, 2, 4, in_flight, split, early, 1) for in_flight in (1, 2)]
    return plans


def int8_candidates(tokens: int) -> list[Int8]:
    """Return the plans worth timing: by the disassembly, those whose accumulators fit the registers (NOTES.md)."""
    plans = [Int8(8, 8, 64, 8, 4, 2), Int8(8, 8, 64, 16, 4, 2)]
    if tokens > 64:
        plans += [
            Int8(8, 8, 128, 8, 2, 2),
            Int8(8, 8, 128, 16, 2, 2),
            Int8(8, 8, 128, 8, 2, 0),
            Int8(4, 4, 128, 8, 2, 2),
        ]
    return plans
