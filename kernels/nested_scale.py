"""The scales of a double-quantized weight, in the order in which the int4 kernels read them.

    scale = levels[code] * factor + offset        one factor for 256 scales in row-major order

(``qat.double_quantization``). code_BG16 is uint8, a scale's code for each output of row block B and group G, as
``int4_layout.prepack`` lays scales out; the result is float32 like it, 0 for outputs past the last. Each operation is
rounded by itself, so the bits are those of ``NestedScale.values``. ``int4_run`` makes the scales just before a product:
held, they would add an eighth to the weight's bytes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qat.double_quantization import BLOCK, NestedScale

from .int4_layout import from_tiles, to_tiles

LEVELS = 256


def join(nested: NestedScale) -> Tensor:
    """Return the offset, the levels and the factors in one tensor: float32 (257 + F,)."""
    return torch.cat([nested.offset.view(1), nested.levels, nested.factor])


def nested_scale_reference(codes: Tensor, nest: Tensor, out_features: int) -> Tensor:
    """Return what ``nested_scale`` returns, in torch."""
    offset, levels, factor = nest[0], nest[1 : 1 + LEVELS], nest[1 + LEVELS :]
    return to_tiles(NestedScale(from_tiles(codes, out_features), factor, offset, levels).values())


try:
    import triton
    import triton.language as tl

    from .launching import MOST, Launch, ceil_div
except ImportError:  # there is no Triton for macOS
    triton = None
else:

    @triton.jit
    def _nested_scale_kernel(
        code_ptr,  # (row blocks, groups, 16)
        nest_ptr,  # (257 + F,)
        scale_ptr,  # like code
        size,
        groups,
        N,
        PER_FACTOR: tl.constexpr,
        LEVELS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Compute BLOCK scales."""
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row = at // (16 * groups) * 16 + at % 16
        inside = (at < size) & (row < N)
        factor_at = (row.to(tl.int64) * groups + at // 16 % groups) // PER_FACTOR
        code = tl.load(code_ptr + at, mask=inside, other=0).to(tl.int32)
        level = tl.load(nest_ptr + 1 + code)
        factor = tl.load(nest_ptr + 1 + LEVELS + factor_at, mask=inside, other=0.0)
        scale = level * factor + tl.load(nest_ptr)
        tl.store(scale_ptr + at, tl.where(inside, scale, 0.0), mask=at < size)

    @lru_cache(MOST)
    def _scale_launch(size: int, groups: int, out_features: int) -> Launch:
        rest = size, groups, out_features, BLOCK, LEVELS, 1024
        fused = False  # a product and a sum, not one
        return Launch(_nested_scale_kernel, (ceil_div(size, 1024),), rest, enable_fp_fusion=fused)


def nested_scale(codes: Tensor, nest: Tensor, out_features: int) -> Tensor:
    """Return the scales: float32 (row blocks, groups, 16).

    Args:
        codes: uint8 (row blocks, groups, 16), contiguous.
        nest: from ``join``.
        out_features: N.
    """
    scale = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    size = codes.numel()
    if size:
        _scale_launch(size, codes.shape[1], out_features)(codes, nest, scale)
    return scale
