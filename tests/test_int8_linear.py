"""Run: python -m pytest tests/test_int8_linear.py: W4A8 and W4A4 under Triton's interpreter; ``-m gpu`` on a GPU.

The reference is in tests/int8_problems.py, in float64 and integers.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_problems import DEVICE, DTYPES
from int8_problems import GRIDS, assert_exact_but_for_float32_sums, grid_of, integers_of, make_weight, product
from qat.kernels import int8_linear as module
from qat.kernels.int4_layout import prepack
from qat.kernels.int4_linear import backend, int4_linear
from qat.kernels.int8_codes import int8_codes, int8_codes_reference

from qat.errors import LayerError
from qat.numerics import MIN_SCALE
from qat.packing import pack
from qat.quantizers.dynamic import dynamic_codes
from qat.spec import Dynamic


def test_these_tests_run_the_kernel():
    assert backend(torch.device(DEVICE)).startswith("triton")


def test_by_hand():
    """One row of two groups: 2 (1 - 3) + 0.5 (7 * 4), times the step 0.25, plus a bias."""
    codes = torch.zeros(1, 128, dtype=torch.int8)
    codes[0, 0], codes[0, 1], codes[0, 127] = 1, -3, 7
    scale = torch.tensor([[2.0, 0.5]]).bfloat16()
    weight = prepack(pack(codes.to(DEVICE), 4), scale.to(DEVICE), None, 128, 64)
    x = torch.zeros(1, 128, device=DEVICE)
    x[0, 0], x[0, 1], x[0, 2], x[0, 127] = 0.25, 0.3, 100.0, 1.0
    y = module.int8_linear(
        x,
        weight,
        module.row_sums(weight),
        torch.tensor([[0.25]], device=DEVICE),
        bias=torch.tensor([1.0]).to(DEVICE),
    )
    assert module.row_sums(weight).tolist() == [-0.5]
    assert y.tolist() == [[0.25 * (2 * (1 - 3) + 0.5 * 28) + 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_those_of_training(name, dtype):
    for tokens, k in ((1, 64), (7, 130), (3, 5000)):
        x = torch.randn(tokens, k, device=DEVICE).to(dtype)
        x[0] = x[0].abs()
        found, expected = int8_codes(x, *grid_of(name)), int8_codes_reference(x, *grid_of(name))
        for part, other in zip(found, expected, strict=True):
            assert part.dtype == other.dtype and torch.equal(part, other)
        integers, step = integers_of(x, name)
        order = torch.arange(expected.codes.shape[1]).view(-1, 2, 32).transpose(1, 2).flatten()
        natural = torch.empty_like(expected.codes)
        natural[:, order] = expected.codes
        assert torch.equal(natural[:, :k].double() - expected.shift.double()[:, None], integers)
        assert torch.equal(expected.step.double(), step.flatten().expand(tokens))


def test_the_step_is_never_below_the_least_that_training_has():
    x, scale = torch.ones(1, 64, device=DEVICE) * MIN_SCALE * 3, torch.tensor([MIN_SCALE / 4], device=DEVICE)
    assert int8_codes(x, scale).codes.unique().tolist() == [3] and int8_codes(x, scale).step.item() == MIN_SCALE


INPUTS = [(1, False, torch.float32), (17, True, torch.bfloat16), (70, False, torch.float16)]
SHAPES = [(65, 128, 64), (3, 384, 128), (70, 512, 256), (17, 100, 100), (33, 192, 192), (1, 15, 15)]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grid(shape, name):
    """Each shape and each grid with all of the inputs, but not each pair of them: test_grid_on_gpu, test_any_shape."""
    m, with_zero, dtype = INPUTS[(SHAPES.index(shape) + list(GRIDS).index(name)) % 3]
    n, k, group = shape
    weight = make_weight(n, k, group, with_zero, dtype if with_zero else torch.bfloat16)
    x = (torch.randn(m, k, device=DEVICE) + 0.3).to(dtype)
    bias = torch.randn(n, device=DEVICE).to(dtype) if with_zero else None
    assert_exact_but_for_float32_sums(product(x, weight, name, bias), x, name, weight, bias)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    m=st.integers(0, 70),
    n=st.integers(1, 80),
    groups=st.integers(1, 4),
    group=st.sampled_from([64, 128, 192, 256]),
    row=st.none() | st.integers(1, 150),
    name=st.sampled_from(list(GRIDS)),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_any_shape(seed, m, n, groups, group, row, name, dtype, out, size):
    torch.manual_seed(seed)
    k, group = (groups * group, group) if row is None else (row, row)
    weight = make_weight(n, k, group, seed % 2 == 0)
    x = (torch.randn(m, k, device=DEVICE) * size).to(dtype)
    y = product(x, weight, name, dtype=out)
    assert y.shape == (m, n) and y.dtype == out
    if m:
        assert_exact_but_for_float32_sums(y, x, name, weight)


def test_the_reference_is_the_kernel_in_float64():
    weight = make_weight(40, 256, 128, True)
    x = torch.randn(2, 3, 256, device=DEVICE)
    for name in GRIDS:
        exact = module.int8_linear_reference(x, weight[2], *grid_of(name), dtype=torch.float64)
        integers, step = integers_of(x.view(6, 256), name)
        torch.testing.assert_close(
            exact.view(6, 40), integers @ (weight[0] * weight[1]).T * step, rtol=1e-12, atol=1e-12
        )
        assert_exact_but_for_float32_sums(product(x, weight, name).view(6, 40), x.view(6, 256), name, weight)


def test_the_largest_integers():
    """All codes at their ends, in the longest part: 256 * 128 * 8 in int32, and 255 after a shift."""
    codes = torch.full((16, 1024), -8, dtype=torch.int8, device=DEVICE)
    scale = torch.full((16, 1), 0.25, dtype=torch.bfloat16, device=DEVICE)
    weight = codes.double(), scale.double().expand(16, 1024), prepack(pack(codes, 4), scale, None, 1024, 1024)
    for name, size in (("int8", -1e4), ("uint8", 1e4), ("token", 3.0)):
        x = torch.full((2, 1024), size, device=DEVICE)
        assert_exact_but_for_float32_sums(product(x, weight, name), x, name, weight)


def test_a_token_does_not_depend_on_the_others_nor_on_the_run():
    weight = make_weight(48, 256, 64)
    x = torch.randn(65, 256, device=DEVICE)
    x[3, 7] = float("nan")
    y = product(x, weight, "token")
    assert torch.equal(product(x, weight, "token").view(torch.int32), y.view(torch.int32))
    assert y[3].isnan().all() and y.isnan().sum() == 48  # not hidden, and nowhere else
    for m in (1, 2, 61):
        assert torch.equal(product(x[-m:], weight, "token"), y[-m:])
    assert product(x[3:4], weight, "uint8").isnan().all()
    x[3, 7] = float("inf")  # which a trained scale clips, and int8 for each token makes NaN of, as in training
    assert product(x[3:4], weight, "token").isnan().all() and dynamic_codes(x[3:4], Dynamic.int8_token)[0].isnan().any()
    assert product(x[3:4], weight, "uint8").isfinite().all()


def test_the_step_of_a_token_that_is_no_number_is_none():
    x = torch.randn(9, 200, device=DEVICE)
    for row, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        x[row, 11 + row] = value
    x[3], x[4], x[5] = 0.0, -3.0, 2.0
    found, expected = int8_codes(x, None), int8_codes_reference(x, None)
    assert expected.step.isnan().tolist() == [True] * 3 + [False] * 6
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine[3:], its[3:])
    assert torch.equal(found.step.isnan(), expected.step.isnan())


def test_inputs_that_do_not_fit_are_refused():
    weight = make_weight(16, 128, 64)[2]
    sums, x = module.row_sums(weight), torch.randn(2, 128, device=DEVICE)
    in_halves = make_weight(16, 96, 32)[2]
    with pytest.raises(LayerError, match=r"a multiple of 64 or the whole row.*group_size=32 of 96: use int4_linear"):
        module.int8_linear(x[:, :96], in_halves, sums, None)
    real = weight._replace(zero_point=weight.scale)
    assert not module.takes(real) and not module.takes(weight._replace(levels=torch.randn(16)))
    for arguments, message in (
        ((x[:, :64], weight, sums, None), "with 128 inputs"),
        ((x.double(), weight, sums, None), "float64"),
        ((x, weight, sums, None, 9), "bits=9"),
        ((x, weight, sums[1:], None), "from row_sums"),
        ((x, weight, sums, None, 8, True, None, sums[1:]), "bias is"),
        ((x, weight, sums.to("meta"), None), "move them to one device"),
    ):
        with pytest.raises(LayerError, match=message):
            module.int8_linear(*arguments)


def test_opcheck_and_compile():
    weight = make_weight(16, 128, 64, True)[2]
    x, scale = torch.randn(3, 128, device=DEVICE), torch.tensor([[0.1]], device=DEVICE)
    bias, sums = torch.randn(16, device=DEVICE), module.row_sums(weight)
    parts = weight.words, weight.scale, weight.zero_point, sums, scale, 4, False, None, bias, 16, 128, 64, torch.float32
    torch.library.opcheck(torch.ops.qat.int8_linear.default, (x, *parts))
    compiled = torch.compile(lambda x: module.int8_linear(x, weight, sums, None), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), module.int8_linear(x, weight, sums, None))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["token", "uint8", "int4"])
@pytest.mark.parametrize("n, k, group", [(4096, 4096, 128), (704, 2112, 64), (1000, 4304, 4304), (6144, 4096, 256)])
def test_grid_on_gpu(n, k, group, name):
    for m in (1, 33, 128, 1000, 2049):
        for with_zero in (False, True):
            weight = make_weight(n, k, group, with_zero)
            x = torch.randn(m, k, device="cuda").bfloat16()
            y = product(x, weight, name)
            assert_exact_but_for_float32_sums(y, x, name, weight)
            assert all(torch.equal(product(x, weight, name), y) for _ in range(5))


@pytest.mark.gpu
def test_every_candidate_on_gpu():
    """Every plan that ``benchmarks.tune`` measures, and the portable kernel."""
    from qat.kernels.int4_candidates import int8_candidates
    from qat.kernels.int8_run import run_plan

    for n, k, group in ((1000, 2048, 128), (256, 1088, 64), (256, 1536, 512), (256, 1000, 1000)):
        for with_zero in (False, True):
            weight = make_weight(n, k, group, with_zero)
            for m in (64, 300):
                x = torch.randn(m, k, device="cuda").bfloat16()
                codes, sums = int8_codes(x, None), module.row_sums(weight[2])
                for plan in (None, *int8_candidates(m, 132)):
                    y = run_plan(plan, codes, weight[2], sums, None, torch.bfloat16)
                    assert_exact_but_for_float32_sums(y, x, "token", weight)


@pytest.mark.gpu
def test_cuda_graph():
    weight, x = make_weight(512, 1024, 128), torch.randn(600, 1024, device="cuda").bfloat16()
    sums = module.row_sums(weight[2])
    expected = module.int8_linear(x, weight[2], sums, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module.int8_linear(x, weight[2], sums, None)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    assert (int4_linear(x, weight[2]) - y).abs().max() < 0.05 * y.abs().max()
