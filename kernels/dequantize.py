"""4-bit codes to weights in one pass: what a frozen layer multiplies by where a matrix product is worth one.

    w_I = round_to_dtype((levels[u_I] - zero_S) * scale_S)          S = I // group_size

I runs over the N * K weights row-major, and group_size of them in a row share a scale: a group, a row, or all.
packed_NB is uint8 with B = K / 2, and byte b of a row holds inputs 2b (low nibble) and 2b + 1 (high nibble), which is
``qat.packing.pack(codes, 4)``. levels_16 is float32: a codebook's, or -8 to 7, with which this is the even grid's
(code - zero point) * scale. scale_S is bf16, fp16 or fp32, zero_S int8, fp16, bf16 or fp32, and w bf16, fp16 or fp32.

Arithmetic: float32, rounded once. Equal to the bit to ``qat.numerics.dequantize`` and ``qat.codebook.dequantize``.

Bytes moved, at least: N * B, the scales, and N * K times the bytes of w.

The reference is ``dequantize4_reference`` below: it is the CPU path, and the path wherever Triton is not installed.
"""

import torch
from torch import Tensor

from qat.errors import LayerError
from qat.packing import unpack

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS
    triton = None

BLOCK = 2048  # bytes a program reads
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def dequantize4_reference(
    packed: Tensor, scale: Tensor, levels: Tensor, zero_point: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Return what ``dequantize4`` returns, in torch; arguments as there."""
    values = levels.float()[unpack(packed, 4, 2 * packed.shape[1], 0).int()]
    grouped = values.reshape(-1, group_size)
    if zero_point is not None:
        grouped = grouped - zero_point.float().reshape(-1, 1)
    return (grouped * scale.float().reshape(-1, 1)).to(dtype).view(values.shape)


if triton is not None:
    from qat.kernels.rounding import round_to

    @triton.jit
    def _dequantize4_kernel(
        packed_ptr,  # (N * B,)
        scale_ptr,  # (S,)
        levels_ptr,  # (16,) float32
        zero_ptr,  # (S,), or None
        w_ptr,  # (N * K,)
        bytes_all,
        group_bytes,
        BLOCK: tl.constexpr,
    ):
        """Compute 2 * BLOCK weights."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < bytes_all
        byte = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
        group = at // group_bytes
        scale = tl.load(scale_ptr + group, mask=inside, other=0.0).to(tl.float32)
        low = tl.load(levels_ptr + (byte & 0xF))
        high = tl.load(levels_ptr + (byte >> 4))
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + group, mask=inside, other=0).to(tl.float32)
            low, high = low - zero, high - zero
        out = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        w = round_to(tl.interleave(low * scale, high * scale), w_ptr.dtype.element_ty)
        tl.store(w_ptr + out, w, mask=out < 2 * bytes_all)


@torch.library.custom_op(
    "qat::dequantize4",
    mutates_args=(),
    schema="(Tensor packed, Tensor scale, Tensor levels, Tensor? zero_point, int group_size, ScalarType dtype)"
    " -> Tensor",
)
def dequantize4(packed, scale, levels, zero_point, group_size, dtype):
    """Return the weight (N, 2 * B) in ``dtype``.

    Args:
        packed: (N, B) uint8.
        scale: one for each ``group_size`` weights, row-major, in any shape.
        levels: (16,) float32.
        zero_point: like the scale, or None.
        group_size: even.
        dtype: bf16, fp16 or fp32.

    Raises:
        LayerError: shapes or dtypes other than these.
    """
    _check(packed, scale, levels, zero_point, group_size, dtype)
    if triton is None or not (packed.device.type in ("cuda", "xpu") or triton.knobs.runtime.interpret):
        return dequantize4_reference(packed, scale, levels, zero_point, group_size, dtype)
    w = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=dtype, device=packed.device)
    programs = triton.cdiv(packed.numel(), BLOCK)
    if programs:
        with torch.accelerator.device_index(packed.device.index):
            _dequantize4_kernel[(programs,)](
                packed.contiguous(),
                scale.contiguous(),
                levels.contiguous(),
                None if zero_point is None else zero_point.contiguous(),
                w,
                packed.numel(),
                group_size // 2,
                BLOCK=BLOCK,
                num_warps=8,
            )
    return w


@dequantize4.register_fake
def _fake(packed, scale, levels, zero_point, group_size, dtype):
    _check(packed, scale, levels, zero_point, group_size, dtype)
    return torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=dtype, device=packed.device)


def _check(packed, scale, levels, zero_point, group_size: int, dtype: torch.dtype) -> None:
    weights = 2 * packed.numel()
    if packed.dtype != torch.uint8 or packed.dim() != 2 or dtype not in FLOATS or tuple(levels.shape) != (16,):
        raise LayerError(
            f"dequantize4 takes uint8 (N, B), 16 levels and bf16, fp16 or fp32, not {packed.dtype} "
            f"{tuple(packed.shape)}, {tuple(levels.shape)} and {dtype}"
        )
    if group_size < 2 or group_size % 2 or scale.numel() * group_size != weights:
        raise LayerError(f"dequantize4 takes groups of an even size, one scale each: {scale.numel()} of {group_size}")
    if zero_point is not None and zero_point.numel() != scale.numel():
        raise LayerError(f"dequantize4 takes a zero point a scale: {zero_point.numel()} and {scale.numel()}")
