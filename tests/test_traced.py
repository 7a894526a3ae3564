"""Rounding that Inductor fuses with what makes the input, against the same run eagerly: every bit of value and mask."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qat
from qat import QuantSpec, backend, exact, traced
from qat.quantizers.rounding import Rounding
from qat.spec import Dynamic

SPECS = [
    QuantSpec(bits=4, signed=False, granularity="tensor"),
    QuantSpec(bits=8, granularity="tensor", scale_dtype="float32"),
    Dynamic.int8_token,
]


def made(x):
    """Return something that a compiler fuses with the rounding, and keeps in float32 on the way."""
    return torch.relu(x * 1.7)


def trained(run, x, step_size, grad):
    """Return the value and the gradients of x and the step size."""
    leaves = [x.detach().clone().requires_grad_(), step_size.clone().requires_grad_()]
    y = run(*leaves)
    y.backward(grad)
    return y.detach(), *(leaf.grad for leaf in leaves)


def assert_compiled_has_the_bits(x, grid, backend="inductor"):
    step_size, grad = torch.full((1, 1), 0.0137, device=x.device), torch.randn_like(x)

    def run(x, step_size):
        rounding = Rounding(grid, None if grid is Dynamic.int8_token else step_size, 0.3)
        x = made(x)
        if not torch.compiler.is_compiling():
            return rounding(x)
        assert traced.takes(x, rounding)
        return traced.rounded(x, rounding, x.dtype)

    torch._dynamo.reset()
    expected = trained(run, x, step_size, grad)
    found = trained(torch.compile(run, fullgraph=True, backend=backend), x, step_size, grad)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    if expected[2] is not None:
        scale = (grad.double().abs().sum() * 0.3).item()  # of a sum whose terms cancel
        torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-7 * scale)


@pytest.mark.parametrize("grid", SPECS, ids=str)
def test_inductor_on_a_cpu(grid):
    assert_compiled_has_the_bits(torch.randn(40, 72, dtype=torch.bfloat16), grid)


@pytest.mark.parametrize("grid", SPECS, ids=str)
def test_traced_in_float32(grid):
    """Where casts do nothing; torch 2.11 lost a gradient there."""
    assert_compiled_has_the_bits(torch.randn(40, 72), grid, "aot_eager")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("grid", SPECS, ids=str)
def test_inductor_on_a_gpu(monkeypatch, grid, dtype):
    monkeypatch.setattr(backend, "_traced_rounding", True)
    assert_compiled_has_the_bits(torch.randn(2048, 2048, device="cuda").to(dtype), grid)
    if grid is not Dynamic.int8_token:
        images = torch.randn(16, 64, 28, 28, device="cuda").to(dtype)
        assert_compiled_has_the_bits(images.to(memory_format=torch.channels_last), grid)


def check_quotient(exact):
    """By a reciprocal in float64 it is the division, on random float32 and on the middle of two codes."""
    a = torch.cat([torch.randn(200_000), torch.randn(200_000).bfloat16().float(), torch.tensor([0.0, 1e-42, 3e38])])
    b = torch.cat([torch.rand(200_000), torch.rand(200_000).bfloat16().float(), torch.tensor([1.0, 2.0, 1e-5])]) + 1e-3
    with mock.patch.object(torch.compiler, "is_dynamo_compiling", lambda: True):
        assert torch.equal(exact.quotient(a, b), a / b)
        assert torch.equal(exact.product(a, b), a * b)
        assert torch.equal(exact.rounded(a.half()), a.half()) and torch.equal(exact.rounded(a), a)


def test_quotient():
    check_quotient(exact)


class SwiGLU(nn.Module):
    """A language model's block without attention, whose output is kept anyway."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((64, 256), (64, 256), (256, 64)))

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def kept_bytes(model, x):
    """Return the bytes that a compiled model keeps for its backward, parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch._dynamo.reset()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.compile(model, dynamic=False)(x)
    return sum(sizes.values())


@pytest.mark.slow
def test_compiled_dynamic_rounding_keeps_what_the_plain_model_keeps():
    """A few values a token more, and no mask, which would be half as much again for each input."""
    x = torch.randn(4, 128, 64, dtype=torch.bfloat16, requires_grad=True)
    plain = kept_bytes(SwiGLU().bfloat16(), x)
    policy = qat.QuantPolicy(weight=QuantSpec(bits=4, group_size=32), dynamic="int8_token")
    rounded = kept_bytes(qat.prepare(SwiGLU().bfloat16(), policy, verbose=False), x)
    assert plain < rounded <= plain + 6 * 8 * 4 * 128
