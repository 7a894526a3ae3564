"""Compiled kernels are looked up by what Triton compiles for: without a GPU, in a process that does not interpret."""

import os
import subprocess
import sys

COMMON = """
import random
import torch
import triton.language as tl
from qat.kernels import fake_quant, launching, round_dynamic
torch.accelerator.current_device_index = lambda: -1  # what a tensor on a CPU says
"""

KEYS = """
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
random.seed(0)
numbers = torch.zeros(4096)
pairs = [(None, numbers), (numbers, numbers[1:]), (numbers[4:], numbers.bfloat16()), (numbers.half(), numbers.int())]
integers = [1, 2, 16, 33, 2**31 - 1, 2**31, 2**31 + 1, 2**35]
kernels = [fake_quant._forward_kernel, fake_quant._backward_kernel, fake_quant._sum_kernel, round_dynamic._round_kernel]

class Compiled:
    run = None

    def __init__(self, bind, arguments):
        self.bind, self.compiled_for = bind, str(bind(*arguments)[1])

    def __getitem__(self, grid):
        return self.again

    def again(self, *arguments):
        assert str(self.bind(*arguments)[1]) == self.compiled_for, arguments
        repeated.append(arguments)

class Kernel:
    def __init__(self, bind):
        self.bind = bind

    def __getitem__(self, grid):
        return lambda *arguments: Compiled(self.bind, arguments)

for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for kernel in kernels:
        bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
        names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
        constants = (False, -8.0, 7.0, tl.bfloat16, "whole", 32, 128)[: len(kernel.params) - len(names)]
        tensors = sum(name.endswith("_ptr") for name in names)
        repeated = []
        for _ in range(20):
            sizes = [0.5 if name == "factor" else random.choice(integers) for name in names[tensors:]]
            launch = launching.Launch(Kernel(bind), (1,), (*sizes, *constants))
            pair = random.choice(pairs)
            for _ in range(200):
                launch(random.choice(pair[pair[0] is None :]), *random.choices(pair, k=tensors - 1))
        assert len(repeated) > 1000
print("ok")
"""

TURNS = """
import triton
from qat.kernels import int8_codes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for kernel, pointers, constants in (
    (round_dynamic._round_kernel, ("x", "y"), {"grad_y_ptr": None, "grad_x_ptr": None, "Q8_0": False, "BLOCK_K": 64}),
    (
        int8_codes._int8_codes_kernel,
        ("x", "pairs", "step", "shift"),
        {"scale_ptr": None, "zero_ptr": None, "LOW": -128.0, "HIGH": 127.0, "BLOCK_P": 32},
    ),
):
    constants |= {"BLOCK_T": 1, "EARLY": True}
    signature = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
    signature |= {f"{name}_ptr": "*fp32" if name != "pairs" else "*i16" for name in pointers}
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, at)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": True}).asm["ptx"]
    assert -1 < ptx.find("griddepcontrol.wait") < ptx.find("griddepcontrol.launch") < ptx.find("ld.global")
    assert ptx.find("ld.global") < ptx.find("st.global")
print("ok")
"""

CALLS = """
from qat import QuantSpec
calls = []

class Compiled:
    run = None  # no launcher that bare_launch knows

    def __getitem__(self, grid):
        return lambda *arguments: calls.append(("again", grid, len(arguments)))

class Kernel:
    def __getitem__(self, grid):
        return lambda *arguments, **options: (calls.append(("first", grid, len(arguments), options)), Compiled())[1]

fake_quant._forward_kernel = Kernel()
x = torch.zeros(4, 64)
for tensor in (x, x, x.bfloat16(), torch.zeros(257)[1:].view(4, 64), x):
    fake_quant.fake_quantized(tensor, torch.ones(4, 2), QuantSpec(group_size=32))
fake_quant.fake_quantized(x, torch.ones(4, 2), QuantSpec(bits=8, group_size=32))
fake_quant.fake_quantized(torch.cat([x, x]), torch.ones(8, 2), QuantSpec(group_size=32))
first, again = ("first", (1, 1, 1), 13, {"num_warps": fake_quant.WARPS}), ("again", (1, 1, 1), 13)
assert calls == [first, again, first, first, again, first, first], calls
print("ok")
"""


def run(code):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMON + code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "ok", done.stderr


def test_a_launch_is_done_again_only_where_triton_compiles_the_same():
    """For CUDA and ROCm, over random arguments: alignment, sizes, widths of integers, ones, missing pointers."""
    run(KEYS)


def test_a_compiled_kernel_is_launched_again_only_for_its_key():
    """The first call compiles; dtype, alignment, bits and sizes make another; every parameter is passed on."""
    run(CALLS)


def test_kernels_that_start_early_wait_before_they_read_or_write():
    run(TURNS)
