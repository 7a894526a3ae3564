"""Run: python -m pytest tests/test_decode_step.py, under Triton's interpreter; ``-m gpu`` needs CUDA."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from qat.kernels import decode_step as module

from qat.errors import LayerError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ULPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}


def close(made, exact, ulps=3.0):
    """Check against float64 within a few units in the last place of the largest value."""
    error = (made.double() - exact).abs().max()
    assert error <= ulps * ULPS[made.dtype] * exact.abs().max() and made.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width"), [(1, 4096), (3, 100), (2, 1)])
def test_add_rms_norm(batch, width, dtype, device):
    x, update = (torch.randn(batch, width, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(width, device=device).to(dtype)
    for other in (update, None):
        h, y = module.add_rms_norm(x, other, weight, 1e-5)
        assert torch.equal(h, x if other is None else x + other)
        close(y, F.rms_norm(h.double(), (width,), weight.double(), 1e-5), 1.1)
        for made, reference in zip((h, y), module.add_rms_norm_reference(x, other, weight, 1e-5), strict=True):
            torch.testing.assert_close(made, reference)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_silu(dtype, device):
    gate_up = (torch.randn(2, 2 * 300, device=device) * 4).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    close(module.gated_silu(gate_up), F.silu(gate) * up, 1.1)
    torch.testing.assert_close(module.gated_silu(gate_up), module.gated_silu_reference(gate_up))


def attention_in_float64(qkv, cosine, sine, at, keys, values):
    """Rotate, append and attend by torch's own attention, repeating keys for the queries that share them."""
    batch, kv_heads, _, width = keys.shape
    heads = qkv.shape[1] // width - 2 * kv_heads
    parts = qkv.double().view(batch, -1, 1, width)
    q, k, v = parts.split([heads, kv_heads, kv_heads], 1)

    def turned(x):
        x1, x2 = x[..., : width // 2], x[..., width // 2 :]
        c, s = cosine[at].double(), sine[at].double()
        return torch.cat([x1, x2], -1) * c + torch.cat([-x2, x1], -1) * s

    keys = torch.cat([keys[:, :, :at].double(), turned(k)], 2)
    values = torch.cat([values[:, :, :at].double(), v], 2)
    y = F.scaled_dot_product_attention(turned(q), keys, values, enable_gqa=True)
    return y.reshape(batch, -1), keys[:, :, -1], values[:, :, -1]


def check_attention(batch, heads, kv_heads, width, positions, at, dtype, device):
    qkv = torch.randn(batch, (heads + 2 * kv_heads) * width, device=device).to(dtype)
    keys, values = (torch.randn(batch, kv_heads, positions, width, device=device).to(dtype) for _ in range(2))
    keys[:, :, at:], values[:, :, at:] = torch.nan, torch.nan  # nobody may look there
    angles = (torch.arange(positions)[:, None] * 10.0 ** -(torch.arange(width // 2) / width)).repeat(1, 2).to(device)
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    exact, key, value = attention_in_float64(qkv, *tables, at, keys, values)
    before = keys.clone()
    y = module.attend_cached(qkv, *tables, torch.tensor([at], device=device), keys, values)
    close(y, exact, 6.0)
    close(keys[:, :, at], key)
    assert torch.equal(values[:, :, at].double(), value)
    keys[:, :, at] = before[:, :, at]
    assert torch.equal(keys.nan_to_num(), before.nan_to_num())


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    width=st.sampled_from([32, 64]),
    at=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
)
def test_attend_cached(seed, batch, kv_heads, group, width, at, dtype):
    torch.manual_seed(seed)
    check_attention(batch, kv_heads * group, kv_heads, width, at + 3, at, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [0, 1, 128, 129, 511])
def test_attend_cached_on_gpu(at, dtype):
    check_attention(2, 32, 8, 128, 512, at, dtype, "cuda")


def test_the_reference_attends_too():
    qkv, cache = torch.randn(2, 8 * 32), [torch.randn(2, 2, 9, 32) for _ in range(2)]
    tables = torch.randn(9, 32), torch.randn(9, 32)
    arguments = qkv, *tables, torch.tensor([5])
    reference = module.attend_cached_reference(*arguments, *(part.clone() for part in cache))
    torch.testing.assert_close(module.attend_cached(*arguments, *cache), reference)


def test_the_operators_are_registered_as_torch_wants_them():
    x = torch.randn(2, 64)
    checks = "test_schema", "test_faketensor"  # they have no gradient
    torch.library.opcheck(module.add_rms_norm, (x, x, x[0], 1e-5), test_utils=checks)
    torch.library.opcheck(module.gated_silu, (x,), test_utils=checks)
    cache = torch.randn(2, 1, 4, 32), torch.randn(2, 1, 4, 32)
    arguments = torch.randn(2, 4 * 32), torch.randn(4, 32), torch.randn(4, 32), torch.tensor([2]), *cache
    torch.library.opcheck(module.attend_cached, arguments, test_utils=checks)


def test_what_attention_does_not_take():
    cache = torch.zeros(1, 2, 4, 32), torch.zeros(1, 2, 4, 32)
    tables = torch.zeros(4, 32), torch.zeros(4, 32)
    for qkv, turns in ((torch.zeros(1, 7 * 32), tables), (torch.zeros(1, 8 * 32), (tables[0][:3], tables[1][:3]))):
        with pytest.raises(LayerError, match="attend_cached takes"):
            module.attend_cached(qkv, *turns, torch.tensor([1]), *cache)
