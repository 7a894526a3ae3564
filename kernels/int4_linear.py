"""W4A16 linear: int4 weights stay packed in memory and are dequantized in registers.

    y_MN = x_MK @ W_NK^T + bias_N        W_NK = round_to_x_dtype(float32(code_NK) * float32(scale))

M tokens (all leading axes of x), K inputs, N outputs, B = ceil(K / 2) bytes a row, G = K / group_size groups a row:
x_MK and y_MN are bf16, fp16 or fp32; packed_NB is uint8; scale_NG and bias_N are bf16, fp16 or fp32.

Layout: packed_NB is what ``qat.packing.pack(codes, 4)`` makes. Byte b of a row holds inputs 2b (low nibble) and 2b + 1
(high nibble) as u = code + 8. Symmetric only: there is no zero point.

Arithmetic: W_NK equals ``qat.numerics.dequantize(codes, scale, x.dtype)`` bit for bit. Products are summed in float32,
the bias is added in float32, and the sum is rounded once to the dtype of x. Without atomics or a split over K, a result
does not change from run to run. Autocast does not apply inside: x arrives in the dtype to compute in.

Bytes moved, at least: N * B + N * G * (bytes of a scale) for the weight, and (M * K + M * N) * (bytes of x).

The reference is ``int4_linear_reference`` below: it is the CPU path, and the path wherever Triton is not installed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.errors import LayerError
from qat.numerics import dequantize
from qat.packing import packed_row_bytes, unpack

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS
    triton = None

# A K tile lies within one group. With K tiles of 16, tl.interleave into tl.dot gave wrong sums on an H200 for M tiles
# below 64 and 16-bit x (Triton 3.6; likely the kWidth heuristic of triton-lang/triton#10645); 32 and 64 are right.
GROUP_MULTIPLE = 32

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def int4_linear_reference(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, in_features: int) -> Tensor:
    """Return what ``int4_linear`` returns, in torch; arguments as there.

    In float32 the products of 16-bit operands are exact, so this differs from the kernel by the order of the sum alone.
    """
    weight = dequantize(unpack(packed, 4, in_features), scale, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


if triton is not None:
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

    @triton.jit
    def _round(value, dtype: tl.constexpr):
        """Round float32 to ``dtype``, to nearest even."""
        if INTERPRETED and dtype == tl.bfloat16:
            # The interpreter's own conversion to bf16 truncates (Triton 3.9), so the low half is rounded away first.
            bits = value.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            value = bits.to(tl.float32, bitcast=True)
        return value.to(dtype)

    @triton.jit
    def _int4_linear_kernel(
        x_ptr,  # (M, K), contiguous
        packed_ptr,  # (N, B), contiguous
        scale_ptr,  # (N, G)
        bias_ptr,  # (N,), contiguous, or None
        y_ptr,  # (M, N), contiguous
        M,
        N,
        K,
        B,
        group_size,
        scale_stride_n,
        scale_stride_g,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,  # 32 or more; divides group_size, unless the group is the whole row
    ):
        """Compute one (BLOCK_M, BLOCK_N) tile of y; M varies fastest, so that neighbours share weights in L2."""
        programs_m = tl.cdiv(M, BLOCK_M)
        # 64-bit rows: a row index times a row length passes 2^31 in a large vocabulary or a long batch.
        row_m = (tl.program_id(0) % programs_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_n = (tl.program_id(0) // programs_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_m, inside_n = row_m < M, row_n < N
        dtype: tl.constexpr = x_ptr.dtype.element_ty

        acc_mn = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k_start in range(0, K, BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)
            byte = k_start // 2 + tl.arange(0, BLOCK_K // 2)
            x_mk = tl.load(x_ptr + row_m[:, None] * K + k, mask=inside_m[:, None] & (k < K), other=0.0)
            packed_nb = tl.load(packed_ptr + row_n[:, None] * B + byte, mask=inside_n[:, None] & (byte < B), other=0)
            scale_at = scale_ptr + row_n * scale_stride_n + (k_start // group_size) * scale_stride_g
            scale_n = tl.load(scale_at, mask=inside_n, other=0.0).to(tl.float32)

            code_nk = tl.interleave(packed_nb & 0xF, packed_nb >> 4).to(tl.float32) - 8.0
            w_nk = _round(code_nk * scale_n[:, None], dtype)
            # Padding reads as code -8, which a large scale takes to infinity, and 0 * infinity is NaN.
            w_nk = tl.where(k < K, w_nk, 0.0)
            if INTERPRETED:
                # The interpreter multiplies bit patterns of bf16 as integers (Triton 3.9); float32 products are exact.
                x_mk, w_nk = x_mk.to(tl.float32), w_nk.to(tl.float32)
            acc_mn = tl.dot(x_mk, tl.trans(w_nk), acc_mn, input_precision="ieee")

        if bias_ptr is not None:
            acc_mn += tl.load(bias_ptr + row_n, mask=inside_n, other=0.0).to(tl.float32)
        inside_mn = inside_m[:, None] & inside_n
        tl.store(y_ptr + row_m[:, None] * N + row_n, _round(acc_mn, dtype), mask=inside_mn)


def backend(device: torch.device) -> str:
    """Return what ``int4_linear`` runs on ``device``: "triton", "triton interpreter" or "torch reference"."""
    if triton is None:
        return "torch reference"
    if INTERPRETED.value:
        return "triton interpreter"
    return "triton" if device.type in ("cuda", "xpu") else "torch reference"


def _launch(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, in_features: int, group_size: int) -> Tensor:
    out_features = packed.shape[0]
    x_MK, packed_NB = x.reshape(-1, in_features).contiguous(), packed.contiguous()
    scale_NG = scale.expand(out_features, -1)
    y_MN = x.new_empty(x_MK.shape[0], out_features)
    # 64 x 64 x 64 float32 tiles, double-buffered, are 64 KiB of shared memory, which every GPU we name has.
    block_m = min(64, max(16, triton.next_power_of_2(x_MK.shape[0])))
    block_n = 64
    block_k = 64 if group_size == in_features else min(64, group_size & -group_size)
    programs = triton.cdiv(x_MK.shape[0], block_m) * triton.cdiv(out_features, block_n)
    if programs:
        with torch.accelerator.device_index(x.device.index):
            _int4_linear_kernel[(programs,)](
                x_MK,
                packed_NB,
                scale_NG,
                None if bias is None else bias.contiguous(),
                y_MN,
                x_MK.shape[0],
                out_features,
                in_features,
                packed_NB.shape[1],
                group_size,
                *scale_NG.stride(),
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                num_warps=4,
                num_stages=2,
            )
    return y_MN.view(*x.shape[:-1], out_features)


@torch.library.custom_op(
    "qat::int4_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int in_features, int group_size) -> Tensor",
)
def int4_linear(x, packed, scale, bias, in_features, group_size):
    """Return ``x @ W^T + bias`` for a packed int4 weight; differentiable in x and bias, the weight being frozen.

    Args:
        x: (..., K) bf16, fp16 or fp32.
        packed: (N, ceil(K / 2)) uint8, from ``qat.packing.pack(codes, 4)``.
        scale: (N, K / group_size) bf16, fp16 or fp32; (1, 1) where one scale serves the whole weight.
        bias: (N,) bf16, fp16 or fp32, or None.
        in_features: K, which the bytes of a row do not tell when it is odd.
        group_size: inputs that share a scale: a multiple of 32 that divides K, or K for the whole row.

    Returns:
        (..., N) in the dtype of x, contiguous.

    Raises:
        LayerError: a group size, shape, dtype or device other than these, or a scale that requires a gradient.
    """
    _check(x, packed, scale, bias, in_features, group_size)
    if backend(x.device) == "torch reference":
        return int4_linear_reference(x, packed, scale, bias, in_features)
    return _launch(x, packed, scale, bias, in_features, group_size)


@int4_linear.register_fake
def _fake(x, packed, scale, bias, in_features, group_size):
    _check(x, packed, scale, bias, in_features, group_size)
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    _, packed, scale, bias, in_features, _ = inputs
    if ctx.needs_input_grad[2]:
        raise LayerError("int4_linear has no gradient for its scale: the weight is frozen; pass scale.detach()")
    ctx.save_for_backward(packed, scale)
    ctx.in_features = in_features
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad_y: Tensor):
    """grad_x = grad_y @ W with W in the dtype of x; grad_bias = the sum of grad_y over tokens, in float32."""
    packed, scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        with torch.autocast(grad_y.device.type, enabled=False):
            grad_x = grad_y @ dequantize(unpack(packed, 4, ctx.in_features), scale, grad_y.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad_y.reshape(-1, packed.shape[0]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None


int4_linear.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, in_features: int, group_size: int) -> None:
    if in_features < 1 or x.dim() < 1 or x.shape[-1] != in_features:
        raise LayerError(
            f"x has shape {tuple(x.shape)}, and in_features={in_features}: its last axis must be that long"
        )
    if group_size != in_features and (group_size < 1 or in_features % group_size or group_size % GROUP_MULTIPLE):
        raise LayerError(
            f"group_size={group_size} with {in_features} inputs: int4_linear takes a multiple of {GROUP_MULTIPLE} that "
            f"divides the inputs, or the whole row: group_size={in_features}, which is granularity='channel'"
        )
    out_features, row_bytes, groups = packed.shape[0], packed_row_bytes(in_features, 4), in_features // group_size
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != row_bytes:
        raise LayerError(
            f"packed is {packed.dtype} {tuple(packed.shape)}: {in_features} inputs take torch.uint8 (N, {row_bytes}), "
            "from qat.packing.pack(codes, 4)"
        )
    if tuple(scale.shape) != (out_features, groups) and not (groups == 1 and tuple(scale.shape) == (1, 1)):
        raise LayerError(
            f"scale is {tuple(scale.shape)}: {out_features} outputs with group_size={group_size} and {in_features} "
            f"inputs take ({out_features}, {groups})" + (" or (1, 1)" if groups == 1 else "")
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise LayerError(f"bias has shape {tuple(bias.shape)}: {out_features} outputs take ({out_features},)")
    for name, tensor in (("x", x), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise LayerError(f"{name} is {tensor.dtype}: cast it to bfloat16, float16 or float32")
    for name, tensor in (("packed", packed), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise LayerError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
