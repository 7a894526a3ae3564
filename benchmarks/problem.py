"""The weights that the int4 benchmarks multiply with, and other projects' kernels on them.

Every maker below returns one call a copy of the weight, each taking x. A project that is not installed, or does not
take the problem, raises; the benchmark prints why in the place of a number.
"""

from __future__ import annotations

import copy
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from qat.kernels.int4_layout import Int4Weight, prepack
from qat.kernels.int4_linear import int4_dequantize, int4_linear
from qat.kernels.int4_plans import Dequantize
from qat.kernels.int4_run import run_plan
from torch import Tensor

from benchmarks.timing import copies
from qat import codebook
from qat.packing import pack

GROUP_SIZE = 128
Calls = list[Callable[[Tensor], Tensor]]

LLAMA_8B = {"o": (4096, 4096), "qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LLAMA_70B = {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}


def parse_shape(text: str) -> tuple[int, int]:
    """Read NxK, for argparse.

    Raises:
        ArgumentTypeError: it is no such shape, or its rows are no whole groups.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None or int(found[2]) % GROUP_SIZE:
        raise ArgumentTypeError(
            f"{text!r}: give NxK, outputs and inputs, such as 4096x14336; K a multiple of {GROUP_SIZE}"
        )
    return int(found[1]), int(found[2])


@dataclass
class Problem:
    """Random codes and scales of an N x K weight, and as many copies as the timing rotates."""

    codes: Tensor  # (N, K) int8
    scale: Tensor  # (N, K / 128)
    weights: list[Int4Weight]

    @classmethod
    def random(cls, outputs: int, inputs: int, dtype: torch.dtype, rotated: bool = True) -> Problem:
        """Make one on the GPU, with scales that bf16 and fp16 both hold exactly."""
        codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8, device="cuda")
        scale = (torch.rand(outputs, inputs // GROUP_SIZE, device="cuda") * 0.01 + 0.001).bfloat16().to(dtype)
        weight = prepack(pack(codes, 4), scale, None, inputs, GROUP_SIZE)
        count = copies(outputs * inputs / 2) if rotated else 1
        weights = [weight, *(weight._replace(words=weight.words.clone()) for _ in range(count - 1))]
        torch.cuda.synchronize()
        return cls(codes, scale, weights)

    def weight_bytes(self, kernel: str) -> int:
        """Return the bytes of packed codes and scales, which NF4 has in float32 for 64 weights."""
        words = self.weights[0].words
        return words.nbytes + (words.nbytes // 8 if "NF4" in kernel else self.weights[0].scale.nbytes)

    def dense(self) -> Tensor:
        """Return the dequantized weight."""
        return int4_dequantize(self.weights[0], self.scale.dtype)


def ours(problem: Problem) -> Calls:
    """int4_linear, as a frozen layer calls it."""
    return [lambda x, w=w: int4_linear(x, w) for w in problem.weights]


def ours_dequantized(problem: Problem) -> Calls:
    """Our dequantization and the library's matmul, whatever the number of tokens."""
    return [lambda x, w=w: run_plan(Dequantize(), x, w, None) for w in problem.weights]


def cublas(problem: Problem) -> Calls:
    """The dense weight in the dtype of x."""
    dense = problem.dense()
    weights = [dense, *(dense.clone() for _ in range(copies(dense.nbytes) - 1))]
    return [lambda x, w=w: F.linear(x, w) for w in weights]


def humming(problem: Problem) -> Calls:
    """humming-kernels: CUDA, compiled at its first call for each regime."""
    from humming.layer import HummingLayer

    outputs, inputs = problem.codes.shape
    dtype = problem.scale.dtype
    name = str(dtype).removeprefix("torch.")
    config = {"dtype": "uint4", "group_size": GROUP_SIZE, "scale_dtype": name}
    layer = HummingLayer(shape_n=outputs, shape_k=inputs, weight_config=config, torch_dtype=dtype).cuda()
    layer.load_from_unquantized(problem.dense())
    layer.transform()
    layers = [layer, *(copy.deepcopy(layer) for _ in problem.weights[1:])]
    return [lambda x, layer=layer: layer(x) for layer in layers]


def gemlite(problem: Problem) -> Calls:
    """gemlite: Triton, with the configurations that it ships for the device."""
    from gemlite.core import DType, GemLiteLinearTriton

    outputs, inputs = problem.codes.shape
    dtype = DType.BF16 if problem.scale.dtype == torch.bfloat16 else DType.FP16
    layers = []
    for _ in problem.weights:
        layer = GemLiteLinearTriton(4, GROUP_SIZE, inputs, outputs, dtype, dtype)
        scale = problem.scale.reshape(-1, 1)
        layer.pack((problem.codes + 8).to(torch.uint8), scale, torch.full_like(scale, 8), None)
        layers.append(layer)
    return [lambda x, layer=layer: layer(x) for layer in layers]


def tinygemm(problem: Problem) -> Calls:
    """torch's and torchao's int4 operator; bf16 only."""
    if problem.scale.dtype != torch.bfloat16:
        raise TypeError("bf16 only")
    u = (problem.codes + 8).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(u[:, ::2] << 4 | u[:, 1::2], 8)
    scale = problem.scale.t().contiguous()
    scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()
    tiles = [packed, *(packed.clone() for _ in problem.weights[1:])]
    return [lambda x, t=t: torch.ops.aten._weight_int4pack_mm(x, t, GROUP_SIZE, scale_and_zero) for t in tiles]


def _nf4(problem: Problem) -> list[Int4Weight]:
    scale = torch.rand(problem.codes.shape[0], problem.codes.shape[1] // 64, device="cuda")
    levels = torch.tensor(codebook.NF4, device="cuda")
    first = prepack(pack(problem.codes, 4), scale, None, problem.codes.shape[1], 64, levels)
    return [first, *(first._replace(words=first.words.clone()) for _ in problem.weights[1:])]


def ours_nf4(problem: Problem) -> Calls:
    """int4_linear with NF4 in blocks of 64 and float32 scales, as a frozen layer calls it."""
    return [lambda x, w=w: int4_linear(x, w) for w in _nf4(problem)]


def ours_nf4_dequantized(problem: Problem) -> Calls:
    """The same weight dequantized, and the library's matmul, whatever the number of tokens."""
    return [lambda x, w=w: run_plan(Dequantize(), x, w, None) for w in _nf4(problem)]


def bitsandbytes(problem: Problem) -> Calls:
    """bitsandbytes NF4 in blocks of 64."""
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(problem.dense(), quant_type="nf4", blocksize=64)
    tensors = [packed, *(packed.clone() for _ in problem.weights[1:])]
    return [lambda x, t=t: bnb.matmul_4bit(x, t.t(), state) for t in tensors]


Kernels = dict[str, Callable[[Problem], Calls]]
KERNELS: Kernels = {
    "qat": ours,
    "cuBLAS": cublas,
    "dequantize + cuBLAS": ours_dequantized,
    "humming": humming,
    "gemlite": gemlite,
    "tinygemm": tinygemm,
    "qat NF4": ours_nf4,
    "dequantize NF4 + cuBLAS": ours_nf4_dequantized,
    "bnb NF4": bitsandbytes,
}
# Microseconds grow with the tokens there, and so does the time that a table takes.
MOST_TOKENS = {"tinygemm": 64, "gemlite": 256}
