"""float32 multiplied as float32 for a while, where PyTorch or its user lets it be done in fewer bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch


@contextmanager
def in_float32(matmul: bool = False) -> Iterator[None]:
    """Have cuDNN multiply float32 as float32 for a ``with`` block, and not in TF32, as torch lets it.

    TF32's 11 bits round what a convolution multiplies, and so move values across the thresholds of the next quantizer:
    the accuracy of a network of 2 bits changes by up to 0.4 points (benchmarks/NOTES.md).

    What somebody chose by torch's newer names, ``fp32_precision``, stays as chosen: torch then refuses its older ones,
    by which Inductor asks.

    Args:
        matmul: matrix products too, which torch does in float32 unless its user chose otherwise.
    """
    cudnn = torch.backends.cudnn
    with ExitStack() as restored:
        with suppress(RuntimeError):
            before = cudnn.allow_tf32
            cudnn.allow_tf32 = False
            restored.callback(setattr, cudnn, "allow_tf32", before)
        if matmul:
            with suppress(RuntimeError):
                precision = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("highest")
                restored.callback(torch.set_float32_matmul_precision, precision)
        yield
