"""Compiled kernels are looked up by what Triton compiles for: without a GPU, in a process that does not interpret."""

import os
import subprocess
import sys

COMMON = """
import random
import torch
import triton.language as tl
from qat.kernels import fake_quant, launching, round_dynamic
"""

KEYS = """
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
random.seed(0)
numbers = torch.zeros(4096)
pointers = [None, numbers, numbers[1:], numbers[4:], numbers.bfloat16(), numbers.half()[8:]]
integers = [1, 2, 16, 33, 2**31 - 1, 2**31, 2**31 + 1, 2**35]
kernels = [fake_quant._forward_kernel, fake_quant._backward_kernel, fake_quant._sum_kernel, round_dynamic._round_kernel]
for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for kernel in kernels:
        bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
        names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
        constants = (False, -8.0, 7.0, tl.bfloat16, "whole", 32, 128)[: len(kernel.params) - len(names)]
        seen = {}
        for _ in range(1000):
            arguments = [
                random.choice(pointers if name.endswith("_ptr") else [0.5] if name == "factor" else integers)
                for name in names
            ]
            compiled_for = str(bind(*arguments, *constants)[1])
            key = tuple(map(launching._specialization, arguments))
            assert seen.setdefault(key, compiled_for) == compiled_for, (kernel, arguments)
        assert len(seen) > 20
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
    def __getitem__(self, grid):
        return lambda *arguments: calls.append(("again", grid, len(arguments)))

class Kernel:
    fn = "a kernel"

    def __getitem__(self, grid):
        return lambda *arguments, **options: (calls.append(("first", grid, len(arguments), options)), Compiled())[1]

torch.accelerator.current_device_index = lambda: None
fake_quant._forward_kernel = Kernel()
x = torch.zeros(4, 64)
for tensor in (x, x, x.bfloat16(), torch.zeros(257)[1:].view(4, 64), x):
    fake_quant.fake_quantized(tensor, torch.ones(4, 2), QuantSpec(group_size=32))
fake_quant.fake_quantized(x, torch.ones(4, 2), QuantSpec(bits=8, group_size=32))
first, again = ("first", (1,), 13, {"num_warps": fake_quant.WARPS}), ("again", (1, 1, 1), 13)
assert calls == [first, again, first, first, again, first], calls
print("ok")
"""


def run(code):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMON + code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "ok", done.stderr


def test_a_key_never_holds_what_triton_compiles_apart():
    """For CUDA and ROCm, over random arguments: alignment, sizes, widths of integers, ones, missing pointers."""
    run(KEYS)


def test_a_compiled_kernel_is_launched_again_only_for_its_key():
    """The first call compiles; dtype, alignment and bits make another kernel; every parameter is passed on."""
    run(CALLS)


def test_kernels_that_start_early_wait_before_they_read_or_write():
    run(TURNS)
