"""Launching a Triton kernel at little cost for the host.

``kernel[grid](...)`` binds the arguments and works out what to specialize on, every time: more than the kernel takes on
a small layer. Here a compiled kernel is looked up by what Triton specializes on, and launched as it is.

On Hopper and later a kernel can start before the one ahead of it has ended (programmatic dependent launch): the int4
kernels then read weights while small kernels before them run, which take turns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding import INTERPRETED

_compiled: dict[tuple, Any] = {}
_early: dict[int, bool] = {}


def launch(kernel, grid: tuple[int, ...], arguments: tuple, constants: tuple, **options) -> None:
    """Launch a kernel whose parameters are ``arguments``, the first of them a tensor, and then its constexprs.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along one to three axes.
        arguments: tensors, ints, floats and None.
        constants: the constexprs, hashable.
        options: num_warps and the like.
    """
    if INTERPRETED.value:
        kernel[grid](*arguments, *constants, **options)
        return
    device = arguments[0].device
    if device.index != torch.accelerator.current_device_index():
        with torch.accelerator.device_index(device.index):
            launch(kernel, grid, arguments, constants, **options)
        return
    key = (kernel.fn, device, constants, *options.values(), *map(_specialization, arguments))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*arguments, *constants, **options)
    else:
        compiled[grid + (1,) * (3 - len(grid))](*arguments, *constants)


@triton.jit
def take_turns(EARLY: tl.constexpr):
    """Wait for the kernel before, then let the next one start (PTX ISA, griddepcontrol)."""
    if EARLY:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, False, 1
        )


def starts_early(x: Tensor) -> bool:
    """Return whether kernels on the device of x can start early: launch them with ``launch_pdl=True`` then."""
    if not x.is_cuda or torch.version.cuda is None:
        return False
    if x.device.index not in _early:
        _early[x.device.index] = torch.cuda.get_device_capability(x.device)[0] >= 9
    return _early[x.device.index]


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up; ``triton.cdiv`` takes ten times as long outside a kernel."""
    return -(-a // b)


def next_power_of_2(a: int) -> int:
    """Return the least power of two that is at least a, which is at least 1."""
    return 1 << (a - 1).bit_length()


def _specialization(argument) -> tuple | None:
    """Return what Triton compiles a kernel for: alignment, the width of integers, ones."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0, argument.numel() < 2**28
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument < 2**31
    return None if argument is None else ()
