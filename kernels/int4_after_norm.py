"""What a decoder does to one token around a matrix product, within its int4 kernel, on Hopper.

    norm_linear     h = x + update,  y = (h / sqrt(mean(h^2) + eps) * norm) W^T + bias          x, update, h (1, K)
    norm_gated      the same h, and silu(gate) * up of such a y, whose halves gate and up are (1, F)

At one token a kernel's start and end take as long as ``add_rms_norm`` and ``gated_silu`` of ``decode_step`` do. Here
every program of ``int4_stream`` makes the norm for itself, with the same arithmetic and rounding, while its first
weights come, and works in turn on a row block of gates and the one that they gate. Where that kernel does not run, at
other numbers of tokens and on other devices, one is done after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import LayerError

from .decode_step import add_rms_norm, gated_silu
from .int4_layout import ROWS, SIZES, TENSORS, Int4Weight
from .int4_linear import check, int4_linear

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    from . import int4_run
    from .int4_arguments import operands_of, stream_launch
    from .int4_plans import Stream
    from .int4_registers import let_next_kernel_start, wait_for_previous_kernel
    from .int4_ring import allocate_x, inputs, start_reading
    from .int4_stream import hold, multiply
except ImportError:  # there is no Triton for macOS
    int4_run = None


def reference(
    x: Tensor, update: Tensor | None, norm: Tensor, eps: float, weight: Int4Weight, bias: Tensor | None, gated: bool
) -> tuple[Tensor, Tensor]:
    """Return what ``norm_gated`` or ``norm_linear`` returns, one after the other."""
    h, x = add_rms_norm(x, update, norm, eps)
    y = int4_linear(x, weight, bias)
    return h, gated_silu(y) if gated else y


if int4_run is not None:

    @gluon.jit
    def norm_stream_kernel(
        x_ptr,  # (1, K)
        update_ptr,  # (1, K), or like x where there is none
        norm_ptr,  # (K,)
        h_ptr,  # (1, K)
        eps,
        words_ptr,
        scale_ptr,
        zero_ptr,
        levels_ptr,
        bias_ptr,
        y_ptr,
        N,
        K,
        row_blocks,
        tiles,
        groups,
        HAS_UPDATE: gl.constexpr,
        PARTS: gl.constexpr,  # 2 where the first half of the rows are gates of the second
        GROUP: gl.constexpr,
        HALVES: gl.constexpr,
        HAS_ZERO: gl.constexpr,
        HAS_LEVELS: gl.constexpr,
        HAS_BIAS: gl.constexpr,
        WHOLE: gl.constexpr,
        STEPS: gl.constexpr,
        WARPS: gl.constexpr,
        TILES: gl.constexpr,
        STAGES: gl.constexpr,
        EARLY: gl.constexpr,
    ):
        """Multiply the norm of x + update; see ``int4_stream`` for the weight."""
        dtype: gl.constexpr = x_ptr.dtype.element_ty
        if EARLY == 1:
            let_next_kernel_start()
        reading = start_reading(
            *(words_ptr, scale_ptr, zero_ptr, row_blocks, tiles, groups),
            *(GROUP, HALVES, HAS_ZERO, PARTS, WHOLE, STEPS, WARPS, TILES, STAGES),
        )
        norms = ()
        for step in gl.static_range(STEPS):
            k = inputs(step, TILES, WARPS)
            norms = norms + (gl.load(norm_ptr + k, mask=k < K, other=0.0),)
        if EARLY > 0:
            wait_for_previous_kernel()
        total = 0.0
        hs = ()
        for step in gl.static_range(STEPS):
            k = inputs(step, TILES, WARPS)
            h = gl.load(x_ptr + k, mask=k < K, other=0.0)
            if HAS_UPDATE:
                h = h.to(gl.float32) + gl.load(update_ptr + k, mask=k < K, other=0.0).to(gl.float32)
                h = h.to(dtype)
            if EARLY == 3 and step == STEPS - 1:
                let_next_kernel_start()
            if gl.program_id(0) == 0:
                gl.store(h_ptr + k, h, mask=k < K)
            hs = hs + (h,)
            h = h.to(gl.float32)
            total += gl.sum(gl.reshape(h * h, [TILES * WARPS * 64]), 0)
        factor = 1.0 / gl.sqrt(total / K + eps)
        x_shared = allocate_x(dtype, STEPS, TILES, WARPS)
        for step in gl.static_range(STEPS):
            x = hs[step].to(gl.float32) * factor * norms[step].to(gl.float32)
            x_shared.index(step).store(x.to(dtype))
        held = hold(x_shared, STEPS, WARPS, TILES)
        multiply(
            *(reading, x_shared, held, levels_ptr, bias_ptr, y_ptr, 1, N, row_blocks, tiles, groups),
            *(
                dtype,
                1,
                GROUP,
                HALVES,
                HAS_ZERO,
                HAS_LEVELS,
                HAS_BIAS,
                PARTS,
                WHOLE,
                STEPS,
                WARPS,
                TILES,
                STAGES,
                EARLY,
            ),
        )


def norm_linear(
    x: Tensor, update: Tensor | None, norm: Tensor, eps: float, weight: Int4Weight, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (h, y): the sum of x (B, K) and an update like it, if there is one, and the product (B, N) of its norm.

    Args:
        x, update: of one dtype, bf16, fp16 or fp32.
        norm: (K,) in that dtype.
        weight, bias: of ``int4_linear``.

    Raises:
        LayerError: a shape, dtype or device other than these, or what ``int4_linear`` does not take.
    """
    return torch.ops.qat.norm_linear(x, update, norm, eps, *weight.tensors(), bias, *weight.sizes(), False)


def norm_gated(
    x: Tensor, update: Tensor | None, norm: Tensor, eps: float, weight: Int4Weight, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (h, silu(gate) * up), (B, N / 2), where gate and up are the halves of ``norm_linear``'s product."""
    return torch.ops.qat.norm_linear(x, update, norm, eps, *weight.tensors(), bias, *weight.sizes(), True)


def _plan(x: Tensor, others: tuple[Tensor | None, ...], weight: Int4Weight, gated: bool) -> Stream | None:
    """Return how the kernel runs, for others that fit; None where it does not."""
    if int4_run is None or x.shape[0] != 1 or weight.nest is not None or not int4_run.suits_nvidia(x, weight):
        return None
    halves = not gated or weight.out_features % (2 * ROWS) == 0
    aligned = all(t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0) for t in (x, *others))
    if not (halves and aligned and x.shape[1] % ROWS == 0):
        return None
    plan = int4_run.plan_for(x, weight, x.device.index)
    # An attention kernel that could start at once, as after another plan, took 10 us longer (benchmarks/NOTES.md).
    return plan._replace(early=3) if isinstance(plan, Stream) and plan.early else None


def _check(
    x: Tensor, update: Tensor | None, norm: Tensor, weight: Int4Weight, bias: Tensor | None, gated: bool
) -> None:
    """Raise LayerError for what does not fit: the kernel would read past its end, or as another dtype."""
    check(x, weight, bias)
    if x.dim() != 2:
        raise LayerError(f"x has shape {tuple(x.shape)}: a norm before a product takes (tokens, {weight.in_features})")
    for name, tensor, shape in (("update", update, x.shape), ("norm", norm, x.shape[1:])):
        wanted = tuple(shape), x.dtype, x.device
        found = wanted if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device)
        if found != wanted:
            raise LayerError(f"{name} is {_described(*found)}: beside x, {_described(*wanted)} fits")
    if gated and weight.out_features % 2:
        raise LayerError(f"{weight.out_features} outputs: gates and what they gate are as many")


def _described(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"{dtype} {shape} on {device}"


_library = torch.library.Library("qat", "FRAGMENT")
_library.define(
    f"norm_linear(Tensor x, Tensor? update, Tensor norm, float eps, {TENSORS}, Tensor? bias, {SIZES}, bool gated)"
    " -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "norm_linear", "CompositeExplicitAutograd")
def _norm_linear(x, update, norm, eps, words, scale, zero_point, levels, nest, bias, *sizes_and_gated):
    *sizes, gated = sizes_and_gated
    weight = Int4Weight.of(words, scale, zero_point, levels, nest, *sizes)
    _check(x, update, norm, weight, bias, gated)
    plan = _plan(x, (update, norm, bias), weight, gated)
    if plan is None:
        return reference(x, update, norm, eps, weight, bias, gated)
    h, y = torch.empty_like(x), x.new_empty(1, weight.out_features // (2 if gated else 1))
    _, key, grid, tail = stream_launch(plan, x, weight, bias)
    kind = update is not None, 2 if gated else 1
    arguments = x, x if update is None else update, norm, h, eps, *operands_of(weight, bias, x), y
    with torch.cuda.device(x.device.index):
        arguments += *tail[:5], *kind, *tail[5:]  # sizes, then constexprs
        int4_run.launch(norm_stream_kernel, (key, kind), grid, arguments, plan.warps, plan.early)
    return h, y


@torch.library.register_fake("qat::norm_linear", lib=_library)
def _norm_linear_fake(x, update, norm, eps, words, scale, zero_point, levels, nest, bias, *sizes_and_gated):
    *sizes, gated = sizes_and_gated
    weight = Int4Weight.of(words, scale, zero_point, levels, nest, *sizes)
    _check(x, update, norm, weight, bias, gated)
    return torch.empty_like(x), x.new_empty(x.shape[0], weight.out_features // (2 if gated else 1))
