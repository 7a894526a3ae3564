"""Int4 calls like one before: launched as that one was, with nothing new but addresses and what is allocated.

Working out a plan, its grid and its arguments takes the host longer than a small product takes the GPU, and so does
Triton's own look-up. A recipe is found by all that decides a launch: shapes, dtypes, devices, and whether results may
depend on the number of tokens. That tensors are contiguous and start at multiples of 16 bytes is looked at each time.

NVIDIA alone: a kernel takes addresses as integers there, which it then does not ask the driver about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat import backend

from . import bare_launch
from .int4_layout import Int4Weight

# A build of torch for CPUs has none, and no recipe.
current_device: Callable[[], int] | None = getattr(torch._C, "_cuda_getDevice", None)

# Of x, words, scale, zero point, levels and bias: its own, or that of a tensor that the kernel then does not read.
Addresses = tuple[int, int, int, int, int, int]
Recipe = Callable[[Tensor, Int4Weight, Tensor | None, Addresses], Tensor]

# Prompts of every length have recipes of their own: so many are kept.
MOST = 4096

_products: dict[tuple, Recipe] = {}
_matrices: dict[tuple, Callable[[Addresses], Tensor]] = {}


class Launch(NamedTuple):
    """A kernel that was compiled, where it runs, and its arguments after the tensors.

    Attributes:
        compiled: what Triton returned for the first launch.
        grid: programs along three axes.
        device: index of the GPU, the current one at the launch.
        tail: sizes and constexprs.
    """

    compiled: Any
    grid: tuple[int, int, int]
    device: int
    tail: tuple

    def starter(self) -> Callable[..., None]:
        """Return what launches the kernel: it takes the arguments up to the tail, tensors as addresses."""
        return bare_launch.starter(*self)


def repeat(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor | None:
    """Return x W^T + bias, (..., N), if a call like this one was remembered; else None, and nothing was launched."""
    if not _products:
        return None
    recipe = _products.get(_product_key(x, weight, bias))
    if recipe is None or not x.is_contiguous() or not (bias is None or bias.is_contiguous()):
        return None
    at = addresses(x, weight, bias)
    return None if at is None else recipe(x, weight, bias, at)


def remember(x: Tensor, weight: Int4Weight, bias: Tensor | None, recipe: Recipe) -> None:
    """Let ``repeat`` take calls like this one, which was checked, and whose ``addresses`` are not None."""
    if len(_products) >= MOST:
        _products.clear()
    _products[_product_key(x, weight, bias)] = recipe


def decode(launch: Launch, shape: torch.Size) -> Recipe:
    """Return a recipe for a kernel of ``int4_decode`` and results of ``shape``."""
    start, tokens, sizes = launch.starter(), shape[:-1].numel(), tuple(shape)

    def recipe(x: Tensor, weight: Int4Weight, bias: Tensor | None, at: Addresses) -> Tensor:
        y = x.new_empty(*sizes)  # sizes one by one are read faster
        start(*at, y.data_ptr(), tokens)
        return y

    return recipe


def batch(
    launch: Launch, sum_parts: Launch | None, shape: torch.Size, inputs: int | None, split: int, outputs: int
) -> Recipe:
    """Return a recipe for a kernel of ``int4_batch``, and for the one that sums ``split`` parts of its last outputs.

    Without ``inputs`` the kernel is one of ``int4_few``, to which x is not described.
    """
    start, tokens, sizes = launch.starter(), shape[:-1].numel(), tuple(shape)
    describe = _at if inputs is None else bare_launch.describer(launch.compiled, (tokens, inputs))
    if sum_parts is None:

        def whole(x: Tensor, weight: Int4Weight, bias: Tensor | None, at: Addresses) -> Tensor:
            x_at, *others = at
            y = x.new_empty(*sizes)
            y_at = y.data_ptr()
            start(*describe(x, x_at), *others, y_at, y_at, tokens)
            return y

        return whole

    add_up = sum_parts.starter()

    def in_parts(x: Tensor, weight: Int4Weight, bias: Tensor | None, at: Addresses) -> Tensor:
        x_at, *others = at
        y = x.new_empty(*sizes)
        parts = torch.empty(split, tokens, outputs, dtype=torch.float32, device=x.device)
        y_at, parts_at = y.data_ptr(), parts.data_ptr()
        start(*describe(x, x_at), *others, y_at, parts_at, tokens)
        add_up(parts_at, None if bias is None else at[5], y_at)
        return y

    return in_parts


def _at(x: Tensor, x_at: int) -> tuple[int]:
    return (x_at,)


def repeat_dequantized(weight: Int4Weight, dtype: torch.dtype) -> Tensor | None:
    """Return the weight (N, K), its scales being values, if one like it was remembered; else None."""
    if not _matrices:
        return None
    recipe = _matrices.get((dtype, *_weight_key(weight)))
    at = None if recipe is None else addresses(weight.words, weight, None)
    return None if at is None else recipe(at)


def remember_dequantized(weight: Int4Weight, matrix: Tensor, launch: Launch) -> None:
    """Let ``repeat_dequantized`` take weights like this one."""
    start, shape, dtype, device = launch.starter(), tuple(matrix.shape), matrix.dtype, matrix.device
    has_zero, has_levels = weight.zero_point is not None, weight.levels is not None

    def recipe(at: Addresses) -> Tensor:
        made = torch.empty(*shape, dtype=dtype, device=device)
        start(at[1], at[2], at[3] if has_zero else None, at[4] if has_levels else None, made.data_ptr())
        return made

    _matrices[dtype, *_weight_key(weight)] = recipe


def addresses(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Addresses | None:
    """Return them for a launch; None where there is none: one is not aligned, or x not on the current device."""
    words, scale, zero_point, _, _, _, levels, _ = weight
    at, words_at, scale_at = x.data_ptr(), words.data_ptr(), scale.data_ptr()
    zero_at = words_at if zero_point is None else zero_point.data_ptr()
    levels_at = words_at if levels is None else levels.data_ptr()
    bias_at = at if bias is None else bias.data_ptr()
    if (at | words_at | scale_at | zero_at | levels_at | bias_at) & 15 or current_device() != x.get_device():
        return None
    return at, words_at, scale_at, zero_at, levels_at, bias_at


def _product_key(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> tuple:
    of_bias = None if bias is None else (bias.shape, bias.dtype, bias.get_device())
    return (x.shape, x.dtype, x.get_device(), of_bias, backend.batch_invariant(), *_weight_key(weight))


def _weight_key(weight: Int4Weight) -> tuple:
    words, scale, zero_point, n, k, group_size, levels, nest = weight
    rest = None
    if zero_point is not None or levels is not None or nest is not None:
        rest = tuple(None if t is None else (t.shape, t.dtype, t.get_device()) for t in (zero_point, levels, nest))
    return (
        *(words.shape, words.dtype, words.get_device(), scale.shape, scale.dtype, scale.get_device()),
        *(n, k, group_size, rest),
    )
