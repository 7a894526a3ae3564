"""A frozen weight with a low-rank update, rounded: what L4Q's layers multiply with, made in one pass.

    w_NK = base_NK + sum_r b_Nr * a_rK      products and sums in float32, each rounded by itself, r in order
    forward:    y_NK = fake_quantized(w, step), or w where there is no step size
    backward:   y again, the gradient of w where nothing clipped, and that of the step sizes (qat.numerics)

The sum has this one order, and no fused multiply-add, so that codes are the same on every device: what trains on a GPU
is frozen on a CPU. The base is bf16, fp16 or fp32, or 8-bit codes with scales: base = (u - 128) * scale, u being uint8.

Bytes moved, at least: the base and y forward; the base, y, and the gradient twice backward. w is never in memory.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qat import backend, numerics
from qat.spec import QuantSpec

ROWS = 256  # of the reference's sum at a time, which then stay in a cache

try:
    import triton
    import triton.language as tl

    from .grid import divide, stored_scale
    from .launching import MOST, Launch, ceil_div
    from .rounding import clamp, round_half_even, round_to
except ImportError:  # there is no Triton for macOS
    triton = None


class LowRankSum(NamedTuple):
    """What w is the sum of.

    Attributes:
        base: (N, K) bf16, fp16 or fp32; or uint8, codes with 128 added.
        base_scale: (1 or N, groups) of codes, else None.
        a, b: float32 (r, K) and (N, r), the latter with the update's scaling in it.
    """

    base: Tensor
    base_scale: Tensor | None
    a: Tensor
    b: Tensor


def merged_reference(parts: LowRankSum) -> Tensor:
    """Return w, float32 (N, K), in torch."""
    base, base_scale, a, b = parts
    if base_scale is not None:
        codes = base.to(torch.float32) - 128
        base = (codes.view(*base_scale.shape, -1) * base_scale.float()[..., None]).view(base.shape)
    merged = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    for rows in (slice(start, start + ROWS) for start in range(0, len(base), ROWS)):
        update = torch.zeros_like(merged[rows])
        for column, row in zip(b[rows].split(1, 1), a.split(1, 0), strict=True):
            update += column * row
        torch.add(base[rows].float(), update, out=merged[rows])
    return merged


def joint_weight_reference(parts: LowRankSum, step: Tensor | None, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """Return y in torch: see ``joint_weight``."""
    merged = merged_reference(parts)
    return merged.to(dtype) if step is None else numerics.fake_quantized(merged, step, spec, dtype)


def joint_weight_backward_reference(
    grad: Tensor, parts: LowRankSum, step: Tensor, spec: QuantSpec, grad_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the gradients of w and of step in torch: see ``joint_weight_backward``."""
    merged = merged_reference(parts)
    y, grad_w, grad_step = numerics.requantize_(grad.float(), merged, step, spec, grad_scale, dtype=grad.dtype)
    return y, grad_w.to(grad.dtype), grad_step


if triton is not None:

    @triton.jit
    def _joint_kernel(
        base_ptr,  # (N, K)
        base_scale_ptr,  # (N or 1, base groups), None where base has values
        a_ptr,  # (RANK, K) float32
        b_ptr,  # (N, RANK) float32
        step_ptr,  # (N or 1, step groups), None where nothing is rounded
        grad_ptr,  # (N, K) of y, None in the forward
        y_ptr,  # (N, K)
        grad_w_ptr,  # (N, K), None in the forward
        sums_ptr,  # (N, programs along K): parts of the step sizes' gradient; None in the forward
        N,
        K,
        base_columns,  # that share a scale
        step_columns,
        RANK: tl.constexpr,
        BASE_ROWS: tl.constexpr,  # whether each row has scales of its own
        STEP_ROWS: tl.constexpr,
        LOW: tl.constexpr,  # -q_n
        HIGH: tl.constexpr,  # q_p
        SCALE_DTYPE: tl.constexpr,
        TILES: tl.constexpr,  # along K that a program walks, all with one step size a row
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,  # inside a group of base and step
    ):
        """Compute BLOCK_N rows over TILES tiles."""
        row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        first = tl.program_id(1) * TILES * BLOCK_K
        if step_ptr is not None:
            of_row = row * tl.cdiv(K, step_columns) if STEP_ROWS else row * 0
            scale = stored_scale(step_ptr, of_row + first // step_columns, row < N, SCALE_DTYPE)[:, None]
        total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for tile in range(TILES):
            start = first + tile * BLOCK_K
            column = start + tl.arange(0, BLOCK_K)
            place = row.to(tl.int64)[:, None] * K + column[None, :]
            valid = (row < N)[:, None] & (column < K)[None, :]
            update = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for j in range(RANK):
                a = tl.load(a_ptr + j * K + column, mask=column < K, other=0.0)
                b = tl.load(b_ptr + row * RANK + j, mask=row < N, other=0.0)
                update += b[:, None] * a[None, :]
            base = tl.load(base_ptr + place, mask=valid, other=0)
            if base_scale_ptr is not None:
                of_row = row * tl.cdiv(K, base_columns) if BASE_ROWS else row * 0
                base_scale = tl.load(base_scale_ptr + of_row + start // base_columns, mask=row < N, other=0.0)
                base = (base.to(tl.float32) - 128.0) * base_scale.to(tl.float32)[:, None]
            w = base.to(tl.float32) + update
            if step_ptr is None:
                tl.store(y_ptr + place, round_to(w, y_ptr.dtype.element_ty), mask=valid)
            else:
                ratio = divide(w, scale, SCALE_DTYPE, tl.float32)
                codes = round_half_even(clamp(ratio, LOW, HIGH))
                tl.store(y_ptr + place, round_to(codes * scale, y_ptr.dtype.element_ty), mask=valid)
                if grad_ptr is not None:
                    grad = tl.load(grad_ptr + place, mask=valid, other=0.0).to(tl.float32)
                    inside = (ratio > LOW) & (ratio < HIGH)
                    grad_w = round_to(tl.where(inside, grad, 0.0), grad_w_ptr.dtype.element_ty)
                    tl.store(grad_w_ptr + place, grad_w, mask=valid)
                    total += grad * (codes - tl.where(inside, ratio, 0.0))
        if sums_ptr is not None:
            tl.store(sums_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.sum(total, 1), mask=row < N)

    @lru_cache(MOST)
    def _joint_launch(
        rows: int,
        columns: int,
        rank: int,
        base_groups: tuple[int, int] | None,  # the shape of scales
        step_groups: tuple[int, int] | None,
        q_n: int,
        q_p: int,
        scale_dtype: str,
    ) -> tuple[Launch, int]:
        """Return the launch, and how many programs share a row."""
        both = base_groups, step_groups
        of_base, of_step = (columns if groups is None else columns // groups[1] for groups in both)
        many = [groups is not None and groups[0] > 1 for groups in both]
        block_k = _block(of_base, of_step, columns)
        tiles = min(8, ceil_div(columns, block_k)) if of_step == columns else of_step // block_k
        programs = ceil_div(columns, tiles * block_k)
        block_n = max(1, 4096 // block_k)
        constants = rank, *many, float(-q_n), float(q_p), getattr(tl, scale_dtype), tiles, block_n, block_k
        rest, grid = (rows, columns, of_base, of_step, *constants), (ceil_div(rows, block_n), programs)
        return Launch(_joint_kernel, grid, rest, num_warps=8, enable_fp_fusion=False), programs


def _block(of_base: int, of_step: int, columns: int) -> int:
    """Return how many columns a tile has: a power of two that no group ends inside of, or any where rows have one."""
    shared = math.gcd(*(size for size in (of_base, of_step) if size < columns), 128)
    return shared & -shared


def _launch(
    parts: LowRankSum,
    step: Tensor | None,
    spec: QuantSpec,
    y: Tensor,
    grad: Tensor | None = None,
    grad_w: Tensor | None = None,
) -> Tensor | None:
    """Fill y, and grad_w where there is a gradient; return that of step then, not scaled."""
    base, base_scale, a, b = (part if part is None else part.contiguous() for part in parts)
    rows, columns = base.shape
    groups = [None if scales is None else tuple(scales.shape) for scales in (base_scale, step)]
    how = spec.q_n, spec.q_p, spec.scale_dtype
    launch, programs = _joint_launch(rows, columns, len(a), *groups, *how)
    sums = torch.empty(rows, programs, dtype=torch.float32, device=base.device) if grad is not None else None
    launch(base, base_scale, a, b, step, grad, y, grad_w, sums)
    if sums is None:
        return None
    if step.numel() == 1:
        return sums.sum().view(step.shape)
    return sums if step.shape[1] > 1 else sums.sum(1, keepdim=True)


def _runs(parts: LowRankSum, step: Tensor | None) -> bool:
    values = parts.a if parts.base.dtype == torch.uint8 else parts.base  # kernels take codes where they take values
    return triton is not None and backend.fused(values, step)


@cache
def _grid(bits: int, scale_dtype: str) -> QuantSpec:
    return QuantSpec(bits=bits, signed=True, scale_dtype=scale_dtype)


def joint_weight(parts: LowRankSum, step: Tensor | None, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """Return the rounded sum y, (N, K) in ``dtype``, without gradients.

    Args:
        parts: what is added up.
        step: step sizes, float32 (1 or N, groups); None leaves w as it is.
        spec: symmetric; its bounds and scale dtype are used.
        dtype: of y.
    """
    return torch.ops.qat.joint_weight(*parts, step, spec.bits, spec.scale_dtype.value, dtype)


def joint_weight_backward(
    grad: Tensor, parts: LowRankSum, step: Tensor, spec: QuantSpec, grad_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y in the dtype of ``grad``, the gradient of w in it, and that of the step sizes, float32.

    Args:
        grad: of y, (N, K).
        parts, step, spec: as in ``joint_weight``.
        grad_scale: LSQ's, of the step sizes' gradient.
    """
    how = spec.bits, spec.scale_dtype.value, grad_scale
    return torch.ops.qat.joint_weight_backward(grad, *parts, step, *how)


_library = torch.library.Library("qat", "FRAGMENT")
_PARTS = "Tensor base, Tensor? base_scale, Tensor a, Tensor b"
_GRID = "int bits, str scale_dtype"
_library.define(f"joint_weight({_PARTS}, Tensor? step, {_GRID}, ScalarType dtype) -> Tensor")
_library.define(
    f"joint_weight_backward(Tensor grad, {_PARTS}, Tensor step, {_GRID}, float grad_scale) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "joint_weight", "CompositeExplicitAutograd")
def _forward(base, base_scale, a, b, step, bits, scale_dtype, dtype):
    parts, spec = LowRankSum(base, base_scale, a, b), _grid(bits, scale_dtype)
    if not _runs(parts, step):
        return joint_weight_reference(parts, step, spec, dtype)
    y = torch.empty(base.shape, dtype=dtype, device=base.device)
    if y.numel():
        _launch(parts, step, spec, y)
    return y


@torch.library.impl(_library, "joint_weight_backward", "CompositeExplicitAutograd")
def _backward(grad, base, base_scale, a, b, step, bits, scale_dtype, grad_scale):
    parts, spec = LowRankSum(base, base_scale, a, b), _grid(bits, scale_dtype)
    if not _runs(parts, step) or not base.numel():
        return joint_weight_backward_reference(grad, parts, step, spec, grad_scale)
    grad = grad.contiguous()
    y, grad_w = torch.empty_like(grad), torch.empty_like(grad)
    return y, grad_w, _launch(parts, step, spec, y, grad, grad_w).mul_(grad_scale)


@torch.library.register_fake("qat::joint_weight", lib=_library)
def _(base, base_scale, a, b, step, bits, scale_dtype, dtype):
    return base.new_empty(base.shape, dtype=dtype)


@torch.library.register_fake("qat::joint_weight_backward", lib=_library)
def _(grad, base, base_scale, a, b, step, bits, scale_dtype, grad_scale):
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape), torch.empty_like(step)
