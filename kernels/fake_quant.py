"""Fake quantization with LSQ's gradients: one pass over memory forward and one backward.

    s_S = round_to_scale_dtype(max(step_S, MIN_SCALE))                 r_SB = x_SB / s_S
    forward:    y_SB = round_half_even(clamp(r_SB, -q_n, q_p)) * s_S
    backward:   inside = -q_n < r < q_p        grad_x = grad_y where inside, else 0
                grad_step_S = grad_scale * sum_B grad_y * (round(clamp(r)) - (r where inside, else 0))

S scales, and B elements that share one and lie next to each other in memory. x, y and the gradients are bf16, fp16 or
fp32, and the arithmetic float32.

The reference is ``fake_quantized`` and ``fake_quantize_gradients`` of ``qat.numerics``; this module has functions of
the same names and arguments, and ``qat.backend`` chooses between the two. y and grad_x equal the reference's bit for
bit. grad_step is a float32 sum in an order that depends on the shape alone: no atomics, the same bits on every run.

Bytes moved, at least: x and y forward; grad_y, x and grad_x backward. Nothing is kept between the two but x and step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.numerics import MIN_SCALE
from qat.spec import QuantSpec

from .launching import ceil_div, launch, next_power_of_2
from .rounding import INTERPRETED, clamp, round_half_even, round_to

TILE = 4096  # elements a program holds at a time
WARPS = 8
PARTIAL_SUMS = 4096  # of one step size at most, so that one tile adds them up

_MIN_SCALE = tl.constexpr(MIN_SCALE)
_TL_DTYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}


@triton.jit
def stored_scale(step_ptr, row, inside, dtype: tl.constexpr):
    """``qat.numerics.stored_scale``, in float32; a NaN stays one."""
    step = tl.load(step_ptr + row, mask=inside, other=1.0).to(tl.float32)
    return round_to(tl.where(step < _MIN_SCALE, _MIN_SCALE, step), dtype).to(tl.float32)


@triton.jit
def divide(x, scale, scale_dtype: tl.constexpr, x_dtype: tl.constexpr):
    """Return x / scale, rounded correctly wherever that decides a code or a mask.

    A division takes some 20 instructions an element, which is more than memory leaves time for. A reciprocal for each
    scale, a product and corrections by fused multiply-adds take 3 to 5 (Markstein 1990, doi:10.1147/rd.341.0111,
    theorem 5): two make every quotient exact to the bit. Where x and scale have 11 bits at most, one makes it exact if
    float32 holds it, and else leaves it on its side of the middle of two codes, which is at least 2^-20 away.
    """
    if INTERPRETED:  # whose fused multiply-add rounds twice
        return tl.div_rn(x, scale + tl.zeros_like(x))
    inverse = tl.div_rn(1.0, scale)
    scale = tl.where(scale == float("inf"), 0.0, scale)
    product = x * inverse
    ratio = tl.fma(tl.fma(-product, scale, x), inverse, product)
    if scale_dtype == tl.float32 or x_dtype == tl.float32:
        ratio = tl.fma(tl.fma(-ratio, scale, x), inverse, ratio)
    return tl.where(tl.abs(product) < 1024.0, ratio, product)  # an infinite one has no remainder


@triton.jit
def _forward_kernel(
    x_ptr,  # (S, B)
    step_ptr,  # (S,)
    y_ptr,  # (S, B)
    S,
    B,
    tiles,  # along B
    LOW: tl.constexpr,  # -q_n
    HIGH: tl.constexpr,  # q_p
    SCALE_DTYPE: tl.constexpr,
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
    ratio = divide(x, scale, SCALE_DTYPE, x_ptr.dtype.element_ty)
    codes = round_half_even(clamp(ratio, LOW, HIGH))
    tl.store(y_ptr + place, round_to(codes * scale, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_y_ptr,  # (S, B)
    x_ptr,  # (S, B)
    step_ptr,  # (S,)
    grad_x_ptr,  # (S, B), or None where it is not wanted
    y_ptr,  # (S, B), or None where it is not wanted again
    sums_ptr,  # (S, programs along B): grad_step itself where there is one; None where it is not wanted
    S,
    B,
    tiles,  # along B that one program walks
    factor,  # of the sums
    SPARSE: tl.constexpr,  # grad_x is grad_y, and few are masked: only these are written
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Compute BLOCK_S rows of grad_x and y over ``tiles`` tiles, and the sums of what they add to grad_step."""
    row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    scale = stored_scale(step_ptr, row, row < S, SCALE_DTYPE)[:, None]
    start = tl.program_id(1).to(tl.int64) * tiles * BLOCK_B
    total = tl.zeros((BLOCK_S, BLOCK_B), tl.float32)
    for tile in range(tiles):
        column = start + tile * BLOCK_B + tl.arange(0, BLOCK_B)
        place = row.to(tl.int64)[:, None] * B + column[None, :]
        valid = (row < S)[:, None] & (column < B)[None, :]
        x = tl.load(x_ptr + place, mask=valid, other=0.0).to(tl.float32)
        ratio = divide(x, scale, SCALE_DTYPE, x_ptr.dtype.element_ty)
        grad_y = tl.load(grad_y_ptr + place, mask=valid, other=0.0)
        inside = (ratio > LOW) & (ratio < HIGH)
        if grad_x_ptr is not None:
            grad_x = tl.where(inside, grad_y.to(tl.float32), 0.0)
            written = valid & ~inside if SPARSE else valid
            tl.store(grad_x_ptr + place, round_to(grad_x, grad_x_ptr.dtype.element_ty), mask=written)
        codes = round_half_even(clamp(ratio, LOW, HIGH))
        if y_ptr is not None:
            tl.store(y_ptr + place, round_to(codes * scale, y_ptr.dtype.element_ty), mask=valid)
        if sums_ptr is not None:
            total += grad_y.to(tl.float32) * (codes - tl.where(inside, ratio, 0.0))
    if sums_ptr is not None:
        sums = tl.sum(total, 1) * factor
        place = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(sums_ptr + place, round_to(sums, sums_ptr.dtype.element_ty), mask=row < S)


@triton.jit
def _sum_kernel(sums_ptr, grad_step_ptr, count, factor, BLOCK: tl.constexpr):
    """Add up the partial sums of one step size."""
    place = tl.arange(0, BLOCK)
    sums = tl.load(sums_ptr + tl.program_id(0) * count + place, mask=place < count, other=0.0)
    total = tl.sum(sums, 0) * factor
    tl.store(grad_step_ptr + tl.program_id(0), round_to(total, grad_step_ptr.dtype.element_ty))


def fake_quantized(x: Tensor, step_size: Tensor, spec: QuantSpec, dtype: torch.dtype | None = None) -> Tensor:
    """Do what ``qat.numerics.fake_quantized`` does, for bf16, fp16 and fp32 on a device that Triton compiles for."""
    source = in_memory_order(x, step_size)
    y = torch.empty_like(source, dtype=dtype)
    if x.numel():
        scales, block = step_size.numel(), x.numel() // step_size.numel()
        block_s, block_b = _tile(scales, block)
        tiles = ceil_div(block, block_b)
        arguments = source, step_size.contiguous(), y, scales, block, tiles
        constants = *_bounds(spec), block_s, block_b
        launch(_forward_kernel, (ceil_div(scales, block_s) * tiles,), arguments, constants, num_warps=WARPS)
    return _laid_out_as(x, y, step_size)


def fake_quantize_gradients(
    grad_output: Tensor, x: Tensor, step_size: Tensor, spec: QuantSpec, grad_scale: float, wanted=(True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Do what ``qat.numerics.fake_quantize_gradients`` does, under the same conditions."""
    source = in_memory_order(x, step_size)
    grad_x = torch.empty_like(source) if wanted[0] else None
    if grad_output.stride() != source.stride():
        grad_output = torch.empty_like(source, dtype=grad_output.dtype).copy_(grad_output)
    grad_step = _backward(grad_output, source, step_size, spec, grad_scale, grad_x, None, wanted[1])
    return None if grad_x is None else _laid_out_as(x, grad_x, step_size), grad_step


def requantize_(
    grad_output: Tensor,
    x: Tensor,
    step_size: Tensor,
    spec: QuantSpec,
    grad_scale: float,
    wanted=(True, True),
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Do what ``qat.numerics.requantize_`` does in one pass, where the layouts allow."""
    if not (x.stride() == grad_output.stride() and in_memory_order(x, step_size) is x):
        y = None if dtype is None else fake_quantized(x, step_size, spec, dtype)
        return y, *fake_quantize_gradients(grad_output, x, step_size, spec, grad_scale, wanted)
    y = None if dtype is None else torch.empty_like(x, dtype=dtype)
    grad_x = None
    if wanted[0]:
        grad_x = grad_output if grad_output.dtype == x.dtype else torch.empty_like(x)
    grad_step = _backward(grad_output, x, step_size, spec, grad_scale, grad_x, y, wanted[1])
    return y, grad_x, grad_step


def _backward(grad_y, x, step_size, spec, grad_scale, grad_x, y, step_wanted: bool) -> Tensor | None:
    """Fill grad_x and y where they are given, and return the gradient of the step size where it is wanted."""
    if not x.numel() or (grad_x is None and y is None and not step_wanted):
        return torch.zeros_like(step_size) if step_wanted else None
    scales, block = step_size.numel(), x.numel() // step_size.numel()
    block_s, block_b = _tile(scales, block)
    rows, tiles = ceil_div(scales, block_s), ceil_div(block, block_b)
    tiles_each = ceil_div(tiles, max(1, PARTIAL_SUMS // rows))
    programs = ceil_div(tiles, tiles_each)  # along B
    grad_step = sums = None
    if step_wanted:
        grad_step = torch.empty(step_size.shape, dtype=step_size.dtype, device=x.device)
        sums = grad_step if programs == 1 else x.new_empty(scales, programs, dtype=torch.float32)
    factor = grad_scale if programs == 1 else 1.0
    arguments = grad_y, x, step_size.contiguous(), grad_x, y, sums, scales, block, tiles_each, factor
    # Behind a ReLU half of all elements are 0, and masked: single elements take longer to write than all in a row.
    sparse = grad_x is grad_y and spec.signed is not False
    constants = sparse, *_bounds(spec), block_s, block_b
    launch(_backward_kernel, (rows, programs), arguments, constants, num_warps=WARPS)
    if step_wanted and programs > 1:
        size = next_power_of_2(programs)
        launch(_sum_kernel, (scales,), (sums, grad_step, programs, grad_scale), (size,), num_warps=WARPS)
    return grad_step


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


def _bounds(spec: QuantSpec) -> tuple[float, float, tl.dtype]:
    return float(-spec.q_n), float(spec.q_p), _TL_DTYPES[spec.scale_dtype]
