"""What quantized layers run on, by one rule: fused Triton kernels, or the torch reference.

Kernels run on CUDA, ROCm and XPU devices where Triton is installed, for bf16, fp16 and fp32. Everything else is the
reference: a CPU, float64, and tensors that stand for others (fake, functional, distributed), which only aten can take.
Both give the same bits, eager, compiled and captured in a CUDA graph alike.

A frozen layer's kernel is chosen by the number of tokens, and sums in another order then. ``set_batch_invariant`` gives
that up for results that do not depend on it. ``set_int8_products`` lets layers with int8 inputs multiply integers.

Under torch.compile the rounding of inputs is one operator on a GPU, which runs these kernels; ``set_traced_rounding``
lets Inductor fuse it with what makes the input instead, as it does on a CPU.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def fused(x: Tensor, step_size: Tensor | None = None) -> bool:
    """Return whether x is fake-quantized by the kernels of ``qat.kernels.fake_quant`` and ``round_dynamic``."""
    return (
        (x.is_cuda or x.is_xpu)  # device.type makes a string at each call
        and x.dtype in _DTYPES
        and type(x) in _PLAIN
        and (step_size is None or step_size.dtype != torch.float64)
        and has_triton()
    )


_DTYPES = torch.bfloat16, torch.float16, torch.float32
_PLAIN = Tensor, torch.nn.Parameter


@cache
def has_triton() -> bool:
    """Return whether Triton is installed; nothing is imported."""
    return find_spec("triton") is not None


def path(device: torch.device) -> str:
    """Return what fake quantization runs in there, for a message."""
    if device.type in ("cuda", "xpu"):
        without = "the torch reference, without Triton, which fused kernels need"
        return f"fused Triton kernels on {device}" if has_triton() else without
    return f"the torch reference on {device}" + (", in fused Triton kernels on a GPU" if has_triton() else "")


def batch_invariant() -> bool:
    """Return whether ``set_batch_invariant`` is on."""
    return _batch_invariant


def set_batch_invariant(on: bool) -> None:
    """Let a token's result in a frozen 4-bit linear layer not depend, to the bit, on how many tokens come with it.

    Of layers that run in the kernels of ``qat.kernels.int4_linear`` on a GPU: one kernel with one order of the sum then
    serves any number of tokens, slower at few and at very many. CUDA graphs and compiled models keep what was on when
    they were made.
    """
    global _batch_invariant
    _batch_invariant = on


def int8_products() -> int | None:
    """Return the number of tokens of ``set_int8_products``; None where it is off."""
    return _int8_products


def set_int8_products(tokens: int | None = 512) -> None:
    """Let frozen 4-bit linear layers on a GPU whose inputs were trained in int8 or less multiply integers.

    From so many tokens on, the layer's integers go through the GPU's int8 units (``qat.kernels.int8_linear``), where no
    gradient is wanted and ``set_batch_invariant`` is off. With fewer tokens, and with None, the input is rounded and
    the 16-bit kernels run. Both have the integers that were trained. They differ in what else is rounded: here nothing
    but the result, there also weights and inputs, to the dtype of x, as in training.

    On an H200 it is 1.3 to 1.4 times as fast from 512 tokens on, its rounding included (benchmarks/NOTES.md); what
    other GPUs run was not measured. It is off unless asked for, because of what else is rounded.
    """
    global _int8_products
    _int8_products = tokens


def traced_rounding() -> bool:
    """Return whether ``set_traced_rounding`` is on."""
    return _traced_rounding


def set_traced_rounding(on: bool) -> None:
    """Let compiled layers on an NVIDIA GPU round their inputs in code that Inductor makes (``qat.traced``).

    By bytes it is faster, and its bits are those of the kernels (``pytest -m gpu tests/test_traced.py`` on an H100).
    It is off unless asked for: a ResNet-50's kernels took 4 % longer with it on an H200, and kept 42 % more memory
    (benchmarks/NOTES.md); language models have not been timed both ways. Set it before the first call of a compiled
    model.
    """
    global _traced_rounding
    _traced_rounding = on


_batch_invariant = False
_int8_products: int | None = None
_traced_rounding = False
