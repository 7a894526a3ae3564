"""What int4_linear computes, on CPU through Triton's interpreter. ``-m gpu`` needs CUDA."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_problems import DEVICE, DTYPES, assert_accurate, int4_linear, int4_linear_reference, make_inputs, make_weight
from qat.kernels import int4_linear as module
from qat.kernels.int4_layout import prepack
from qat.kernels.int4_linear import backend, int4_dequantize
from qat.kernels.int4_plans import Batch, Decode, Few, Stream
from qat.kernels.int4_portable import sum_parts_kernel
from qat.kernels.int4_run import run_plan

from qat.backend import set_batch_invariant
from qat.numerics import dequantize
from qat.packing import pack, unpack


def test_these_tests_run_the_kernel():
    assert backend(torch.device(DEVICE)).startswith("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(dtype):
    # Row 0: bytes 0x9F, 0x08 hold 15 - 8, 9 - 8, 8 - 8 and padding. Row 1: bytes 0x70, 0x0A hold -8, -1, 2.
    packed = torch.tensor([[0x9F, 0x08], [0x70, 0x0A]], dtype=torch.uint8, device=DEVICE)
    scale = torch.tensor([[0.5], [0.25]], dtype=torch.bfloat16, device=DEVICE)
    x = torch.tensor([1.0, 10.0, 100.0], dtype=dtype, device=DEVICE)
    y = int4_linear(x, packed, scale, torch.tensor([0.25, -1.0], dtype=dtype, device=DEVICE), 3, 3)
    assert y.dtype == dtype
    assert y.tolist() == [0.5 * (7 + 10) + 0.25, 0.25 * (-8 - 10 + 200) - 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "group"), [(65, 96, 32), (67, 192, 64), (3, 384, 128), (70, 129, 129), (1, 15, 15)])
@pytest.mark.parametrize("m", [1, 2, 3, 16, 17, 33, 70])
def test_grid(m, n, k, group, dtype):
    torch.manual_seed(m + n + k)
    codes, packed, scale = make_weight(n, k, group)
    weight = dequantize(codes, scale, dtype)
    x, bias = make_inputs(m, n, k, dtype, with_bias=(m + n + DTYPES.index(dtype)) % 2)
    assert_accurate(int4_linear(x, packed, scale, bias, k, group), x, weight, bias)
    assert_accurate(int4_linear_reference(x, packed, scale, bias, k), x, weight, bias)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    m=st.integers(0, 40),
    n=st.integers(1, 80),
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 96, 160]),
    row=st.none() | st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
)
def test_any_shape(seed, m, n, groups, group, row, dtype, scale_dtype):
    torch.manual_seed(seed)
    k, group = (groups * group, group) if row is None else (row, row)
    codes, packed, scale = make_weight(n, k, group, scale_dtype)
    x, bias = make_inputs(m, n, k, dtype, seed % 2)
    y = int4_linear(x, packed, scale, bias, k, group)
    assert y.shape == (m, n)
    if m:
        assert_accurate(y, x, dequantize(codes, scale, dtype), bias)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    k_and_group=st.sampled_from([(1, 1), (7, 7), (101, 101), (48, 48), (96, 32), (192, 96), (128, 64)]),
    one_scale=st.booleans(),
    exponent=st.integers(-17, 3),
    m=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
)
def test_weights_are_bit_identical(seed, k_and_group, one_scale, exponent, m, dtype, scale_dtype):
    torch.manual_seed(seed)
    k, group = k_and_group
    codes, packed, scale = make_weight(33, k, group, scale_dtype)
    scale = (torch.rand_like(scale) + 1) * 2.0**exponent  # down to weights that are subnormal in fp16
    if group == k and one_scale:
        scale = scale[:1]
    eye = torch.eye(k, dtype=dtype, device=DEVICE)
    y = torch.cat([int4_linear(rows, packed, scale, None, k, group) for rows in eye.split(m)])
    assert torch.equal(y.T, dequantize(codes, scale, dtype))


def test_bf16_weights_round_to_nearest_even():
    # Ties, in steps of 2^-6 from 3: 3 * (1 + 2^-7) is at 1.5 and goes up, 3 * (1 + 3 * 2^-7) is at 4.5 and goes down.
    scale = torch.tensor([[1 + 2.0**-7], [1 + 3 * 2.0**-7], [1 + 2.0**-6]], device=DEVICE)
    codes = torch.tensor([[7, 3, 5, -7, -3]] * 3, dtype=torch.int8, device=DEVICE)
    exact = codes.double() * scale.double()
    spacing = 2.0 ** (exact.abs().log2().floor() - 7)
    nearest_even = (exact / spacing).round() * spacing
    ties = (exact / spacing).frac().abs() == 0.5
    assert ties[:2, [1, 4]].all()
    y = int4_linear(torch.eye(5, dtype=torch.bfloat16, device=DEVICE), pack(codes, 4), scale, None, 5, 5)
    assert torch.equal(y.T.double(), nearest_even)


def test_bias_is_added_before_the_one_rounding():
    # 256 + 1 is 257, a tie that bf16 rounds to 256; adding 1 once more would stay at 256, where the law gives 258.
    packed, scale = pack(torch.tensor([[1, 1]], dtype=torch.int8, device=DEVICE), 4), torch.ones(1, 1, device=DEVICE)
    x = torch.tensor([256.0, 1.0], dtype=torch.bfloat16, device=DEVICE)
    bias = torch.ones(1, dtype=torch.bfloat16, device=DEVICE)
    assert int4_linear(x, packed, scale, bias, 2, 2).item() == 258
    assert int4_linear_reference(x, packed, scale, bias, 2).item() == 258


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("first_n", [0, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_are_added_up_in_order_and_rounded_once(dtype, first_n, with_bias):
    torch.manual_seed(0)
    parts = torch.randn(3, 5, 1101 - first_n, device=DEVICE) * torch.tensor([1e4, 1.0, 1e-4], device=DEVICE).view(
        3, 1, 1
    )
    bias = torch.randn(1101, device=DEVICE).to(dtype) if with_bias else None
    y = torch.full((5, 1101), 7.0, dtype=dtype, device=DEVICE)
    sum_parts_kernel[5, 2](parts, bias, y, 5, 1101, first_n, 3, 1024, False)
    total = parts[0] + parts[1] + parts[2] + (0 if bias is None else bias[first_n:].float())
    assert torch.equal(y[:, first_n:], total.to(dtype)) and (y[:, :first_n] == 7).all()


@pytest.mark.parametrize("mutant", ["nibbles swapped", "next group's scale", "next row's scale", "one bit", "no bias"])
def test_the_bounds_catch(mutant):
    torch.manual_seed(0)
    codes, packed, scale = make_weight(40, 96, 32)
    x, bias = make_inputs(5, 40, 96, torch.bfloat16, True)
    weight = dequantize(codes, scale, x.dtype)
    assert_accurate(int4_linear(x, packed, scale, bias, 96, 32), x, weight, bias)
    if mutant == "nibbles swapped":
        packed = (packed >> 4) | (packed << 4)
    elif mutant == "next group's scale":
        scale = scale.roll(1, 1)
    elif mutant == "next row's scale":
        scale = scale.roll(1, 0)
    elif mutant == "one bit":
        packed[17, 31] ^= 1
    y = int4_linear(x, packed, scale, None if mutant == "no bias" else bias, 96, 32)
    with pytest.raises(AssertionError):
        assert_accurate(y, x, weight, bias)


@pytest.mark.parametrize("k", [3, 65])
@pytest.mark.parametrize("zero_dtype", [None, torch.int8, torch.float32], ids=str)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy under the interpreter, on the padding
def test_padding_cannot_overflow(k, zero_dtype):
    # 8 * 9000 is beyond fp16, though no weight here is: padding must not become 0 + 8, and times an input 0 NaN.
    codes = torch.full((2, k), 1 if zero_dtype is None else -7, dtype=torch.int8, device=DEVICE)
    scale = torch.full((2, 1), 9000.0, device=DEVICE)
    zero_point = None if zero_dtype is None else torch.full((2, 1), -8, device=DEVICE).to(zero_dtype)
    x = torch.zeros(k, dtype=torch.float16, device=DEVICE)
    x[-1] = 2.0
    for stored in (scale, scale.half()):
        assert int4_linear(x, pack(codes, 4), stored, None, k, k, zero_point).tolist() == [18000.0] * 2


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("shape", [(33, 96, 32), (20, 256, 128), (17, 101, 101), (16, 192, 96)], ids=str)
def test_zero_points(shape, turn):
    """Each shape with each dtype and each dtype of zero points; each pair of dtypes with some shape."""
    n, k, group = shape
    zero_dtype, dtype = (torch.int8, torch.bfloat16, torch.float32)[turn], DTYPES[(turn + n) % 3]
    torch.manual_seed(n + k)
    codes, packed, scale = make_weight(n, k, group)
    zero_point = torch.randint(-8, 8, scale.shape, device=DEVICE)
    if zero_dtype.is_floating_point:
        zero_point = zero_point + torch.rand(scale.shape, device=DEVICE)
    zero_point = zero_point.to(zero_dtype)
    weight = dequantize(codes, scale, dtype, zero_point)
    assert torch.equal(int4_dequantize(prepack(packed, scale, zero_point, k, group), dtype), weight)
    for m in (1, 5, 40):
        x, bias = make_inputs(m, n, k, dtype, m == 5)
        assert_accurate(int4_linear(x, packed, scale, bias, k, group, zero_point), x, weight, bias)
    eye = torch.eye(k, dtype=dtype, device=DEVICE)
    for start in range(0, k, 48):
        rows = slice(start, start + 16)
        y = int4_linear(eye[rows], packed, scale, None, k, group, zero_point)
        assert torch.equal(y.T, weight[:, rows])


def test_same_result_every_time():
    torch.manual_seed(0)
    _, packed, scale = make_weight(70, 129, 129)
    x, bias = make_inputs(33, 70, 129, torch.bfloat16, True)
    first = int4_linear(x, packed, scale, bias, 129, 129)
    assert all(torch.equal(first, int4_linear(x, packed, scale, bias, 129, 129)) for _ in range(3))


@pytest.fixture
def batch_invariant():
    set_batch_invariant(True)
    yield
    set_batch_invariant(False)


def check_independence_of_batch(n, k, group, counts, dtype):
    codes, packed, scale = make_weight(n, k, group)
    weight = prepack(packed, scale.to(dtype), None, k, group)
    x, bias = make_inputs(max(counts), n, k, dtype, True)
    y = module.int4_linear(x, weight, bias)
    assert_accurate(y, x, dequantize(codes, scale, dtype), bias)
    for count in counts:
        assert torch.equal(module.int4_linear(x[:count], weight, bias), y[:count])
    assert torch.equal(module.int4_linear(x[-1], weight, bias), y[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_its_batch(batch_invariant, dtype):
    check_independence_of_batch(70, 96, 32, (1, 2, 16, 17, 33, 70), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "group"), [(4096, 4096, 128), (704, 2112, 64), (4097, 1001, 1001)])
def test_a_token_does_not_depend_on_its_batch_on_gpu(batch_invariant, n, k, group, dtype):
    check_independence_of_batch(n, k, group, (1, 8, 9, 16, 33, 64, 65, 300, 5000), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(4096, 4096, 128), (704, 2112, 64), (2112, 704, 32), (151936, 896, 128), (4097, 1001, 1001)],
)
def test_grid_on_gpu(n, k, group, dtype):
    torch.manual_seed(0)
    codes, packed, scale = make_weight(n, k, group)
    for m in (1, 16, 33, 300, 1025):
        x, bias = make_inputs(m, n, k, dtype, True)
        y = int4_linear(x, packed, scale, bias, k, group)
        weight = dequantize(codes, scale, dtype)
        if not torch.equal(y, F.linear(x, weight, bias)):  # else it is the library's, which may sum in fp16
            assert_accurate(y, x, weight, bias)
        assert torch.equal(y, int4_linear(x, packed, scale, bias, k, group))


PLANS = [
    (1, Stream(8, 8, 2, 7, 3)),
    (1, Stream(8, 4, 3, 132, 1)),
    (3, Few(8, 8, 2, 7, 1, 1)),
    (8, Few(8, 2, 3, 3, 3, 3)),
    (8, Few(16, 8, 2, 132, 1, 2)),
    (5, Few(16, 1, 2, 132, 3, 3)),
    (4, Decode(8, 1, 8, 4, 0, 2)),
    (8, Decode(4, 4, 8, 2, 2, 2)),
    (16, Decode(8, 2, 16, 2, 3, 0)),
    (16, Batch(4, 16, 8, 2, 4, 1, 2)),
    (16, Batch(8, 16, 8, 2, 4, 1, 1)),
    (32, Batch(4, 32, 4, 1, 4, 4, 2)),
    (64, Batch(8, 64, 4, 1, 4, 4, 2)),
    (64, Batch(8, 64, 8, 2, 4, 2, 2)),
    (16, Batch(8, 16, 16, 4, 4, 2, 2)),
    (16, Batch(4, 16, 8, 2, 4, 2, 2, 1)),
    (256, Batch(8, 256, 4, 1, 4, 1, 2)),
    (64, Batch(4, 64, 8, 2, 4, 2, 2)),
    (128, Batch(4, 128, 8, 2, 4, 1, 2)),
    (128, Batch(4, 64, 8, 2, 4, 3, 2, 1)),
    (300, Batch(8, 128, 8, 2, 4, 4, 2, 1, 3)),
    (300, Batch(8, 256, 4, 1, 4, 2, 2, 1, 2)),
    (300, Batch(4, 128, 8, 2, 4, 1, 2, 0, 2)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("group", [32, 64, 96, 128, None], ids=str)
@pytest.mark.parametrize("with_zero", [False, True])
def test_nvidia_weights_are_bit_identical_on_gpu(with_zero, group, dtype):
    torch.manual_seed(0)
    n, k = 200, 2112 if group is None else 6 * 128 * 3 // group * group
    group = group or k
    codes, packed, scale = make_weight(n, k, group)
    scale = (
        ((torch.rand_like(scale) + 1) * 2.0 ** torch.randint(-17, 3, scale.shape, device=DEVICE)).bfloat16().to(dtype)
    )
    zero_point = torch.randint(-8, 8, scale.shape, device=DEVICE).to(torch.int8) if with_zero else None
    weight = prepack(packed, scale, zero_point, k, group)
    expected = dequantize(codes, scale, dtype, zero_point)
    bias = torch.randn(n, device=DEVICE).to(dtype)
    for m, plan in PLANS:
        eye = torch.eye(k, dtype=dtype, device=DEVICE)
        y = torch.cat([run_plan(plan, rows.contiguous(), weight, None) for rows in eye.split(m)])
        assert torch.equal(y.T, expected), plan
        x = torch.randn(m, k, device=DEVICE).to(dtype)
        assert_accurate(run_plan(plan, x, weight, bias), x, expected, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_odd_shapes_on_gpu(dtype):
    torch.manual_seed(0)
    for n, k, group in [
        (704, 2112, 64),
        (2112, 704, 32),
        (4304, 7392, 32),
        (10944, 4304, 4304),
        (151936, 704, 64),
        (33, 77, 77),
    ]:
        codes, packed, scale = make_weight(n, k, group)
        scale = scale.to(dtype)
        weight, dense = prepack(packed, scale, None, k, group), dequantize(codes, scale, dtype)
        x, bias = make_inputs(33, n, k, dtype, True)
        for m in range(1, 34):
            assert_accurate(module.int4_linear(x[:m], weight, bias), x[:m], dense, bias)


@pytest.mark.gpu
def test_large_inputs_on_gpu():
    torch.manual_seed(0)
    codes, packed, scale = make_weight(4096, 14336, 128)
    dense, weight = dequantize(codes, scale, torch.bfloat16), prepack(packed, scale, None, 14336, 128)
    for m in (1, 7, 16, 40, 100, 300):
        x = (torch.rand(m, 14336, device=DEVICE) * 2e4 - 1e4).bfloat16()
        y = module.int4_linear(x, weight)
        assert y.isfinite().all()
        assert_accurate(y, x, dense)


@pytest.mark.gpu
def test_a_thousand_times_the_same_on_gpu():
    torch.manual_seed(0)
    _, packed, scale = make_weight(4096, 4096, 128)
    weight = prepack(packed, scale, None, 4096, 128)
    for m in (1, 8, 16, 64, 256):
        x = torch.randn(m, 4096, device=DEVICE).bfloat16()
        first = module.int4_linear(x, weight)
        differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(1000):
            differ += (module.int4_linear(x, weight) != first).sum()
        assert differ.item() == 0, m


@pytest.mark.gpu
def test_offsets_past_2_31_on_gpu():
    torch.manual_seed(0)
    n, k = 151936, 28672  # 2.2e9 bytes of weight
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
    scale = torch.rand(n, k // 128, device=DEVICE).bfloat16()
    x = torch.randn(3, k, device=DEVICE).bfloat16()
    y = int4_linear(x, packed, scale, None, k, 128)
    last = slice(n - 100, n)
    assert_accurate(y[:, last], x, dequantize(unpack(packed[last], 4, k), scale[last], x.dtype))
    x = torch.randn(80000, k, dtype=torch.bfloat16, device=DEVICE)  # 2.3e9 elements
    y = int4_linear(x, packed[:50], scale[:50], None, k, 128)
    # So many tokens go through the library's matmul, which may sum parts of K in bf16.
    assert torch.equal(y, F.linear(x, dequantize(unpack(packed[:50], 4, k), scale[:50], x.dtype)))


@pytest.mark.gpu
def test_compile_and_graph_capture_on_gpu():
    torch.manual_seed(0)
    _, packed, scale = make_weight(4096, 4096, 128)
    x, bias = make_inputs(16, 4096, 4096, torch.bfloat16, True)

    weight = prepack(packed, scale, None, 4096, 128)

    def layer(x):
        return module.int4_linear(x, weight, bias)

    compiled = torch.compile(layer, fullgraph=True)
    grads = [torch.autograd.grad(f(x.requires_grad_()).float().sum(), x)[0] for f in (layer, compiled)]
    torch.testing.assert_close(*grads)
    x = x.detach()
    expected = layer(x)
    assert torch.equal(compiled(x), expected)
    static, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(static)
    static.copy_(x)
    graph.replay()
    assert torch.equal(y, expected)
