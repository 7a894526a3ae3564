"""What a Llama-like decoder does between the matrix products of one new token a sequence, in three kernels.

    add_rms_norm      h = x + update,  y = h / sqrt(mean(h^2) + eps) * weight       x, update, h, y (B, K)
    attend_cached     q, k turned by their position, k and v written to the cache, y = softmax(q k^T / sqrt(D)) v
    gated_silu        y = silu(gate) * up                                           gate and up side by side (B, 2 F)

bf16, fp16 or fp32; arithmetic in float32, and h, the turned q and k, and the softmax's weights rounded to that dtype,
where a composition of torch's operators would round them too. The result does not change from run to run.

A token's time at batch 1 is that of its weights' bytes and of everything that does not overlap with them. So on Hopper
and later these kernels let the next one start as soon as the one before has ended (programmatic dependent launch): the
int4 kernels then stream their weights while these run. ``qat.kernels.int4_registers`` says what that asks of a weight.

The references below are the CPU path, and the path wherever Triton is not installed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.errors import LayerError

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS
    triton = None

KEYS = 64  # positions that a step of the attention kernel reads


def add_rms_norm_reference(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return what ``add_rms_norm`` returns, in torch."""
    h = x.clone() if update is None else x + update
    wide = h.float()
    return h, (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype)


def attend_cached_reference(
    qkv: Tensor, cosine: Tensor, sine: Tensor, at: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Return what ``attend_cached`` returns, in torch; writes to the cache as well."""
    batch, kv_heads, positions, width = keys.shape
    q, k, v = qkv.view(batch, -1, width).split([qkv.shape[1] // width - 2 * kv_heads, kv_heads, kv_heads], 1)
    q, k = (_turned(part, cosine[at], sine[at]) for part in (q, k))
    keys.index_copy_(2, at, k[:, :, None])
    values.index_copy_(2, at, v[:, :, None])
    scores = q.unflatten(1, (kv_heads, -1)).float() @ keys.float().transpose(2, 3) * width**-0.5
    seen = torch.arange(positions, device=at.device) <= at
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ values.float()).to(qkv.dtype).reshape(batch, -1)


def gated_silu_reference(gate_up: Tensor) -> Tensor:
    """Return what ``gated_silu`` returns, in torch."""
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return (x.float() * cosine.float() + torch.cat([-second, first], -1) * sine.float()).to(x.dtype)


if triton is not None:
    from .launching import let_next_kernel_start, starts_early, take_turns, wait_for_previous_kernel
    from .rounding import INTERPRETED, dot, round_to

    @triton.jit
    def _add_rms_norm_kernel(
        x_ptr,  # (B, K)
        update_ptr,  # (B, K), or None
        weight_ptr,  # (K,)
        h_ptr,  # (B, K)
        y_ptr,  # (B, K)
        K,
        eps,
        BLOCK: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """Compute one row."""
        k = tl.arange(0, BLOCK)
        inside = k < K
        weight = tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
        take_turns(EARLY)
        at = tl.program_id(0).to(tl.int64) * K + k
        h = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if update_ptr is not None:
            h += tl.load(update_ptr + at, mask=inside, other=0.0).to(tl.float32)
        h = round_to(h, h_ptr.dtype.element_ty)
        tl.store(h_ptr + at, h, mask=inside)
        h = h.to(tl.float32)
        y = h * (1.0 / tl.sqrt(tl.sum(h * h, 0) / K + eps)) * weight
        tl.store(y_ptr + at, round_to(y, y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _to_l2(pointers):
        """Have the cache of the GPU ask for what the pointers point to, which others may still write."""
        asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l", [pointers.to(tl.int64)], tl.int32, False, 1)

    @triton.jit
    def _attend_cached_kernel(
        qkv_ptr,  # (B, heads + 2 kv_heads, D): queries, keys, values
        cosine_ptr,  # (C, D)
        sine_ptr,  # (C, D)
        at_ptr,  # (1,) int64
        keys_ptr,  # (B, kv_heads, C, D)
        values_ptr,  # (B, kv_heads, C, D)
        y_ptr,  # (B, heads, D)
        heads,
        kv_heads,
        C,
        factor,  # of the scores, for exp2
        QUERIES: tl.constexpr,  # of a key, padded
        D: tl.constexpr,
        KEYS: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """Attend with the queries that share one key: one program a sequence and key head."""
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        half: tl.constexpr = D // 2
        batch, head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
        group = heads // kv_heads
        first, d, query = tl.arange(0, half), tl.arange(0, D), tl.arange(0, QUERIES)
        at = tl.load(at_ptr)
        c1 = tl.load(cosine_ptr + at * D + first).to(tl.float32)
        c2 = tl.load(cosine_ptr + at * D + half + first).to(tl.float32)
        s1 = tl.load(sine_ptr + at * D + first).to(tl.float32)
        s2 = tl.load(sine_ptr + at * D + half + first).to(tl.float32)
        cache = tl.program_id(0).to(tl.int64) * C * D
        if EARLY:
            for start in range(0, at, KEYS):
                position = tl.minimum(start + tl.arange(0, KEYS), at - 1)  # nothing past the cache's end
                lines = cache + position[:, None] * D + tl.arange(0, D // 32)[None, :] * 32
                _to_l2(keys_ptr + lines)
                _to_l2(values_ptr + lines)
        wait_for_previous_kernel(EARLY)
        row = qkv_ptr + batch.to(tl.int64) * (heads + 2 * kv_heads) * D
        inside = (query < group)[:, None]
        q_ptrs = row + (head * group + query)[:, None] * D + first[None, :]
        q1 = tl.load(q_ptrs, mask=inside, other=0.0).to(tl.float32)
        q2 = tl.load(q_ptrs + half, mask=inside, other=0.0).to(tl.float32)
        k1 = tl.load(row + (heads + head) * D + first).to(tl.float32)
        k2 = tl.load(row + (heads + head) * D + half + first).to(tl.float32)
        v = tl.load(row + (heads + kv_heads + head) * D + d)
        let_next_kernel_start(EARLY)  # not before: the weights that it asks for would delay these loads
        q1, q2 = round_to(q1 * c1 - q2 * s1, dtype), round_to(q2 * c2 + q1 * s2, dtype)
        k1, k2 = round_to(k1 * c1 - k2 * s1, dtype), round_to(k2 * c2 + k1 * s2, dtype)
        tl.store(keys_ptr + cache + at * D + first, k1)
        tl.store(keys_ptr + cache + at * D + half + first, k2)
        tl.store(values_ptr + cache + at * D + d, v)

        # The new key comes from registers, all others from the cache.
        most = tl.sum(q1.to(tl.float32) * k1.to(tl.float32) + q2.to(tl.float32) * k2.to(tl.float32), 1) * factor
        total = tl.full((QUERIES,), 1.0, tl.float32)
        acc = tl.zeros((QUERIES, D), tl.float32) + v.to(tl.float32)[None, :]
        for start in range(0, at, KEYS):
            c = start + tl.arange(0, KEYS)
            seen = (c < at)[:, None]
            key_ptrs = keys_ptr + cache + c[:, None] * D + first[None, :]
            old1 = tl.load(key_ptrs, mask=seen, other=0.0)
            old2 = tl.load(key_ptrs + half, mask=seen, other=0.0)
            scores = dot(q1, tl.trans(old1), tl.zeros((QUERIES, KEYS), tl.float32))
            scores = dot(q2, tl.trans(old2), scores) * factor
            scores = tl.where((c < at)[None, :], scores, -float("inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(most - higher)
            total = total * shrink + tl.sum(weights, 1)
            old_v = tl.load(values_ptr + cache + c[:, None] * D + d[None, :], mask=seen, other=0.0)
            acc = dot(round_to(weights, dtype), old_v, acc * shrink[:, None])
            most = higher
        y = round_to(acc / total[:, None], dtype)
        y_ptrs = y_ptr + (batch.to(tl.int64) * heads + head * group + query)[:, None] * D + d[None, :]
        tl.store(y_ptrs, y, mask=inside)

    @triton.jit
    def _gated_silu_kernel(
        gate_up_ptr,  # (B, 2 F)
        y_ptr,  # (B, F)
        F,
        BLOCK: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """Compute BLOCK values of a row."""
        take_turns(EARLY)
        f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row = tl.program_id(1).to(tl.int64)
        gate = tl.load(gate_up_ptr + row * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + row * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
        y = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(y_ptr + row * F + f, round_to(y, y_ptr.dtype.element_ty), mask=f < F)


@torch.library.custom_op("qat::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (h, y): the sum of x (B, K) and an update like it, if there is one, and its norm."""
    if not _runs(x):
        return add_rms_norm_reference(x, update, weight, eps)
    x = x.contiguous()
    h, y = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    warps = min(16, max(1, block // 512))
    arguments = x, update if update is None else update.contiguous(), weight, h, y, x.shape[1], eps, block
    _launch(_add_rms_norm_kernel, (x.shape[0],), arguments, x, warps)
    return h, y


@torch.library.custom_op("qat::attend_cached", mutates_args=("keys", "values"))
def attend_cached(qkv: Tensor, cosine: Tensor, sine: Tensor, at: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the attention's output (B, heads * D) for one new token a sequence, which joins the cache.

    One program reads a key head's whole cache: for a few thousand positions; beyond them, many programs a head pay.

    Args:
        qkv: (B, (heads + 2 kv_heads) * D), queries first, then keys, then values.
        cosine, sine: (C, D) of the rotary embedding, whose pairs lie D / 2 apart.
        at: (1,) int64, the position of the new token, below C.
        keys, values: (B, kv_heads, C, D), contiguous. D is a power of two from 32.

    Raises:
        LayerError: shapes other than these.
    """
    batch, kv_heads, positions, width = keys.shape
    heads = qkv.shape[1] // width - 2 * kv_heads
    fits = qkv.shape == (batch, (heads + 2 * kv_heads) * width) and heads > 0 and heads % kv_heads == 0
    tables = cosine.shape == sine.shape and cosine.shape[0] >= positions and cosine.shape[1] == width
    contiguous = all(tensor.is_contiguous() for tensor in (cosine, sine, keys, values))
    if not (fits and tables and contiguous) or values.shape != keys.shape or width & (width - 1) or width < 32:
        shapes = [tuple(tensor.shape) for tensor in (qkv, cosine, sine, keys, values)]
        raise LayerError(f"attend_cached takes contiguous qkv, cosine, sine, keys and values that fit, not {shapes}")
    if not _runs(qkv):
        return attend_cached_reference(qkv, cosine, sine, at, keys, values)
    y = qkv.new_empty(batch, heads * width)
    queries = max(16, triton.next_power_of_2(heads // kv_heads))
    sizes = heads, kv_heads, positions, width**-0.5 * 1.4426950408889634
    arguments = qkv.contiguous(), cosine, sine, at, keys, values, y, *sizes, queries, width, KEYS
    _launch(_attend_cached_kernel, (batch * kv_heads,), arguments, qkv, 4)
    return y


@torch.library.custom_op("qat::gated_silu", mutates_args=())
def gated_silu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, (B, F), of a contiguous (B, 2 F)."""
    if not _runs(gate_up):
        return gated_silu_reference(gate_up)
    y = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    grid = triton.cdiv(y.shape[1], 256), y.shape[0]
    _launch(_gated_silu_kernel, grid, (gate_up.contiguous(), y, y.shape[1], 256), gate_up, 4)
    return y


@add_rms_norm.register_fake
def _(x, update, weight, eps):
    return torch.empty_like(x), torch.empty_like(x)


@attend_cached.register_fake
def _(qkv, cosine, sine, at, keys, values):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3])


@gated_silu.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _runs(x: Tensor) -> bool:
    if triton is None:
        return False
    return x.device.type in ("cuda", "xpu") or INTERPRETED.value


def _launch(kernel, grid: tuple, arguments: tuple, x: Tensor, warps: int) -> None:
    early = starts_early(x)
    options = {"num_warps": warps} | ({"launch_pdl": True} if early else {})
    if INTERPRETED.value:
        kernel[grid](*arguments, early, **options)
        return
    with torch.accelerator.device_index(x.device.index):
        kernel[grid](*arguments, early, **options)
