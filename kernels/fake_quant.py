"""Fake quantization with LSQ's gradients: one pass over memory forward and one backward.

    s_S = round_to_scale_dtype(max(step_S, MIN_SCALE))                 r_SB = x_SB / s_S
    forward:    y_SB = round_half_even(clamp(r_SB, -q_n, q_p)) * s_S
    backward:   inside = -q_n < r < q_p        grad_x = grad_y where inside, else 0
                grad_step_S = grad_scale * sum_B grad_y * (round(clamp(r)) - (r where inside, else 0))

S scales, and B elements that share one and lie next to each other in memory. x, y and the gradients are bf16, fp16 or
fp32, and the arithmetic float32. With a zero point z_S:

    whole:      the bounds are -q_n - z and q_p - z
    real:       y = (round_half_even(clamp(r + z, -q_n, q_p)) - z) * s, and the mask's bounds as above
    LSQ+'s:     whole, made here from the offset b_S: z = clamp(round(-b / s), 0, q_n + q_p) - q_n; grad_step counts
                clipped codes from the lowest, and grad_b = grad_scale * sum_B (0 where inside, else grad_y)

The reference is ``fake_quantized`` and ``fake_quantize_gradients`` of ``qat.numerics``; this module has functions of
the same names and arguments, and ``qat.backend`` chooses between the two. With an offset it is
``qat.quantizers.lsq_plus``. y and grad_x equal the reference's bit for bit. The gradients of step and offset are
float32 sums in an order that depends on the shape alone: no atomics, the same bits on every run.

Bytes moved, at least: x and y forward; grad_y, x and grad_x backward. Nothing is kept between the two but x, step and
what zero points there are.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.spec import QuantSpec

from .grid import code_of_zero, codes_from_zero, divide, stored_scale
from .launching import MOST, Launch, ceil_div, next_power_of_2
from .rounding import round_to

TILE = 4096  # elements a program holds at a time
WARPS = 8
PARTIAL_SUMS = 4096  # of one step size at most, so that one tile adds them up


@triton.jit
def _forward_kernel(
    x_ptr,  # (S, B)
    step_ptr,  # (S,)
    zero_ptr,  # (S,), or None
    y_ptr,  # (S, B)
    S,
    B,
    tiles,  # along B
    LOW: tl.constexpr,  # -q_n
    HIGH: tl.constexpr,  # q_p
    SCALE_DTYPE: tl.constexpr,
    ZERO: tl.constexpr,  # what zero_ptr holds: "whole" or "real" zero points, or an "offset"
    BLOCK_S: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Compute one (BLOCK_S, BLOCK_B) tile of y. One axis of programs: the others end at 65535."""
    row = tl.program_id(0) // tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    # 64 bits: a tensor may have more than 2^31 elements.
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    place = row.to(tl.int64)[:, None] * B + column[None, :]
    inside = (row < S)[:, None] & (column < B)[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    scale = stored_scale(step_ptr, row, row < S, SCALE_DTYPE)[:, None]
    zero = code_of_zero(zero_ptr, row[:, None], (row < S)[:, None], scale, LOW, HIGH, ZERO)
    ratio = divide(x, scale, SCALE_DTYPE, x_ptr.dtype.element_ty)
    codes = codes_from_zero(ratio, zero, LOW, HIGH, ZERO)
    tl.store(y_ptr + place, round_to(codes * scale, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_y_ptr,  # (S, B)
    x_ptr,  # (S, B)
    step_ptr,  # (S,)
    zero_ptr,  # (S,), or None
    grad_x_ptr,  # (S, B), or None where it is not wanted
    y_ptr,  # (S, B), or None where it is not wanted again
    sums_ptr,  # (S, programs along B): grad_step itself where there is one; None where it is not wanted
    offset_sums_ptr,  # the same for the offset's gradient
    S,
    B,
    tiles,  # along B that one program walks
    factor,  # of the sums
    SPARSE: tl.constexpr,  # grad_x is grad_y, and few are masked: only these are written
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Compute BLOCK_S rows of grad_x and y over ``tiles`` tiles, and the sums of what they add to the others."""
    row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    scale = stored_scale(step_ptr, row, row < S, SCALE_DTYPE)[:, None]
    zero = code_of_zero(zero_ptr, row[:, None], (row < S)[:, None], scale, LOW, HIGH, ZERO)
    low, high = LOW - zero, HIGH - zero
    start = tl.program_id(1).to(tl.int64) * tiles * BLOCK_B
    total = tl.zeros((BLOCK_S, BLOCK_B), tl.float32)
    clipped = tl.zeros((BLOCK_S, BLOCK_B), tl.float32)
    for tile in range(tiles):
        column = start + tile * BLOCK_B + tl.arange(0, BLOCK_B)
        place = row.to(tl.int64)[:, None] * B + column[None, :]
        valid = (row < S)[:, None] & (column < B)[None, :]
        x = tl.load(x_ptr + place, mask=valid, other=0.0).to(tl.float32)
        ratio = divide(x, scale, SCALE_DTYPE, x_ptr.dtype.element_ty)
        grad_y = tl.load(grad_y_ptr + place, mask=valid, other=0.0)
        inside = (ratio > low) & (ratio < high)
        if grad_x_ptr is not None:
            grad_x = tl.where(inside, grad_y.to(tl.float32), 0.0)
            written = valid & ~inside if SPARSE else valid
            tl.store(grad_x_ptr + place, round_to(grad_x, grad_x_ptr.dtype.element_ty), mask=written)
        codes = codes_from_zero(ratio, zero, LOW, HIGH, ZERO)
        if y_ptr is not None:
            tl.store(y_ptr + place, round_to(codes * scale, y_ptr.dtype.element_ty), mask=valid)
        if sums_ptr is not None:
            total += grad_y.to(tl.float32) * (codes - tl.where(inside, ratio, low if ZERO == "offset" else 0.0))
        if offset_sums_ptr is not None:
            clipped += tl.where(inside, 0.0, grad_y.to(tl.float32))
    place = row * tl.num_programs(1) + tl.program_id(1)
    if sums_ptr is not None:
        sums = tl.sum(total, 1) * factor
        tl.store(sums_ptr + place, round_to(sums, sums_ptr.dtype.element_ty), mask=row < S)
    if offset_sums_ptr is not None:
        sums = tl.sum(clipped, 1) * factor
        tl.store(offset_sums_ptr + place, round_to(sums, offset_sums_ptr.dtype.element_ty), mask=row < S)


@triton.jit
def _sum_kernel(sums_ptr, offset_sums_ptr, grad_step_ptr, grad_offset_ptr, count, factor, BLOCK: tl.constexpr):
    """Add up the partial sums of one step size, and of its offset."""
    place = tl.program_id(0) * count + tl.arange(0, BLOCK)
    counts = tl.arange(0, BLOCK) < count
    total = tl.sum(tl.load(sums_ptr + place, mask=counts, other=0.0), 0) * factor
    tl.store(grad_step_ptr + tl.program_id(0), round_to(total, grad_step_ptr.dtype.element_ty))
    if offset_sums_ptr is not None:
        total = tl.sum(tl.load(offset_sums_ptr + place, mask=counts, other=0.0), 0) * factor
        tl.store(grad_offset_ptr + tl.program_id(0), round_to(total, grad_offset_ptr.dtype.element_ty))


def fake_quantized(
    x: Tensor,
    step_size: Tensor,
    spec: QuantSpec,
    dtype: torch.dtype | None = None,
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Do what ``qat.numerics.fake_quantized`` does, for bf16, fp16 and fp32 on a device that Triton compiles for.

    Args:
        x, step_size, spec, dtype, zero_point: as there.
        offset: of LSQ+, float32 in the shape of the step size, in the place of a zero point.
    """
    source = in_memory_order(x, step_size)
    y = torch.empty_like(source, dtype=dtype)
    elements, scales = x.numel(), step_size.numel()
    if elements:
        zero, kind = _zero(zero_point, offset, spec)
        launch = _forward_launch(scales, elements // scales, spec.bits, spec.signed, spec.scale_dtype, kind)
        launch(source, step_size.contiguous(), zero, y)
    return y if source is x else _laid_out_as(x, y, step_size)


@lru_cache(MOST)
def _forward_launch(scales: int, block: int, bits: int, signed: bool | None, scale_dtype: str, zero: str) -> Launch:
    block_s, block_b = _tile(scales, block)
    tiles = ceil_div(block, block_b)
    constants = *_grid(bits, signed, scale_dtype, zero), block_s, block_b
    grid = (ceil_div(scales, block_s) * tiles,)
    return Launch(_forward_kernel, grid, (scales, block, tiles, *constants), num_warps=WARPS)


def fake_quantize_gradients(
    grad_output: Tensor,
    x: Tensor,
    step_size: Tensor,
    spec: QuantSpec,
    grad_scale: float,
    wanted: tuple[bool, ...] = (True, True),
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Do what ``qat.numerics.fake_quantize_gradients`` does, under the same conditions.

    With an offset, ``wanted`` has three places, and the offset's gradient is the third to come back.
    """
    source = in_memory_order(x, step_size)
    grad_x = torch.empty_like(source) if wanted[0] else None
    if grad_output.stride() != source.stride():
        grad_output = torch.empty_like(source, dtype=grad_output.dtype).copy_(grad_output)
    zero = _zero(zero_point, offset, spec)
    grads = _backward(grad_output, source, step_size, zero, spec, grad_scale, grad_x, None, wanted)
    return None if grad_x is None else _laid_out_as(x, grad_x, step_size), *grads


def requantize_(
    grad_output: Tensor,
    x: Tensor,
    step_size: Tensor,
    spec: QuantSpec,
    grad_scale: float,
    wanted: tuple[bool, ...] = (True, True),
    dtype: torch.dtype | None = None,
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Do what ``qat.numerics.requantize_`` does in one pass, where the layouts allow; the offset as above."""
    if not (x.stride() == grad_output.stride() and in_memory_order(x, step_size) is x):
        y = None if dtype is None else fake_quantized(x, step_size, spec, dtype, zero_point, offset)
        how = spec, grad_scale, wanted, zero_point, offset
        return y, *fake_quantize_gradients(grad_output, x, step_size, *how)
    y = None if dtype is None else torch.empty_like(x, dtype=dtype)
    grad_x = None
    if wanted[0]:
        grad_x = grad_output if grad_output.dtype == x.dtype else torch.empty_like(x)
    zero = _zero(zero_point, offset, spec)
    return y, grad_x, *_backward(grad_output, x, step_size, zero, spec, grad_scale, grad_x, y, wanted)


def _backward(grad_y, x, step_size, zero, spec, grad_scale, grad_x, y, wanted) -> list[Tensor | None]:
    """Fill grad_x and y where they are given, and return the wanted gradients of the step size and of an offset."""
    zero, kind = zero
    wanted = wanted[1 : 3 if kind == "offset" else 2]
    elements, scales = x.numel(), step_size.numel()
    if not elements or (grad_x is None and y is None and not any(wanted)):
        return [torch.zeros_like(step_size) if is_wanted else None for is_wanted in wanted]
    step_size = step_size.contiguous()
    # Behind a ReLU half of all elements are 0, and masked: single elements take longer to write than all in a row.
    sparse = grad_x is grad_y and spec.signed is not False
    how = spec.bits, spec.signed, spec.scale_dtype, kind
    backward, add_up, programs = _backward_launches(scales, elements // scales, grad_scale, sparse, *how)
    grads, sums = [None, None], [None, None]
    for index in range(len(wanted) if any(wanted) else 0):  # of two, both are made
        grads[index] = torch.empty_like(step_size)
        sums[index] = grads[index] if programs == 1 else x.new_empty(scales, programs, dtype=torch.float32)
    backward(grad_y, x, step_size, zero, grad_x, y, *sums)
    if any(wanted) and programs > 1:
        add_up(*sums, *grads)
    return [grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=False)]


@lru_cache(MOST)
def _backward_launches(
    scales: int, block: int, factor: float, sparse: bool, bits: int, signed: bool | None, scale_dtype: str, zero: str
) -> tuple[Launch, Launch, int]:
    """Return the two launches, of which the second adds up sums, and how many programs share a scale."""
    block_s, block_b = _tile(scales, block)
    rows, tiles = ceil_div(scales, block_s), ceil_div(block, block_b)
    tiles_each = ceil_div(tiles, max(1, PARTIAL_SUMS // rows))
    programs = ceil_div(tiles, tiles_each)  # along B
    add_up = Launch(_sum_kernel, (scales,), (programs, factor, next_power_of_2(programs)), num_warps=WARPS)
    constants = sparse, *_grid(bits, signed, scale_dtype, zero), block_s, block_b
    rest = scales, block, tiles_each, factor if programs == 1 else 1.0, *constants
    return Launch(_backward_kernel, (rows, programs), rest, num_warps=WARPS), add_up, programs


def _zero(zero_point: Tensor | None, offset: Tensor | None, spec: QuantSpec) -> tuple[Tensor | None, str]:
    """Return what the kernels take of zero points, and its kind."""
    if offset is not None:
        return offset.contiguous(), "offset"
    if zero_point is None:
        return None, "whole"
    return zero_point.contiguous(), "whole" if spec.zero_point_dtype is None else "real"


def in_memory_order(x: Tensor, step_size: Tensor) -> Tensor:
    """Return x, or a copy, whose memory holds the elements of each scale next to each other."""
    if x.is_contiguous():
        return x
    if step_size.shape[1] > 1:
        return x.contiguous()
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return torch.empty_like(x).copy_(x) if step_size.shape[0] == 1 else x.contiguous()


def _laid_out_as(x: Tensor, result: Tensor, step_size: Tensor) -> Tensor:
    """Return the result in the layout of the reference's: contiguous for groups, else that of x where x is dense."""
    if step_size.shape[1] > 1 or result.stride() == x.stride():
        return result
    return torch.empty_like(x, dtype=result.dtype).copy_(result)


def _tile(scales: int, block: int) -> tuple[int, int]:
    block_b = min(TILE, next_power_of_2(block))
    return min(TILE // block_b, next_power_of_2(scales)), block_b


def _grid(bits: int, signed: bool | None, scale_dtype: str, zero: str) -> tuple[float, float, tl.dtype, str]:
    """Return the constexprs that say where codes lie."""
    spec = QuantSpec(bits=bits, signed=signed)
    return float(-spec.q_n), float(spec.q_p), getattr(tl, scale_dtype), zero
