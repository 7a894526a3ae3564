"""The int4 kernels of a model that is being read are compiled meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .backend import has_triton
from .numerics import scale_dtype, zero_point_dtype
from .spec import Codebook

if TYPE_CHECKING:
    from qat.kernels.int4_ahead import Product

    from .quantized_model import QuantizedModel


@contextmanager
def compiled_ahead(quantized: QuantizedModel, tokens: Iterable[int], device: torch.device | str) -> Iterator[None]:
    """Compile kernels in the background of a ``with`` block, which ends when they are there; for NVIDIA GPUs alone.

    Args:
        quantized: only its linear layers' shapes and specs are asked for, each layer by itself.
        tokens: the numbers of tokens, batch times length, that calls will have.
        device: where the model goes.
    """
    device, tokens = torch.device(device), sorted(set(tokens))
    if not tokens or device.type != "cuda" or torch.version.cuda is None or not has_triton():
        yield
        return
    from qat.kernels.int4_ahead import compile_ahead  # which needs Triton

    index = torch.cuda.current_device() if device.index is None else device.index
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(compile_ahead, products(quantized), tokens, index)
        yield
        done.result()


def products(quantized: QuantizedModel) -> list[Product]:
    """Return a model's different products with 4-bit weights, in the dtype of their scales, or bf16 with NF4."""
    from qat.kernels.int4_ahead import Product
    from qat.kernels.int4_layout import GROUP_MULTIPLE

    found, dense = {}, {*quantized.dense, *quantized.tied}
    for name, layer in quantized.layers.items():
        spec, columns = layer.weight, math.prod(layer.shape[1:])
        # Of a custom codebook, and of scales that are quantized too, the spec does not say all.
        if layer.type != "Linear" or spec is None or spec.bits != 4 or spec.codebook not in (None, Codebook.nf4):
            continue
        group_size, table = spec.group_size or columns, spec.codebook is not None
        if group_size % GROUP_MULTIPLE and group_size != columns:
            continue
        scale = torch.float32 if table else scale_dtype(spec)
        zero_point = None if spec.symmetric else zero_point_dtype(spec)
        dtype = torch.bfloat16 if table else scale
        sizes = layer.shape[0], columns, group_size
        found[Product(*sizes, scale, zero_point, table, f"{name}.bias" in dense, dtype)] = None
    return list(found)
