"""Measure which int4 kernel is fastest on this GPU: python -m benchmarks.tune [--what int8] [--shapes NxK ...]

What x is, --what says: bfloat16, float16, or int8 codes. Writes the table that ``qat.kernels.int4_plans`` looks into
first (its ``cache_path()``, unless --out names a file). Kernels are compiled by all processor cores beforehand; the
timing is that of benchmarks/timing.py, without the rounding of x to codes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from qat.kernels import int4_candidates, int4_plans, int8_run
from qat.kernels.int4_layout import Int4Weight
from qat.kernels.int4_run import run_plan
from qat.kernels.int8_codes import int8_codes
from qat.kernels.int8_linear import row_sums
from torch import Tensor

from benchmarks.problem import LLAMA_8B, LLAMA_70B, Problem, parse_shape
from benchmarks.timing import graph_time, require_gpu
from qat.broken_pipe import ends_quietly
from qat.quantizers.dynamic import round_dynamic
from qat.spec import Dynamic

Plan = int4_plans.Plan | int4_plans.Int8
INT8_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def device() -> tuple[str, int, int]:
    """Return what ``int4_plans.choose`` takes about the GPU."""
    found = torch.cuda.get_device_properties(0)
    return found.name, found.major * 10 + found.minor, found.multi_processor_count


def runner(x: Tensor, weight: Int4Weight, int8: bool) -> Callable[[Plan, Int4Weight], Tensor]:
    """Return what multiplies x by a plan and a weight that is like ``weight``."""
    if not int8:
        return lambda plan, w: run_plan(plan, x, w, None)
    codes, sums = int8_codes(x, None), row_sums(weight)
    return lambda plan, w: int8_run.run_plan(plan, codes, w, sums, None, x.dtype)


def compile_plan(case: tuple) -> str | None:
    """Run one plan on its shape once, which leaves the kernel in Triton's cache; return what went wrong."""
    plan, tokens, outputs, inputs, dtype = case
    try:
        problem = Problem.random(outputs, inputs, dtype, rotated=False)
        x = torch.randn(tokens, inputs, device="cuda", dtype=dtype)
        runner(x, problem.weights[0], isinstance(plan, int4_plans.Int8))(plan, problem.weights[0])
        torch.cuda.synchronize()
    except Exception as error:
        return f"{plan} {tokens} {outputs}x{inputs}: {error!r}"[:300]
    return None


def _kernel(plan: Plan) -> Plan:
    """Return a plan of the same kernel that runs on weights of any size."""
    return plan._replace(unsplit=0) if isinstance(plan, int4_plans.Batch) else plan


def compile_all(plans: dict[tuple[int, int, int], list[Plan]], dtype: torch.dtype) -> list[str]:
    """Compile the kernels of all plans, given by (tokens, outputs, inputs); return a line a failure, and the time."""
    # A kernel depends on the shape through what divides it alone: one small weight compiles for many.
    # The longest K has as many rounds as any plan has parts.
    longest = max((k for _, _, k in plans if k % 4096 == 0), default=0)
    inputs = {k: longest if k % 4096 == 0 else k for _, _, k in plans}
    kernels = {(m, n, k): {_kernel(plan) for plan in of_case} for (m, n, k), of_case in plans.items()}
    cases = {(plan, inputs[k]): (plan, m, 256, inputs[k], dtype) for (m, _, k), ps in kernels.items() for plan in ps}
    start = time.time()
    with multiprocessing.get_context("spawn").Pool() as pool:
        lines = [line for line in pool.imap_unordered(compile_plan, cases.values()) if line]
    lines.append(f"{len(cases)} kernels compiled in {time.time() - start:.0f} s")
    return lines


def tune(shapes: list[tuple[int, int]], tokens: tuple[int, ...], what: str = "bfloat16") -> tuple[dict, list[str]]:
    """Return the table for this device, and a line a measurement."""
    name, *limits = device()
    int8, dtype = what == "int8", torch.float16 if what == "float16" else torch.bfloat16
    plans: dict[tuple[int, int, int], list[Plan]] = {
        (m, n, k): int4_candidates.int8_candidates(m, limits[1])
        if int8
        else int4_candidates.candidates(m, n, k, *limits)
        for n, k in shapes
        for m in tokens
    }
    lines = compile_all(plans, dtype)
    table: dict[str, dict] = {}
    for n, k in shapes:
        problem = Problem.random(n, k, dtype)
        dense = problem.dense().double() if n * k <= 2**26 else None
        for m in tokens:
            x = (torch.randn(m, k, device="cuda") * 0.1).to(dtype)
            run = runner(x, problem.weights[0], int8)
            rounded = round_dynamic(x.float(), Dynamic.int8_token) if int8 else x
            exact = None if dense is None else rounded.double() @ dense.T
            times: dict[Plan, float] = {}
            # The first one is timed twice, since a GPU that was idle is slower for a while: what is last counts.
            for plan in [plans[m, n, k][0], *plans[m, n, k]]:
                try:
                    y = run(plan, problem.weights[0])
                    error = 0.0 if exact is None else ((y - exact).norm() / exact.norm()).item()
                    if not error < 4e-3:
                        lines.append(f"WRONG {n}x{k} M={m} {plan}: {error}")
                        continue
                    calls = [partial(run, plan, w) for w in problem.weights]
                    times[plan] = graph_time(calls, milliseconds=1.5, replays=3)
                except Exception as failure:
                    lines.append(f"FAILED {n}x{k} M={m} {plan}: {failure!r}"[:300])
            fastest = sorted(times, key=times.__getitem__)
            chosen = int4_plans.heuristic(m, n, k, *limits)
            if int8:
                chosen = int4_plans.int8_heuristic(m, n, limits[1])
            lines.append(
                f"{n}x{k} M={m}: "
                + "  ".join(f"{times[plan]:.1f} {int4_plans.plan_to_json(plan)}" for plan in fastest)
                + f"  (heuristic {times.get(chosen)} {chosen})"
            )
            if fastest:
                table.setdefault(int4_plans.plan_name(n, k, what), {})[str(m)] = int4_plans.plan_to_json(fastest[0])
    return {name: table}, lines


@ends_quietly()
def main() -> None:
    """Read the arguments, tune, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", type=parse_shape, metavar="NxK", help="Llama 8B and 70B by default")
    parser.add_argument("--tokens", nargs="*", type=int)
    parser.add_argument("--what", choices=("bfloat16", "float16", "int8"), default="bfloat16", help="of x")
    parser.add_argument("--out", type=Path, default=int4_plans.cache_path())
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    require_gpu()
    shapes = options.shapes or [*LLAMA_8B.values(), *LLAMA_70B.values()]
    tokens = options.tokens or (INT8_TOKENS if options.what == "int8" else TOKENS)
    table, lines = tune(shapes, tuple(tokens), options.what)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for name, by_shape in table.items():
        known.setdefault(name, {}).update(by_shape)
    options.out.write_text(json.dumps(known, indent=1) + "\n")
    if options.log:
        options.log.write_text("\n".join(lines) + "\n")
    print("\n".join(line[:200] for line in lines))


if __name__ == "__main__":
    main()
