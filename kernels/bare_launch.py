"""Launching a compiled kernel by Triton's function in C, without the Python around it, which takes three times as long.

Triton's launcher for NVIDIA GPUs asks at each launch whether scratch memory is wanted, goes through all arguments for
tensor descriptors, and makes each one anew. Here both are done once. The C function's parameters are Triton's affair:
they are known for the versions in ``KNOWN``, and with others its launcher is called as Triton calls it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

KNOWN = ("3.6", "3.7")
VERSION = ".".join(triton.__version__.split(".")[:2])

# A build of torch for CPUs has none.
current_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

# Activations come back to the same addresses; the descriptors of so many are kept.
MOST = 16


class Described:
    """What a launch reads of Triton's TensorDescriptor, without its checks, which a first launch with it has passed."""

    __slots__ = ("base", "shape", "strides")
    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, base: Tensor, shape: tuple[int, int]) -> None:
        self.base, self.shape, self.strides = base, shape, (shape[1], 1)


def starter(compiled: Any, grid: tuple[int, int, int], device: int, tail: tuple) -> Callable[..., None]:
    """Return what launches a kernel on the current stream of ``device``, which is the current device.

    Args:
        compiled: what Triton returned for the first launch.
        grid: programs along three axes.
        device: a GPU's index.
        tail: the last arguments, which stay the same. The others are given at each launch: tensors by their addresses,
            and what ``describer`` returns.
    """
    run, function, metadata, stream = compiled.run, compiled.function, compiled.packed_metadata, current_stream
    x, y, z = grid
    in_c, hooks = _in_c(run), (None, None, None)
    if in_c is None:

        def launch(*arguments) -> None:
            run(x, y, z, stream(device), function, metadata, *hooks, *arguments, *tail)

    elif VERSION == "3.6":
        ahead = function, run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, *hooks

        def launch(*arguments) -> None:
            in_c(x, y, z, stream(device), *ahead, *arguments, *tail)

    else:
        ahead = function, run.launch_cooperative_grid, run.launch_pdl, metadata, *hooks, None, None
        ahead += run.arg_annotations, run.kernel_signature

        def launch(*arguments) -> None:
            in_c(x, y, z, stream(device), *ahead, (*arguments, *tail))

    return launch


def describer(compiled: Any, shape: tuple[int, int]) -> Callable[[Tensor, int], tuple]:
    """Return what makes a kernel's arguments of a contiguous tensor of ``shape`` and its address.

    The kernel's one descriptor is a copy of the address and of what stays the same, so it is looked up by the address.
    """
    if _in_c(compiled.run) is None:
        return lambda tensor, at: (Described(tensor, shape),)
    from triton.backends.nvidia.driver import make_tensordesc_arg

    (how,) = inspect.getclosurevars(compiled.run.launch).nonlocals["tensordesc_meta"]
    made: dict[int, tuple] = {}

    def describe(tensor: Tensor, at: int) -> tuple:
        arguments = made.get(at)
        if arguments is None:
            if len(made) >= MOST:
                made.clear()
            arguments = made[at] = tuple(make_tensordesc_arg(Described(tensor, shape), how))
        return arguments

    return describe


def in_c(compiled: Any) -> bool:
    """Return whether ``starter`` calls Triton's function in C."""
    return _in_c(compiled.run) is not None


def hooks() -> bool:
    """Return whether a profiler asked Triton to tell it of launches, which those of ``starter`` do not do."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _in_c(run: Any) -> Callable[..., None] | None:
    """Return the function in C that Triton's launcher calls; None if it is not known how, or needs more each time."""
    if VERSION not in KNOWN or type(run).__module__ != "triton.backends.nvidia.driver":
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    if not inspect.isfunction(run.launch):
        return run.launch
    around = inspect.getclosurevars(run.launch).nonlocals
    # Without that, a descriptor is taken apart into arguments, the tensor among them.
    return around["launcher"] if None not in around["tensordesc_meta"] else None
