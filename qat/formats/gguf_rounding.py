"""How llama.cpp rounds, put on a frozen model of ours: what a GGUF file computes there.

ggml multiplies a matrix with inputs in the type that goes with the matrix's own (``type_traits_cpu.vec_dot_type``):

    Q4_0, Q8_0   Q8_0: int8 for each 32 inputs, ``Dynamic.q8_0``
    Q4_1         Q8_1: the same codes, and for the minima (w = d * u + m) their sum, s = fp16(amax / 127 * sum q), which
                 stands in the product for d8 * sum q
    F16, BF16    that type
    F32          none

An input in the middle of two codes goes where the last bit of the norm before it says, and an untrained norm of ones
after an 8-bit embedding, which gives whole numbers times one factor, leaves many there: so norms are ggml's to the bit,
y = x * (1 / sqrt(float32(sum x^2 / n) + eps)), float32 squares summed in float64 (``ggml_compute_forward_rms_norm``).
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


def round_as_llama_cpp_(frozen: nn.Module, file: Path, config: dict[str, Any]) -> None:
    """Let a frozen float32 model's linear layers round their inputs as llama.cpp does for a file, and its norms too."""
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    owners = {parameter: name for name, parameter in frozen.named_parameters()}  # of the head perhaps the embedding
    for name, layer in frozen.named_modules():
        if type(layer).__name__.endswith("RMSNorm"):  # all architectures' norms have this formula
            layer.register_forward_hook(lambda norm, inputs, _: _norm(inputs[0], norm.weight, norm.variance_epsilon))
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


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return ggml's norm of float32 x (..., K)."""
    mean = (x * x).double().mean(-1, keepdim=True).float()
    scale = 1 / (mean + epsilon).double().sqrt().float()  # a float32 root of MKL's is not the nearest on every CPU
    return x * scale * weight


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
