"""Run: TRITON_INTERPRET=1 python -m pytest tests/test_joint_weight.py; a GPU takes -m gpu without the variable.

The sum of a weight and its low-rank update: one order on every device; what the kernel makes of it is the reference's.
"""

import itertools

import pytest
import torch
from qat.kernels import joint_weight as module
from qat.kernels.joint_weight import (
    LowRankSum,
    joint_weight,
    joint_weight_backward,
    joint_weight_backward_reference,
    joint_weight_reference,
    merged_reference,
)

import qat
from qat import numerics
from qat.packing import pack


def interpreted():
    """Whether kernels run without a GPU."""
    try:
        from qat.kernels.rounding import INTERPRETED
    except ImportError:  # there is no Triton for macOS
        return False
    return INTERPRETED.value


GRIDS = [("group", 16), ("group", 48), ("group", 128), ("channel", None), ("tensor", None)]
SHAPES = [(33, 384), (64, 384), (1, 384)]


def parts(rows, columns, kind, rank, device="cpu", seed=0):
    """Return base, its scales, a, b, such that some sums lie on the middle of two codes and some clip."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.5
    a, b = torch.randn(rank, columns, generator=generator), 0.05 * torch.randn(rows, rank, generator=generator)
    scale = None
    if kind == "codes":
        codes = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
        base, scale = pack(codes, 8), (0.01 * torch.rand(rows, columns // 48, generator=generator)).bfloat16()
    else:
        base = (weight * 16).round().div(16).to(kind)
        b[: rows // 2] = 0  # sums that are the base's, many on a middle of codes
    return LowRankSum(*(None if part is None else part.to(device) for part in (base, scale, a, b)))


def spec_and_step(granularity, group_size, bits, rows, columns, device="cpu"):
    spec = qat.QuantSpec(bits=bits, granularity=granularity, group_size=group_size, signed=True)
    shape = numerics.scale_shape((rows, columns), spec)
    return spec, (torch.full(shape, 0.125) + 0.01 * torch.rand(shape)).to(device)


def check(shape, kind, grid, bits, dtype, rank, device="cpu"):
    rows, columns = shape
    given = parts(rows, columns, kind, rank, device)
    spec, step = spec_and_step(*grid, bits, rows, columns, device)
    step[:1] = 0.125
    on_cpu, step_on_cpu = parts(rows, columns, kind, rank), step.cpu()
    expected = joint_weight_reference(on_cpu, step_on_cpu, spec, dtype)
    assert torch.equal(joint_weight(given, step, spec, dtype).cpu(), expected)
    merged = joint_weight(given, None, spec, torch.float32).cpu()
    assert torch.equal(merged, merged_reference(on_cpu))
    grad = torch.randn(shape).to(dtype)
    y, grad_w, grad_step = joint_weight_backward(grad.to(device), given, step, spec, 0.7)
    _, expected_w, _ = joint_weight_backward_reference(grad, on_cpu, step_on_cpu, spec, 0.7)
    assert torch.equal(y.cpu(), expected) and torch.equal(grad_w.cpu(), expected_w)
    exact = numerics.fake_quantize_gradients(grad.double(), merged.double(), step_on_cpu.double(), spec, 0.7)[1]
    size = numerics.fake_quantize_gradients(grad.double().abs(), merged.double(), step_on_cpu.double(), spec, 0.7)[1]
    assert grad_step.shape == step.shape and grad_step.dtype == torch.float32
    bound = 1e-5 * (size.abs() + exact.abs() + grad.double().abs().sum() * 1e-2)
    assert ((grad_step.cpu().double() - exact).abs() <= bound).all()


CASES = list(itertools.product([torch.float32, torch.bfloat16, "codes"], GRIDS))


@pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET=1 for kernels")
@pytest.mark.parametrize(("kind", "grid"), CASES, ids=str)
def test_kernel_on_the_interpreter(kind, grid, monkeypatch):
    monkeypatch.setattr(module, "_runs", lambda base, step: True)
    for index, shape in enumerate(SHAPES):
        check(shape, kind, grid, (4, 3, 8)[index], (torch.float32, torch.bfloat16)[index % 2], (3, 1, 2)[index])


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "grid"), CASES, ids=str)
def test_kernel_on_gpu(kind, grid):
    for shape, bits, dtype in itertools.product([*SHAPES, (512, 1536)], (4, 2), (torch.float32, torch.bfloat16)):
        check(shape, kind, grid, bits, dtype, 16, "cuda")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, "codes"], ids=str)
def test_the_sum_is_rounded_one_product_at_a_time(kind):
    """Each element by itself, in numpy's float32."""
    base, scale, a, b = parts(7, 96, kind, 5)
    b += 0.01
    merged = merged_reference(LowRankSum(base, scale, a, b)).numpy()
    values = base.float() if scale is None else (base.float() - 128).view(7, 2, 48) * scale.float()[..., None]
    values, columns, rows = values.reshape(7, 96).numpy(), a.numpy(), b.numpy()
    for n, k in itertools.product(range(7), range(96)):
        update = rows[n, 0] * columns[0, k]
        for j in range(1, 5):
            update = update + rows[n, j] * columns[j, k]
        assert merged[n, k] == values[n, k] + update


def test_rows_are_summed_alike_wherever_a_block_of_them_ends():
    base, _, a, b = parts(600, 64, torch.float32, 3)
    whole = merged_reference(LowRankSum(base, None, a, b))
    for rows in (slice(0, 1), slice(255, 257), slice(599, 600)):
        assert torch.equal(merged_reference(LowRankSum(base[rows], None, a, b[rows])), whole[rows])


def test_operators_are_registered_as_torch_wants_them():
    base, scale, a, b = parts(4, 96, "codes", 3)
    _, step = spec_and_step("group", 48, 4, 4, 96)
    checks = ["test_schema", "test_faketensor"]
    forward = base, scale, a, b, step, 4, "bfloat16"
    torch.library.opcheck(torch.ops.qat.joint_weight, (*forward, torch.bfloat16), test_utils=checks)
    grad = torch.randn(4, 96)
    torch.library.opcheck(torch.ops.qat.joint_weight_backward, (grad, *forward, 0.5), test_utils=checks)
