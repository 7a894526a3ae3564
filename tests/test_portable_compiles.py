"""The plain-Triton kernels compile for AMD and older NVIDIA GPUs: python -m pytest tests/test_portable_compiles.py

On any machine, without such a GPU; what they compute is seen under the interpreter.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json
import triton
import triton.language as tl
from qat.kernels import convolution_sum, decode_step, fake_quant, int4_portable, int8_codes, int8_portable, joint_weight
from qat.kernels import nested_scale
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(kernel, target, constants, pointers, integers="", floats="", **options):
    signature = dict.fromkeys(constants, "constexpr") | dict.fromkeys(integers.split(), "i32")
    signature |= dict.fromkeys(floats.split(), "fp32") | {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()}
    signature = {name: signature[name] for name in kernel.arg_names}
    at = {name: (kernel.arg_names.index(name),) for name in signature}
    aligned = {at[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind.startswith("*")}
    source = ASTSource(kernel, signature, {at[name]: value for name, value in constants.items()}, aligned)
    asm = triton.compile(source, target=target, options=options).asm
    return asm["amdgcn"] if target.backend == "hip" else asm["ptx"]

def none(name):
    return {f"{name}_ptr": None}

weight = "row_blocks tiles groups group_size N K"
found = {}
for target in (GPUTarget("hip", "gfx942", 64), GPUTarget("hip", "gfx1100", 32), GPUTarget("cuda", 80, 32)):
    for kind, dtype, scale in (("even", "bf16", "bf16"), ("zero", "fp16", "fp32"), ("levels", "bf16", "fp32")):
        pointers = {"words": "i32", "scale": scale, "weight": dtype}
        constants = {"BLOCKS": 1, "TILES": 2}
        for name, stored, wanted in (("zero", "i8", "zero"), ("levels", "fp32", "levels")):
            if kind == wanted:
                pointers[name] = stored
            else:
                constants[f"{name}_ptr"] = None
        compiled(int4_portable.dequantize_kernel, target, constants, pointers, weight)
        del pointers["weight"], constants["TILES"]
        pointers |= {"x": dtype, "y": dtype, "bias": dtype}
        constants |= {"BLOCKS": 4, "BLOCK_M": 16}
        compiled(int4_portable.matmul_kernel, target, constants, pointers, weight + " M", num_stages=2)
    for trained, zero in ((False, "i8"), (True, None)):
        pointers = {"x": "bf16", "pairs": "i16", "step": "fp32", "shift": "fp32"}
        constants = {"LOW": -128.0, "HIGH": 127.0, "BLOCK_T": 1, "BLOCK_P": 2048, "EARLY": False}
        if trained:
            pointers |= {"scale": "bf16", "zero": "i8"}
        else:
            constants |= none("scale") | none("zero")
        compiled(int8_codes._int8_codes_kernel, target, constants, pointers, "T K PAIRS", enable_fp_fusion=False)
        pointers = {"codes": "i8", "words": "i32", "scale": "bf16", "bias": "bf16", "y": "bf16"}
        pointers |= dict.fromkeys(("step", "shift", "sums"), "fp32") | ({"zero": zero} if zero else {})
        constants = {"GROUP": 128, "PART": 2, "BLOCK_M": 64, "BLOCKS": 4} | ({} if zero else none("zero"))
        asm = compiled(int8_portable.int8_matmul_kernel, target, constants, pointers, "M N row_blocks tiles groups")
        names = "v_mfma_i32", "v_wmma_i32", "s32.s8.s8.s32"
        found[f"{target.arch}, integers, {zero}, True"] = any(name in asm for name in names)
    pointers = dict.fromkeys(("x", "update", "weight", "h", "y"), "bf16")
    constants = {"BLOCK": 4096, "EARLY": False}
    compiled(decode_step._add_rms_norm_kernel, target, constants, pointers, "K", "eps", num_warps=8)
    pointers = dict.fromkeys(("qkv", "cosine", "sine", "keys", "values", "y"), "bf16") | {"at": "i64"}
    constants = {"QUERIES": 16, "D": 128, "KEYS": 64, "EARLY": False}
    compiled(decode_step._attend_cached_kernel, target, constants, pointers, "heads kv_heads C", "factor")
    constants = {"BLOCK": 256, "EARLY": False}
    compiled(decode_step._gated_silu_kernel, target, constants, {"gate_up": "bf16", "y": "bf16"}, "F")
    constants = {"TAPS_D": 1, "TAPS_H": 7, "TAPS_W": 7, "C": 3, "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16}
    integers = "M N depth height width image step_d step_h step_w tap_d tap_h tap_w channel"
    for dtype in ("bf16", "fp32"):
        pointers = {"x": "fp32", "weight": dtype, "grad": dtype, "sums": "fp32"}
        compiled(convolution_sum._convolution_sum_kernel, target, constants, pointers, integers, num_warps=8)
    constants = {"PER_FACTOR": 256, "LEVELS": 256, "BLOCK": 1024}
    pointers, integers = {"code": "u8", "nest": "fp32", "scale": "fp32"}, "size groups N"
    kernel = nested_scale._nested_scale_kernel
    for fused in (False, True):
        asm = compiled(kernel, target, constants, pointers, integers, enable_fp_fusion=fused)
        fmas = "v_fma", "v_pk_fma", "v_dual_fma", "fma.rn"
        found[f"{target.arch}, fused {fused}"] = any(name in asm for name in fmas)
    constants = {"RANK": 16, "BASE_ROWS": True, "STEP_ROWS": True, "LOW": -8.0, "HIGH": 7.0, "SCALE_DTYPE": tl.bfloat16}
    constants |= {"TILES": 1, "BLOCK_N": 32, "BLOCK_K": 128}
    pointers = {"base": "u8", "base_scale": "bf16", "a": "fp32", "b": "fp32", "y": "fp32"}
    nothing = {name: None for part in ("step", "grad", "grad_w", "sums") for name in none(part)}
    integers = "N K base_columns step_columns"
    for fused in (False, True):  # without step sizes no quotient has fused operations of its own
        options = {"enable_fp_fusion": fused, "num_warps": 8}
        asm = compiled(joint_weight._joint_kernel, target, constants | nothing, pointers, integers, **options)
        found[f"{target.arch}, sum, fused {fused}"] = any(name in asm for name in fmas)
    pointers |= {"step": "fp32", "grad": "bf16", "y": "bf16", "grad_w": "bf16", "sums": "fp32"}
    compiled(joint_weight._joint_kernel, target, constants, pointers, integers, num_warps=8, enable_fp_fusion=False)
    for kind, zero in (("whole", None), ("whole", "i8"), ("real", "fp16"), ("offset", "fp32")):
        pointers = {"x": "bf16", "step": "fp32", "y": "bf16"} | ({"zero": zero} if zero else {})
        constants = {"LOW": -8.0, "HIGH": 7.0, "SCALE_DTYPE": tl.bfloat16, "ZERO": kind, "BLOCK_S": 32, "BLOCK_B": 128}
        constants |= {} if zero else none("zero")
        kernel, sizes = fake_quant._forward_kernel, "S B tiles"
        asms = [
            compiled(kernel, target, constants, pointers, sizes, num_warps=8, enable_fp_fusion=fused)
            for fused in (False, True)
        ]
        counts = [sum(asm.count(name) for name in fmas) for asm in asms]
        found[f"{target.arch}, {kind}, {zero}, a quotient's alone, True"] = counts[0] == counts[1] > 0
        constants |= {"SPARSE": True} | none("y")
        pointers = pointers | dict.fromkeys(("grad_y", "grad_x"), "bf16") | {"sums": "fp32"}
        del pointers["y"]
        second = {"offset_sums": "fp32"} if kind == "offset" else {}
        constants |= {} if second else none("offset_sums")
        compiled(fake_quant._backward_kernel, target, constants, pointers | second, sizes, "factor", num_warps=8)
        constants |= {"BLOCK_S": 4096, "BLOCK_B": 1} | none("grad_x")  # elements with a step size of their own
        del pointers["grad_x"]
        compiled(fake_quant._backward_kernel, target, constants, pointers | second, sizes, "factor", num_warps=8)
print(json.dumps(found))
"""


def test_they_compile_and_nothing_is_fused_that_rounds_twice():
    """A product and a sum that the compiler fused would give other bits: the option that forbids it matters."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {key: key.endswith("True") for key in found} and len(found) == 30
