"""The one rule that chooses what fake quantization runs on: fused Triton kernels, or the torch reference.

Kernels run on CUDA, ROCm and XPU devices where Triton is installed, for bf16, fp16 and fp32. Everything else is the
reference: a CPU, float64, and tensors that stand for others (fake, functional, distributed), which only aten can take.
Both give the same bits, eager, compiled and captured in a CUDA graph alike.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def fused(x: Tensor, step_size: Tensor | None = None) -> bool:
    """Return whether x is fake-quantized by the kernels of ``qat.kernels.fake_quant`` and ``round_dynamic``."""
    return (
        x.device.type in ("cuda", "xpu")
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and type(x) in (Tensor, torch.nn.Parameter)
        and (step_size is None or step_size.dtype != torch.float64)
        and has_triton()
    )


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether an operator of ours with a Triton kernel runs on the device in that dtype."""
    return device.type in ("cuda", "xpu") and dtype in (torch.bfloat16, torch.float16, torch.float32) and has_triton()


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
