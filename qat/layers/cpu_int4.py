"""torch's own int4 operator for bf16 inputs on a CPU, where the layer's shape fits it.

It multiplies by the exact q * s, which bf16 would round: its result is nearer to the integers than a bf16 matmul's.
Its fp32 and fp16 paths are slower than dequantizing, so only bf16 comes here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import ScaleDtype
from .packed import PackedWeight

GROUP_SIZES = (32, 64, 128, 256)
ROW_MULTIPLE = 16


def fits(x: Tensor, weight: PackedWeight) -> bool:
    """Return whether the operator takes this input and weight (and no gradient is wanted, which it lacks)."""
    spec = weight.spec
    plain = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not (x.requires_grad and torch.is_grad_enabled())
    grid = spec.bits == 4 and spec.symmetric and spec.codebook is None and spec.group_size in GROUP_SIZES
    exact = spec.scale_dtype is ScaleDtype.bfloat16  # it reads scales so: others, such as GPTQ's, would be rounded
    return plain and grid and exact and weight.shape[0] % ROW_MULTIPLE == 0


def int4_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Return x @ W^T + bias for x (..., K) bf16."""
    if weight.cpu_operands is None:
        unsigned = weight.codes().to(torch.int32) + 8
        scale = weight.scale.t()
        operands = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()  # (groups, rows, scale and zero)
        weight.cpu_operands = torch._convert_weight_to_int4pack_for_cpu(unsigned, 1), operands
    tiles, scale_and_zero = weight.cpu_operands
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # the first token of each row is not, as BERT's pooler reads it
    y = torch._weight_int4pack_mm_for_cpu(rows, tiles, weight.spec.group_size, scale_and_zero)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias
