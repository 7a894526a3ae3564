"""How GPU kernels are timed: replays of a CUDA graph over enough copies of the weight to leave nothing in the L2."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

# More than three times the L2 of an H100.
ROTATED_BYTES = 160e6


def require_gpu() -> None:
    """End a command that measures a GPU where there is none."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"error: this measures a GPU, and torch {torch.__version__} can use none here: python -m qat.doctor says "
            "more"
        )


def copies(weight_bytes: float) -> int:
    """Return how many copies of a weight are rotated."""
    return max(2, int(ROTATED_BYTES // weight_bytes) + 1)


def graph_time(calls: Sequence[Callable[[], object]], milliseconds: float = 3.0, replays: int = 5) -> float:
    """Return the median time of a call in microseconds; each call of the sequence works on a copy of its own.

    One graph holds about ``milliseconds`` of calls, back to back, so that launches cost what they cost in a graph.
    """
    for call in calls[:2]:
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    once = max(start.elapsed_time(end) / len(calls), 4e-3)
    count = max(len(calls), min(200, int(milliseconds / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            calls[index % len(calls)]()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / count * 1e3)
    return sorted(times)[replays // 2]


@triton.jit
def _read_kernel(source_ptr, sums_ptr, BLOCK: tl.constexpr, LOADS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK * LOADS + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for load in tl.static_range(LOADS):
        total += tl.load(source_ptr + at + load * BLOCK)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


def read_ceiling() -> float:
    """Return the bytes a second that a kernel reads which does nothing else."""
    source = torch.randn(2**28, device="cuda")
    programs = source.numel() // (2048 * 8)
    sums = torch.empty(programs, device="cuda")
    time = graph_time([lambda: _read_kernel[(programs,)](source, sums, BLOCK=2048, LOADS=8, num_warps=8)], 15)
    return source.nbytes / time * 1e6


def copy_ceiling() -> float:
    """Return the bytes a second, read and written, of a copy within the device."""
    source = torch.randn(2**27, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_time([lambda: target.copy_(source)], 15) * 1e6
