"""W4A8 and W4A4 matmul beside cuBLAS and torch's int8 matmul: python -m benchmarks.int8_linear [--quick]

Tables and plots as of benchmarks/int4_linear.py, for prefill. What is timed takes bf16 and gives bf16, its rounding
included, unless the name says "alone"; ``torch._int_mm``, int8 by int8 to int32 with neither rounding nor scales, shows
what the int8 units give. The bar is 1.3 times the speed of cuBLAS in bf16 from 1024 tokens on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from qat.kernels.int4_layout import Int4Weight
from qat.kernels.int4_linear import int4_linear
from qat.kernels.int8_codes import int8_codes
from qat.kernels.int8_linear import int8_linear, row_sums
from qat.kernels.int8_run import plan_for, run_plan
from torch import Tensor

from benchmarks.int4_linear import main
from benchmarks.problem import Calls, Kernels, Problem, cublas, ours
from benchmarks.timing import copies
from qat.quantizers.dynamic import round_dynamic
from qat.spec import Dynamic

REGIMES = {"prefill": (256, 512, 1024, 2048, 4096, 8192)}
QUICK = {"prefill": (256, 512, 1024, 4096)}


def w4a8(problem: Problem) -> Calls:
    """int8_linear, as a frozen layer trained with int8_token calls it."""
    sums = row_sums(problem.weights[0])
    return [lambda x, w=w: int8_linear(x, w, sums, None) for w in problem.weights]


def w4a4(problem: Problem) -> Calls:
    """int8_linear, as a frozen layer with a trained 4-bit scale of its inputs calls it."""
    sums, scale = row_sums(problem.weights[0]), torch.tensor([[0.05]], device=problem.scale.device).bfloat16()
    return [lambda x, w=w: int8_linear(x, w, sums, scale, 4) for w in problem.weights]


def product_alone(problem: Problem) -> Calls:
    """The product of int8_linear, with the codes of x made before."""
    sums, codes_of = row_sums(problem.weights[0]), _once(lambda x: int8_codes(x, None))

    def call(x: Tensor, w: Int4Weight) -> Tensor:
        return run_plan(plan_for(x.shape[0], w), codes_of(x), w, sums, None, x.dtype)

    return [lambda x, w=w: call(x, w) for w in problem.weights]


def codes_alone(problem: Problem) -> Calls:
    """The rounding of x to int8 codes for each token."""
    return [lambda x: int8_codes(x, None).codes for _ in problem.weights]


def rounded_w4a16(problem: Problem) -> Calls:
    """The path of fewer tokens: round the input to int8 and back, then int4_linear."""
    return [lambda x, w=w: int4_linear(round_dynamic(x, Dynamic.int8_token), w) for w in problem.weights]


def int_mm(problem: Problem) -> Calls:
    """int8 by int8 to int32, with the codes of both made before."""
    weights = [problem.codes, *(problem.codes.clone() for _ in range(copies(problem.codes.nbytes) - 1))]
    codes_of = _once(lambda x: (x * 100).to(torch.int8))
    return [lambda x, w=w: torch._int_mm(codes_of(x), w.t()) for w in weights]


def _once(make: Callable) -> Callable:
    """Return a function that makes of the last x it met what ``make`` does, once."""
    last: list = [None, None]

    def made(x: Tensor):
        if last[0] is not x:
            last[:] = x, make(x)
        return last[1]

    return made


KERNELS: Kernels = {
    "qat W4A8": w4a8,
    "qat W4A4": w4a4,
    "product alone": product_alone,
    "codes alone": codes_alone,
    "qat int8 rounding + W4A16": rounded_w4a16,
    "qat W4A16": ours,
    "cuBLAS": cublas,
    "torch._int_mm": int_mm,
}


if __name__ == "__main__":
    main("W4A8 and W4A4", "int8_linear", __doc__, KERNELS, REGIMES, QUICK)
