"""How llama.cpp rounds the inputs of its products, put on a frozen model of ours: what a GGUF file computes there.

ggml multiplies a matrix with inputs in the type that goes with the matrix's own (``type_traits_cpu.vec_dot_type``):

    Q4_0, Q8_0   Q8_0: int8 for each 32 inputs, ``Dynamic.q8_0``
    Q4_1         Q8_1: the same codes, and for the minima (w = d * u + m) their sum, s = fp16(amax / 127 * sum q), which
                 stands in the product for d8 * sum q
    F16, BF16    that type
    F32          none
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.linear import FrozenLinear
from ..quantizers import DynamicActivation
from ..quantizers.dynamic import dynamic_codes
from ..spec import Dynamic
from .gguf_blocks import BLOCK, BYTES
from .gguf_names import gguf_names, row_order

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def round_inputs_(frozen: nn.Module, file: Path, config: dict[str, Any]) -> None:
    """Let every linear layer of a frozen float32 model round its input as llama.cpp does for a file's matrix."""
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    owners = {parameter: name for name, parameter in frozen.named_parameters()}  # of the head perhaps the embedding
    for name, layer in frozen.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if not isinstance(layer, FrozenLinear):
            weight = owners[layer.weight]
            dtype = DTYPES[stored[gguf_names(config, [weight])[weight]].tensor_type.name]
            layer.register_forward_pre_hook(lambda _, inputs, dtype=dtype: inputs[0].to(dtype).float())
            continue
        layer.activation_quantizer = DynamicActivation(Dynamic.q8_0)
        matrix = stored.get(gguf_names(config, [f"{name}.weight"])[f"{name}.weight"])  # a tied head has none
        if matrix is not None and matrix.tensor_type.name == "Q4_1":
            order = row_order(config, f"{name}.weight")
            minima = _minima(torch.from_numpy(matrix.data.copy()))
            minima = minima if order is None else minima[order.argsort()]
            layer.register_forward_hook(
                lambda _, inputs, y, minima=minima: y + _rounding_of_sums(inputs[0]) @ minima.t()
            )


def _minima(blocks: Tensor) -> Tensor:
    """Return m, float32 (N, K / 32), of Q4_1 blocks uint8 (N, bytes)."""
    parts = blocks.reshape(blocks.shape[0], -1, BYTES["Q4_1"])
    return parts[..., 2:4].contiguous().view(torch.float16)[..., 0].float()


def _rounding_of_sums(x: Tensor) -> Tensor:
    """Return s - d8 * sum q for each block of x (..., K): float32 (..., K / 32)."""
    codes, scale, _ = dynamic_codes(x, Dynamic.q8_0)
    sums = codes.sum(-1)
    largest = x.float().unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    unrounded = largest / torch.full_like(largest, 127)
    return (unrounded * sums).half().float() - scale[..., 0] * sums
