"""Stand-ins for a Hopper GPU and the int4 kernels that run there: what they would be launched with is kept."""

import torch
from qat.kernels import (
    bare_launch,
    int4_batch,
    int4_decode,
    int4_few,
    int4_portable,
    int4_recipe,
    int4_run,
    int4_stream,
    int8_run,
)
from qat.kernels import int4_linear as module
from qat.kernels.int4_layout import prepack

from qat import codebook
from qat.packing import pack

NAMES = int4_decode.decode_kernel.arg_names
STREAM_NAMES = int4_stream.stream_kernel.arg_names
FEW_NAMES = int4_few.few_kernel.arg_names
INT8_NAMES = int8_run.int8_batch.int8_batch_kernel.arg_names
BATCH_NAMES = int4_batch.batch_kernel.arg_names
SUM_NAMES = int4_portable.sum_parts_kernel.arg_names


class Compiled:
    """What Triton returns for a launch; keeps what it is launched with again."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.runs = []

    def run(self, *arguments):
        self.runs.append(arguments)


class Kernel:
    """A kernel that is never compiled; keeps its first launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append((grid, arguments, options, Compiled()))
            return self.launches[-1][-1]

        return launch


def pass_for_a_gpu(monkeypatch):
    """Let a CPU pass for a Hopper GPU up to the launch; return the kernel of few tokens."""
    decode = Kernel()
    monkeypatch.setattr(module, "backend", lambda device: "triton")
    monkeypatch.setattr(int4_run, "suits_nvidia", lambda x, weight: True)
    monkeypatch.setattr(int4_run, "limits", lambda index: ("a GPU", 90, 132))
    monkeypatch.setattr(int4_decode, "decode_kernel", decode)
    monkeypatch.setattr(int4_stream, "stream_kernel", decode)
    monkeypatch.setattr(int4_few, "few_kernel", decode)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(int4_recipe, "current_device", lambda: -1)  # what a tensor on a CPU says
    monkeypatch.setattr(bare_launch, "current_stream", lambda device: "stream")
    stream = type("Driver", (), {"get_current_stream": staticmethod(lambda device: "stream")})
    monkeypatch.setattr(int4_run.triton.runtime, "driver", type("Drivers", (), {"active": stream}))
    for owner, caches in ((int4_run, ("_plans", "_kernels")), (int4_recipe, ("_products", "_matrices"))):
        for cache in caches:
            monkeypatch.setattr(owner, cache, {})
    return decode


def stand_in_for_many_tokens(monkeypatch):
    """Also stand in for the kernels of many tokens, and return them: the product, and the sum of its parts."""
    batch, sums = Kernel(), Kernel()
    monkeypatch.setattr(int4_batch, "batch_kernel", batch)
    monkeypatch.setattr(int4_batch, "descriptor", lambda x, block_m: bare_launch.Described(x, x.shape))
    monkeypatch.setattr(int4_portable, "sum_parts_kernel", sums)
    return batch, sums


def weight(n=96, k=128, group=64, **options):
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    return prepack(pack(codes, 4), torch.rand(n, k // group).bfloat16(), None, k, group, **options)


def variants(k=128):
    """Return weights and biases of all kinds that the kernels take."""
    zeros = torch.randint(-8, 8, (6, k // 64, 16), dtype=torch.int8)
    bias = torch.randn(96).bfloat16()
    return [
        (weight(k=k), None),
        (weight(k=k), bias),
        (weight(k=k)._replace(zero_point=zeros), None),
        (weight(k=k, levels=torch.tensor(codebook.NF4)), bias),
    ]
