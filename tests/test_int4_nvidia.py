"""Run: python -m pytest tests/test_int4_nvidia.py: compiles the NVIDIA kernels for three GPUs, on any machine.

What they compute is tested on a GPU, in tests/test_int4_linear.py.
"""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from qat.kernels.int4_plans import heuristic

SCRIPT = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
import triton.backends.nvidia
from qat.kernels.int4_batch import SWIZZLED, batch_kernel
from qat.kernels.int4_after_norm import norm_stream_kernel
from qat.kernels.int4_decode import decode_kernel
from qat.kernels.int4_few import few_kernel
from qat.kernels.int4_candidates import int8_candidates
from qat.kernels.int4_plans import Batch, Decode, Few, Stream, heuristic
from qat.kernels.int4_stream import stream_kernel
from qat.kernels.int8_batch import CODES, WORDS, int8_batch_kernel
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

def compile(kernel, pointers, constants, warps, capability):
    sizes = "M", "N", "K", "row_blocks", "tiles", "groups", "band", "unsplit", "first_n"
    sizes = [n for n in sizes if n in kernel.arg_names]
    signature = dict(pointers) | dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    at = {name: (kernel.arg_names.index(name),) for name in signature}
    aligned = [n for n in (*pointers, *sizes) if n not in ("M", "band", "unsplit", "eps") and not n.endswith("_desc")]
    attributes = {at[name]: [["tt.divisibility", 16]] for name in aligned}
    source = GluonASTSource(kernel, signature, {at[n]: v for n, v in constants.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    registers = spilled = None
    if kernel in (stream_kernel, norm_stream_kernel, few_kernel, int8_batch_kernel):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+) ", usage).groups())
    found = {"ptx": compiled.asm["ptx"], "shared": compiled.metadata.shared}
    return found | {"registers": registers, "spilled": spilled}

def int4_case(kind, capability, dtype, has_zero, has_levels):
    common = {"GROUP": 32 if has_zero else 64, "HALVES": 2 if has_zero else 1, "HAS_BIAS": True}
    common |= {"HAS_ZERO": has_zero, "HAS_LEVELS": has_levels}
    pointers = {"words_ptr": "*i32", "zero_ptr": "*i8", "levels_ptr": "*fp32"}
    pointers |= dict.fromkeys(("scale_ptr", "bias_ptr", "y_ptr"), "*" + dtype)
    if has_levels:
        pointers["scale_ptr"] = "*fp32"
    if kind == "decode":
        plan = Decode(4, 2, 8, 2, 2, 2 if capability >= 90 else 0)
        constants = common | {"MASK_K": has_zero} | {name.upper(): value for name, value in plan._asdict().items()}
        found = compile(decode_kernel, {"x_ptr": "*" + dtype} | pointers, constants, plan.warps, capability)
    else:
        plan = Batch(8, 16, 8, 2, 4, 1, 2) if kind == "whole" else Batch(4, 16, 4, 1, 4, 2, 2)
        common |= {"WHOLE": kind == "whole", "SEVERAL": kind != "whole"}
        launched = "unsplit", "programs"
        constants = common | {name.upper(): value for name, value in plan._asdict().items() if name not in launched}
        x = f"tensordesc<{dtype}[16, 64],{SWIZZLED!r}>"
        pointers |= {"x_desc": x, "parts_ptr": "*fp32"}
        found = compile(batch_kernel, pointers, constants, plan.warps, capability)
    return found

def stream_case(kind, inputs, dtype, has_zero, has_levels):
    tiles, plan = inputs // 64, heuristic(1, 28672, inputs, 90, 132)
    assert isinstance(plan, Stream)
    span = plan.warps * plan.tiles
    constants = {"GROUP": 32 if has_zero else 128, "HALVES": 2 if has_zero else 1, "HAS_ZERO": has_zero}
    constants |= {"HAS_LEVELS": has_levels, "HAS_BIAS": True, "WHOLE": tiles % span == 0, "STEPS": -(-tiles // span)}
    constants |= {"WARPS": plan.warps, "TILES": plan.tiles, "STAGES": plan.stages, "EARLY": plan.early}
    pointers = {"words_ptr": "*i32", "zero_ptr": "*i8", "levels_ptr": "*fp32"}
    pointers |= dict.fromkeys(("scale_ptr", "bias_ptr", "y_ptr", "x_ptr"), "*" + dtype)
    if has_levels:
        pointers["scale_ptr"] = "*fp32"
    if kind == "stream":
        return compile(stream_kernel, pointers, constants, plan.warps, 90)
    pointers |= dict.fromkeys(("update_ptr", "norm_ptr", "h_ptr"), "*" + dtype) | {"eps": "fp32"}
    constants |= {"HAS_UPDATE": True, "PARTS": 2 if kind == "gated" else 1}
    return compile(norm_stream_kernel, pointers, constants, plan.warps, 90)

def few_case(tokens, inputs, dtype, has_zero, has_levels):
    tiles, plan = inputs // 64, heuristic(tokens, 28672, inputs, 90, 132)
    constants = {"GROUP": 32 if has_zero else 128, "HALVES": 2 if has_zero else 1, "HAS_ZERO": has_zero}
    constants |= {"HAS_LEVELS": has_levels, "HAS_BIAS": True, "WHOLE": tiles == plan.warps * plan.tiles * plan.split}
    constants |= {"WARPS": plan.warps, "TILES": plan.tiles, "STAGES": plan.stages}
    pointers = {"words_ptr": "*i32", "zero_ptr": "*i8", "levels_ptr": "*fp32"}
    pointers |= dict.fromkeys(("scale_ptr", "bias_ptr", "y_ptr", "x_ptr", "parts_ptr"), "*" + dtype)
    if has_levels:
        pointers["scale_ptr"] = "*fp32"
    if plan.split > 1:
        pointers["parts_ptr"] = "*fp32"
    return compile(few_kernel, pointers, constants | {"EARLY": plan.early}, plan.warps, 90)

def int8_case(plan, dtype, y_dtype, part, has_zero):
    constants = {"GROUP": 64 * part, "PART": part, "HAS_ZERO": has_zero, "HAS_BIAS": True}
    constants |= {name.upper(): value for name, value in plan._asdict().items() if name != "programs"}
    pointers = {"zero_ptr": "*i8", "y_ptr": "*" + y_dtype} | dict.fromkeys(("scale_ptr", "bias_ptr"), "*" + dtype)
    pointers |= dict.fromkeys(("step_ptr", "shift_ptr", "sums_ptr"), "*fp32")
    pointers["codes_desc"] = f"tensordesc<i8[{plan.block_m}, 128],{CODES!r}>"
    pointers["words_desc"] = f"tensordesc<i32[4, 8, 32],{WORDS!r}>"
    return compile(int8_batch_kernel, pointers, constants, 4, 90)

def case(kind, *arguments):
    if kind in ("stream", "norm", "gated"):
        return stream_case(kind, *arguments)
    if kind == "few":
        return few_case(*arguments)
    if kind == "int8":
        return int8_case(int8_candidates(1024, 132)[arguments[0]], *arguments[1:])
    return int4_case(kind, *arguments)

print(json.dumps([case(*arguments) for arguments in json.loads(sys.argv[1])]))
"""


CASES = [
    ("decode", 80, "bf16", True, False),
    ("decode", 89, "fp16", False, False),
    ("decode", 90, "bf16", False, False),
    ("decode", 90, "bf16", False, True),
    ("batch", 90, "fp16", True, False),
    ("batch", 90, "fp16", False, True),
    ("whole", 90, "bf16", False, False),
]
# The inputs, the dtype, and whether there are zero points or a codebook.
STREAM_CASES = [
    ("stream", 4096, "bf16", False, False),
    ("stream", 14336, "fp16", True, False),
    ("stream", 4096, "bf16", False, True),
    ("norm", 4096, "bf16", False, False),
    ("gated", 4096, "fp16", False, False),
]
# The same of few tokens, whose number comes first.
FEW_CASES = [
    ("few", 8, 4096, "bf16", False, False),
    ("few", 8, 14336, "fp16", True, False),
    ("few", 8, 8192, "bf16", False, True),
]
# The plan's place among the candidates, the dtype, that of y, tiles of a part, and whether there are zero points.
INT8_CASES = [
    ("int8", 3, "bf16", "bf16", 2, False),
    ("int8", 1, "fp16", "fp16", 2, True),
    ("int8", 3, "bf16", "fp32", 1, False),
    ("int8", 3, "bf16", "bf16", 1, True),
]


@pytest.fixture(scope="module")
def compiled():
    """Compile all cases in one process, which does not interpret."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, json.dumps(CASES + STREAM_CASES + FEW_CASES + INT8_CASES)],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(
        zip(CASES + STREAM_CASES + FEW_CASES + INT8_CASES, json.loads(done.stdout.splitlines()[-1]), strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles(compiled, case):
    kind, capability, _, _, has_levels = case
    found = compiled[case]
    ptx = found["ptx"]
    assert "v4.b32" in ptx  # weights come 16 bytes at a time
    assert ("mma.sync" if kind == "decode" else "wgmma.mma_async") in ptx
    assert ("griddepcontrol.wait" in ptx) == (capability >= 90)
    assert ("ldmatrix" if kind == "decode" else "cp.async.bulk.tensor") in ptx
    assert ("shfl.sync.idx" in ptx) == has_levels
    assert found["shared"] <= 99 * 1024
    if kind == "whole":  # one barrier for each two tiles of four multiplications
        multiplications = [match.start() for match in re.finditer("wgmma.mma_async", ptx)]
        assert ptx[multiplications[7] : multiplications[-1]].count("bar.sync") == len(multiplications) // 8 - 1


@pytest.mark.parametrize("case", STREAM_CASES, ids=str)
def test_one_token_compiles(compiled, case):
    _, inputs, dtype, has_zero, has_levels = case
    found = compiled[case]
    ptx = found["ptx"]
    # Weights come 16 bytes at a time past the registers, and one pair in bf16 takes one fma where the grid is even.
    assert "cp.async.cg.shared.global [ %r" in ptx.replace("+", " ") and "mma.sync" in ptx
    pairs = 16 * ptx.count("mma.sync") // 4
    if dtype == "bf16" and not has_zero and not has_levels:
        assert ptx.count("fma.rn.bf16x2") == pairs + 3 * pairs // 16
        assert ptx.count("shr.u32 t") == pairs
        # The scale times 2^85 and 2^81 for u 2^-133 and u 2^-129, and -8 times it: the weight times 2^-48.
        assert all(f"mov.b32 c, 0x{bits}{bits}" in ptx for bits in ("6a00", "6800", "a900"))
    # x is waited for after the first weights are under way, and the next kernel starts after its loads, or at once.
    wait, go = ptx.index("griddepcontrol.wait"), ptx.index("griddepcontrol.launch_dependents")
    assert ptx.index("cp.async.commit_group") < wait
    assert (wait < go) == (heuristic(1, 28672, inputs, 90, 132).early == 3)
    # A second program has room beside one: in 64 K registers, and, but for wide scales, in 228 KB.
    assert found["spilled"] == 0
    assert 2 * 256 * -(-found["registers"] // 8) * 8 <= 65536
    assert has_zero or has_levels or 2 * (found["shared"] + 1024) <= 228 * 1024


@pytest.mark.parametrize("case", INT8_CASES, ids=str)
def test_int8_compiles(compiled, case):
    ptx, (_, _, _, _, part, has_zero) = compiled[case]["ptx"], case
    assert "ld.shared.v4.b32" in ptx and ("stmatrix" in ptx) == (case[3] != "fp32")
    # Codes and words come by the tensor memory accelerator, scales and zero points 16 or 8 bytes a lane.
    assert ptx.count("cp.async.bulk.tensor.2d") == 1 and ptx.count("cp.async.bulk.tensor.3d") == 2
    assert len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)) == 2 * (2 // part) * (1 + has_zero)
    (tokens,) = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k32\.s32\.s8\.s8", ptx))
    assert re.findall(r"expect_tx[^;]*, (\d+);", ptx) == [str(int(tokens) * 128 + 8 * 2 * 512)]
    # Nothing but an unpacking lies between a word and a multiplication: no conversions of single bytes.
    assert "cvt.s8" not in ptx and "prmt" not in ptx and ptx.count("sub.u32 t") == has_zero * ptx.count("0x0f0f0f0f")
    # The four words that a lane loads are the four registers of its operand, as tests/test_int4_registers.py has them.
    loads = [words.split(", ") for words in re.findall(r"ld\.shared\.v4\.b32\s*\{\s*(.*?)\s*\}", ptx)]
    operand = re.search(r"wgmma\.mma_async[^;]*\}, \{(%r[^}]*)\}", ptx).group(1).split(",")
    made_of = {made: word for word, made in re.findall(r"t, (%r\d+)[^{}]*?b32 (%r\d+), t, 0x", ptx)}
    assert [made_of[register] for register in operand] in loads
    # A part is scaled while the next one is multiplied, and what both warpgroups hold fits their registers.
    assert f"wgmma.wait_group.sync.aligned {2 * part}" in ptx
    assert compiled[case]["shared"] <= 227 * 1024 and compiled[case]["spilled"] <= 16


@pytest.mark.parametrize("case", FEW_CASES, ids=str)
def test_few_tokens_compile(compiled, case):
    _, tokens, inputs, _, has_zero, has_levels = case
    found, plan = compiled[case], heuristic(tokens, 28672, inputs, 90, 132)
    ptx = found["ptx"]
    assert "cp.async.cg.shared.global [ %r" in ptx.replace("+", " ")
    assert ptx.count("mma.sync") == plan.tiles * 4  # and x is in registers: no other product reads it
    assert ptx.count("ld.global.v4") == plan.tiles * 2  # x 16 bytes at a time
    assert ptx.index("cp.async.commit_group") < ptx.index("griddepcontrol.wait") < ptx.index("ld.global.v4")
    assert found["shared"] <= 227 * 1024 and found["spilled"] <= (0 if plan.warps == 8 else 64)
    if plan.warps == 8 and not has_zero and not has_levels:  # a second program has room beside one
        assert 2 * 256 * -(-found["registers"] // 8) * 8 <= 65536
        assert 2 * (found["shared"] + 1024) <= 228 * 1024
