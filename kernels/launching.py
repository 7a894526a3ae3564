"""Launching a Triton kernel at little cost for the host.

``kernel[grid](...)`` binds the arguments and works out what to specialize on, every time: more than the kernel takes on
a small layer. Here a launch is looked up by all that decides it but addresses, and done again by Triton's function in C
(``bare_launch``), or by Triton's own launcher where that is not known or a profiler wants to hear of launches.

On Hopper and later a kernel can start before the one ahead of it has ended (programmatic dependent launch): the int4
kernels then read weights while small kernels before them run, which take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import bare_launch
from .rounding import INTERPRETED

# Inputs of every length have launches of their own: so many are kept of each kind.
MOST = 4096

_early: dict[int, bool] = {}


class Launch:
    """A kernel and all that decides how it is launched but its tensors.

    Args:
        kernel: a ``triton.jit`` function whose parameters are tensors and then ``rest``.
        grid: programs along one to three axes.
        rest: ints and floats, from which the sizes of the tensors follow, and then the constexprs.
        options: num_warps and the like.
    """

    def __init__(self, kernel, grid: tuple[int, ...], rest: tuple, **options) -> None:
        self.kernel, self.grid, self.rest, self.options = kernel, grid + (1,) * (3 - len(grid)), rest, options
        # What Triton compiled, and what launches that in C, by what else decides it: dtypes, alignment, and devices,
        # since an address is taken for the GPU's.
        self.known: dict[tuple, tuple[Any, Callable[..., None] | None]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch the kernel on the device of the first tensor, which is not None."""
        if INTERPRETED.value:
            self.kernel[self.grid](*tensors, *self.rest, **self.options)
            return
        device = tensors[0].get_device()
        if device != torch.accelerator.current_device_index():
            with torch.accelerator.device_index(device):
                self(*tensors)
            return
        kinds, addresses = [], []
        for tensor in tensors:
            address = None if tensor is None else tensor.data_ptr()
            addresses.append(address)
            kinds.append(None if tensor is None else (tensor.dtype, address % 16 == 0, tensor.get_device()))
        compiled, start = self.known.get(tuple(kinds), (None, None))
        if compiled is None:
            compiled = self.kernel[self.grid](*tensors, *self.rest, **self.options)
            start = bare_launch.starter(compiled, self.grid, device, self.rest) if bare_launch.in_c(compiled) else None
            self.known[tuple(kinds)] = compiled, start
        elif start is None or bare_launch.hooks():
            compiled[self.grid](*tensors, *self.rest)
        else:
            start(*addresses)


@triton.jit
def wait_for_previous_kernel(EARLY: tl.constexpr):
    """Wait until the kernel before has ended, and its writes can be read (PTX ISA, griddepcontrol)."""
    if EARLY:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], tl.int32, False, 1)


@triton.jit
def let_next_kernel_start(EARLY: tl.constexpr):
    """Let the next kernel of the stream start, once every program of this one has come here."""
    if EARLY:
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, False, 1)


@triton.jit
def take_turns(EARLY: tl.constexpr):
    """Wait for the kernel before, then let the next one start."""
    wait_for_previous_kernel(EARLY)
    let_next_kernel_start(EARLY)


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
