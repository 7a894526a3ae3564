"""The few operations that Inductor's code rounds otherwise than eager PyTorch, in a form that leaves it no choice.

Fused, bf16 and fp16 stay float32 between operations, a division is approximate on a GPU, and a product may contract
with the sum that follows. Either changes codes. Under Dynamo's tracing each function here takes operators that round
once and correctly whatever they are fused with; run eagerly, the plain operator.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(x: Tensor) -> Tensor:
    """Return x as its dtype holds it: a view as integers is what Inductor rounds for."""
    if x.dtype not in (torch.bfloat16, torch.float16) or not torch.compiler.is_dynamo_compiling():
        return x
    return (x.view(torch.int16) | 0).view(x.dtype)


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, rounded correctly, for float32 (or float64).

    Compiled, it is RN32(a * RN64(1 / b)). The product is within 2^-52 of a / b, and a quotient of float32 numbers is at
    least 2^-49 away from the middle of two (a - m b, with 25 bits in m, is a whole number of the last place of m b).
    """
    if a.dtype == torch.float64 or not torch.compiler.is_dynamo_compiling():
        return a / b
    return (a.double() * (1 / b.double())).float()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a * b, rounded before anything is added to it, for float32 (or float64); -0.0 may come out as +0.0.

    Compiled, it is RN32(a * b + 0), exact in float64 up to there. Without the zero LLVM sees that a float32 product
    would do, and contracts that with the sum that follows.
    """
    if a.dtype == torch.float64 or not torch.compiler.is_dynamo_compiling():
        return a * b
    return (a.double() * b.double() + 0.0).float()
