"""Run: python -m pytest tests/test_codebook_linear.py: NF4 and other codebooks in the int4 kernels; ``-m gpu`` too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_problems import DEVICE, DTYPES, assert_accurate
from qat.kernels import int4_linear as module
from qat.kernels.int4_layout import prepack, to_tiles, words_to_packed
from qat.kernels.int4_plans import Batch, Decode, Few, Stream
from qat.kernels.int4_run import run_plan
from qat.kernels.nested_scale import join, nested_scale, nested_scale_reference

import qat
from qat import codebook
from qat.double_quantization import dynamic_map, nest
from qat.packing import pack, unpack


def make(n, k, group, scale_dtype=torch.float32, nf4=True):
    """Return codes, the dense weight by dtype, and the weight as the kernels read it."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.int8, device=DEVICE)
    scale = (torch.rand(n, k // group, device=DEVICE) * 0.1 + 0.01).to(scale_dtype)
    levels = torch.tensor(codebook.NF4) if nf4 else torch.randn(16).sort().values
    levels = levels.to(DEVICE)
    dense = {dtype: codebook.dequantize(codes, scale, levels[None], dtype) for dtype in DTYPES}
    return codes, dense, prepack(pack(codes, 4, 0), scale, None, k, group, levels)


def identity_product(weight, k, dtype, rows, run=module.int4_linear):
    eye = torch.eye(k, dtype=dtype, device=DEVICE)
    return torch.cat([run(part.contiguous(), weight) for part in eye.split(rows)]).T


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 40),
    k_and_group=st.sampled_from([(64, 64), (128, 64), (96, 32), (192, 96), (33, 33), (130, 130)]),
    nf4=st.booleans(),
    rows=st.sampled_from([1, 16, 128]),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
)
def test_weights_are_bit_identical(seed, n, k_and_group, nf4, rows, dtype, scale_dtype):
    torch.manual_seed(seed)
    k, group = k_and_group
    codes, dense, weight = make(n, k, group, scale_dtype, nf4)
    assert torch.equal(module.int4_dequantize(weight, dtype), dense[dtype])
    assert torch.equal(module.int4_dequantize_reference(weight, dtype), dense[dtype])
    assert torch.equal(unpack(weight.checkpoint()[0], 4, k, 0), codes)
    if rows > 1 or k < 100:
        assert torch.equal(identity_product(weight, k, dtype, rows), dense[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 5, 40])
def test_products(m, dtype):
    torch.manual_seed(m)
    _, dense, weight = make(37, 192, 64)
    x, bias = torch.randn(m, 192, device=DEVICE).to(dtype), torch.randn(37, device=DEVICE).to(dtype)
    y = module.int4_linear(x, weight, bias)
    assert_accurate(y, x, dense[dtype], bias)
    assert_accurate(module.int4_linear_reference(x, weight, bias), x, dense[dtype], bias)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 70), groups=st.integers(1, 20))
def test_nested_scales(seed, rows, groups):
    torch.manual_seed(seed)
    nested = nest(torch.rand(rows, groups, device=DEVICE), dynamic_map(DEVICE))
    arguments = to_tiles(nested.codes), join(nested), rows
    expected = to_tiles(nested.values())
    assert torch.equal(nested_scale(*arguments), expected)
    assert torch.equal(nested_scale_reference(*arguments), expected)


def test_padding_points_at_the_level_nearest_to_zero():
    _, _, weight = make(2, 3, 3)
    assert (unpack(words_to_packed(weight.words, 2, 64), 4, 64, 0)[:, 3:] == 7).all()


def test_the_operators_are_registered_as_torch_wants_them():
    _, _, w = make(20, 64, 32)
    x, bias = torch.randn(4, 64, device=DEVICE, requires_grad=True), torch.randn(20, device=DEVICE, requires_grad=True)
    arguments = (x, w.words, w.scale, None, w.levels, None, bias, 20, 64, 32)
    torch.library.opcheck(torch.ops.qat.int4_linear.default, arguments)
    torch.library.opcheck(torch.ops.qat.int4_dequantize.default, (*arguments[1:6], 20, 64, 32, torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "group", "laid_out"),
    [("nf4", 32, True), ("nf4", None, True), ("nf4", 16, False), ("nf4_double", 32, True), ("nf4_double", 16, False)],
)
def test_a_frozen_layer_chooses_the_kernels_by_itself(name, group, laid_out):
    spec = qat.QuantSpec(codebook=name, group_size=group)
    layer = torch.nn.Sequential(torch.nn.Linear(96, 40))
    frozen = qat.freeze(qat.prepare(layer, qat.QuantPolicy(weight=spec), verbose=False)).to(DEVICE)
    packed = frozen[0].packed_weight
    expected = packed.quantized_tensor().dequantize(torch.float32)
    codes, state = packed.codes(), {name: value.cpu() for name, value in frozen.state_dict().items()}
    packed.prepack()
    assert bool(packed.gpu_operands) == laid_out
    x = torch.randn(5, 96, device=DEVICE, requires_grad=True)
    y = frozen(x)
    assert_accurate(y, x.detach(), expected, frozen[0].bias)
    assert torch.equal(packed.dequantize(torch.float32), expected)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, expected.sum(0).expand(5, -1))
    assert torch.equal(packed.codes(), codes)
    assert torch.equal(packed.dequantize(torch.float64), packed.quantized_tensor().dequantize(torch.float64))
    again = frozen.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[name].cpu(), state[name]) for name in state)
    frozen.cpu()  # back to the checkpoint's layout
    assert torch.equal(packed.codes(), codes.cpu()) and not packed.gpu_operands


PLANS = [
    (1, Stream(8, 4, 3, 5, 2)),
    (1, Decode(4, 1, 8, 8, 3, 1)),
    (5, Few(8, 8, 3, 5, 1, 1)),
    (7, Few(16, 1, 2, 132, 4, 3)),
    (4, Decode(8, 1, 8, 4, 0, 2)),
    (16, Decode(8, 2, 16, 2, 3, 0)),
    (16, Batch(4, 16, 8, 2, 4, 1, 2)),
    (64, Batch(8, 64, 8, 2, 4, 4, 2)),
    (128, Batch(8, 128, 8, 2, 4, 2, 2)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("k", "group"), [(2112, 32), (2112, 64), (2112, 2112), (1001, 1001)])
@pytest.mark.parametrize("nf4", [True, False])
def test_nvidia_weights_are_bit_identical_on_gpu(nf4, k, group, dtype):
    torch.manual_seed(0)
    _, dense, weight = make(200, k, group, nf4=nf4)
    for m, plan in PLANS:
        if k % 16 == 0:
            y = identity_product(weight, k, dtype, m, lambda x, w, plan=plan: run_plan(plan, x, w, None))
            assert torch.equal(y, dense[dtype]), plan
        x, bias = torch.randn(m, k, device=DEVICE).to(dtype), torch.randn(200, device=DEVICE).to(dtype)
        y = module.int4_linear(x, weight, bias)
        assert_accurate(y, x, dense[dtype], bias)
        assert torch.equal(y, module.int4_linear(x, weight, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_double_quantization_on_gpu(dtype):
    """The scales are made just before each product, which must not read them too early."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (4096, 4096), dtype=torch.int8, device=DEVICE)
    nested = nest(torch.rand(4096, 64, device=DEVICE), dynamic_map(DEVICE))
    levels = torch.tensor(codebook.NF4, device=DEVICE)
    dense = codebook.dequantize(codes, nested.values(), levels[None], dtype)
    weight = prepack(pack(codes, 4, 0), nested.codes, None, 4096, 64, levels, join(nested))
    assert torch.equal(module.int4_dequantize(weight, dtype), dense)
    for m in (1, 16, 64, 300, 5000):
        x = torch.randn(m, 4096, device=DEVICE).to(dtype)
        first = module.int4_linear(x, weight)
        assert_accurate(first, x, dense)
        assert all(torch.equal(module.int4_linear(x, weight), first) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_products_on_gpu(dtype):
    torch.manual_seed(0)
    for n, k in ((4096, 4096), (4096, 14336), (10944, 4288)):
        _, dense, weight = make(n, k, 64)
        for m in (1, 7, 16, 33, 64, 130, 300, 1025):
            x = torch.randn(m, k, device=DEVICE).to(dtype)
            assert_accurate(module.int4_linear(x, weight), x, dense[dtype])
