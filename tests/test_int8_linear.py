"""Run: python -m pytest tests/test_int8_linear.py: W4A8 and W4A4 under Triton's interpreter; ``-m gpu`` on a GPU.

The reference of these tests is written out here, in float64 and integers.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qat.kernels import int8_linear as module
from qat.kernels.int4_layout import prepack
from qat.kernels.int4_linear import backend, int4_linear
from qat.kernels.int8_codes import int8_codes, int8_codes_reference
from torch import nn

import qat
from qat.backend import set_batch_invariant, set_int8_products
from qat.errors import LayerError
from qat.numerics import MIN_SCALE, quantize
from qat.packing import pack
from qat.quantizers.dynamic import dynamic_codes
from qat.spec import Dynamic, QuantSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# A trained scale, bits, signed, zero point; no scale is int8 for each token.
GRIDS = {
    "token": (None, 8, True, None),
    "int8": (0.03, 8, True, None),
    "uint8": (0.015, 8, False, None),
    "int4": (0.3, 4, True, None),
    "uint4": (0.2, 4, False, None),
    "int2": (0.7, 2, True, None),
    "int8 with an offset": (0.02, 8, True, -77),
    "int4 with an offset": (0.3, 4, True, -5),
}


@pytest.fixture(autouse=True)
def restored():
    """Leave the rules as they were."""
    yield
    set_int8_products(None)
    set_batch_invariant(False)


def grid_of(name, device=DEVICE):
    scale, bits, signed, zero_point = GRIDS[name]
    if zero_point is not None:
        zero_point = torch.tensor([[zero_point]], dtype=torch.int8, device=device)
    scale = None if scale is None else torch.tensor([[scale]], dtype=torch.bfloat16, device=device)
    return scale, bits, signed, zero_point


def make_weight(n, k, group, with_zero=False, scale_dtype=torch.bfloat16, device=DEVICE):
    """Return codes less zero points (N, K) and scales (N, K), in float64, and the weight."""
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
    scale = (torch.rand(n, k // group, device=device) * 0.1 + 0.01).to(scale_dtype)
    zero_point = torch.randint(-8, 8, scale.shape, dtype=torch.int8, device=device) if with_zero else None
    values = codes.double()
    if with_zero:
        values -= zero_point.double().repeat_interleave(group, 1)
    return values, scale.double().repeat_interleave(group, 1), prepack(pack(codes, 4), scale, zero_point, k, group)


def integers_of(x, name):
    """Return code - zero point (M, K) and the step (M, 1) of training, in float64."""
    scale, bits, signed, zero_point = grid_of(name, x.device)
    if scale is None:
        codes, step, zero_point = dynamic_codes(x, Dynamic.int8_token)
        return (codes - zero_point).double(), step.double()
    spec = QuantSpec(bits=bits, granularity="tensor", signed=signed)
    less = 0.0 if zero_point is None else zero_point.double()
    return quantize(x, scale, spec, zero_point).double() - less, scale.double()


def assert_exact_but_for_float32_sums(y, x, name, weight, bias=None):
    """Check y against integers: float32 sums of parts, correction for zero points, step and bias, and y's dtype.

    A float32 sum of P terms is off by about sqrt(P) units of 2^-24 of the sum of magnitudes at most, and twice that is
    allowed, as in tests/test_int4_linear.py. The magnitudes are those of parts of 64 inputs, with the zero point in.
    """
    values, scale, packed = weight
    integers, step = integers_of(x, name)
    exact = integers @ (values * scale).T * step
    shift = int8_codes_reference(x, *grid_of(name, x.device)).shift
    parts = -(-x.shape[1] // 64)
    stored = integers + shift.double()[:, None]
    magnitude = sum((stored[:, k : k + 64] @ (values * scale)[:, k : k + 64].T).abs() for k in range(0, x.shape[1], 64))
    magnitude += (shift.double()[:, None] * (values * scale).sum(1)).abs()
    magnitude = magnitude * step
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    one_rounding = HALF_ULP[y.dtype] * exact.abs() + torch.finfo(y.dtype).smallest_normal * HALF_ULP[y.dtype]
    error = (y.double() - exact).abs()
    assert (error <= 1.01 * one_rounding + 2 * (parts + 4) ** 0.5 * 2.0**-24 * magnitude).all()
    assert packed.out_features == y.shape[1]


def product(x, weight, name, bias=None, dtype=None):
    return module.int8_linear(x, weight[2], module.row_sums(weight[2]), *grid_of(name, x.device), bias, dtype)


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


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    ("n", "k", "group"), [(65, 128, 64), (3, 384, 128), (70, 512, 256), (17, 100, 100), (33, 192, 192), (1, 15, 15)]
)
def test_grid(n, k, group, name):
    for m, with_zero, dtype in ((1, False, torch.float32), (17, True, torch.bfloat16), (70, False, torch.float16)):
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


def frozen(activation, group_size=64, dtype=torch.float32, **weight):
    """Return a fake-quant layer that has seen data, its frozen twin, and inputs."""
    layer = nn.Sequential(nn.Linear(128, 48)).to(dtype)
    spec = QuantSpec(group_size=group_size, **weight)
    model = qat.prepare(layer, qat.QuantPolicy(weight=spec, activation=activation), verbose=False)
    x = torch.randn(5, 128).to(dtype)
    if isinstance(activation, dict) and activation.get("signed") is False:
        x = x.abs()
    qat.calibrate(model, [x])
    shipped = qat.freeze(copy.deepcopy(model))
    if DEVICE == "cpu":
        shipped[0].packed_weight.prepack()
    return model.to(DEVICE), shipped.to(DEVICE) if DEVICE != "cpu" else shipped, x.to(DEVICE)


def runs_in_integers(monkeypatch):
    """Return a list that grows with each product of integers."""
    calls, run = [], torch.ops.qat.int8_linear
    monkeypatch.setattr(torch.ops.qat, "int8_linear", lambda *arguments: calls.append(arguments) or run(*arguments))
    return calls


ACTIVATIONS = {
    "int8 a token": "int8_token",
    "int8": {"bits": 8, "granularity": "tensor"},
    "uint8": {"bits": 8, "granularity": "tensor", "signed": False},
    "int4": {"bits": 4, "granularity": "tensor"},
    "uint4": {"bits": 4, "granularity": "tensor", "signed": False},
    "int8 with an offset": {"bits": 8, "granularity": "tensor", "symmetric": False},
}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_frozen_layer_computes_what_was_trained(activation, symmetric, monkeypatch):
    """The integers of the training forward: in float32, where it rounds nothing else, its outputs too."""
    trained, shipped, x = frozen(ACTIVATIONS[activation], symmetric=symmetric)
    expected = trained(x)
    with torch.no_grad():
        before = shipped(x)
        calls = runs_in_integers(monkeypatch)
        set_int8_products(5)
        after = shipped(x)
        assert len(calls) == 1 and shipped(x[:4]).shape == (4, 48) and len(calls) == 1
    largest = expected.abs().max()
    assert (before - expected).abs().max() <= 1e-5 * largest and (after - expected).abs().max() <= 1e-5 * largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_integers_are_nearer_to_what_was_trained(dtype):
    _, shipped, x = frozen("int8_token", dtype=dtype)
    layer = shipped[0]
    tensor = layer.packed_weight.quantized_tensor()
    weight = tensor.codes.double() * tensor.scale.double().repeat_interleave(64, 1)
    integers, step = integers_of(x, "token")
    exact = integers @ weight.to(x.device).T * step + layer.bias.double()
    with torch.no_grad():
        rounded = (shipped(x).double() - exact).square().mean()
        set_int8_products(1)
        in_integers = (shipped(x).double() - exact).square().mean()
    assert in_integers < rounded < 2.0**-10 * exact.square().mean()


def test_where_layers_keep_their_present_path(monkeypatch):
    calls = runs_in_integers(monkeypatch)
    _, shipped, x = frozen("int8_token")
    with torch.no_grad():
        shipped(x)
        set_int8_products(6)
        shipped(x)
        set_int8_products(1)
        set_batch_invariant(True)
        shipped(x)
        set_batch_invariant(False)
        shipped[0].activation_quantizer.enabled = False
        shipped(x)
        for other in (frozen("q8_0"), frozen("int8_token", group_size=32), frozen(None)):
            other[1](other[2])
        shipped[0].activation_quantizer.enabled = True
    shipped(x.clone().requires_grad_()).sum().backward()
    assert not calls
    shipped[0].bias.requires_grad_(False)
    shipped(x)
    assert len(calls) == 1


@pytest.mark.parametrize("activation", ["int8_token", {"bits": 8, "granularity": "tensor", "signed": False}], ids=str)
def test_a_compiled_model_is_one_graph(activation):
    """For each choice, and another when it changes."""
    _, shipped, x = frozen(activation, dtype=torch.bfloat16)
    compiled = torch.compile(shipped, fullgraph=True, backend="aot_eager")
    outputs = []
    with torch.no_grad():
        for tokens in (5, None):
            set_int8_products(tokens)
            outputs.append(shipped(x))
            assert torch.equal(compiled(x), outputs[-1])
    assert not torch.equal(*outputs)


def test_the_summary_says_which_layers_multiply_integers():
    def lines(model):
        return [
            line for line in qat.summary(model).splitlines() if "multiply integers" in line or line.startswith("  not")
        ]

    fits, halves, blocks, wide = (
        frozen(*arguments, **options)[1]
        for arguments, options in (
            (("int8_token",), {}),
            (("int8_token", 32), {}),
            (("q8_0",), {}),
            (("int8_token",), {"bits": 8}),
        )
    )
    model = nn.Sequential(fits[0], nn.ReLU(), halves[0], blocks[0], wide[0])
    assert not lines(model)
    set_int8_products(64)
    assert lines(model) == [
        "from 64 tokens on, 1 of 4 layers with int8 inputs multiply integers",
        "  not 2: groups of 32: a multiple of 64 would",
        "  not 3: q8_0 has a scale for each 32 inputs",
        "  not 4: its weight is int8 g64",
    ]
    assert not lines(frozen(None)[1])


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU it is laid out by itself")
def test_the_summary_of_a_model_that_is_on_a_cpu():
    set_int8_products(64)
    model = qat.freeze(
        qat.prepare(
            nn.Sequential(nn.Linear(64, 32)), qat.QuantPolicy(weight=QuantSpec(), activation="int8_token"), False
        )
    )
    text = qat.summary(model)
    assert "0 of 1 layers" in text and "not 0: its weight is not on a GPU with Triton" in text


def test_autocast_and_moves(monkeypatch):
    """Codes come from x as it arrives; the result has autocast's dtype; sums follow the weight to another state."""
    _, shipped, x = frozen("int8_token")
    _, other, _ = frozen("int8_token")
    shipped[0].bias.data = shipped[0].bias.data.bfloat16().float()  # as autocast rounds it
    set_int8_products(1)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        y = shipped(x)
    with torch.no_grad():
        assert y.dtype == torch.bfloat16 and torch.equal(y, shipped(x).bfloat16())
        other.load_state_dict(shipped.state_dict())
        if DEVICE == "cpu":
            assert other[0].packed_weight.row_sums is None  # as the kernels' order is undone
            other[0].packed_weight.prepack()
        calls = runs_in_integers(monkeypatch)
        assert torch.equal(other(x), shipped(x)) and len(calls) == 2


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
    from qat.kernels.int4_plans import int8_candidates
    from qat.kernels.int8_run import run_plan

    for n, k, group in ((1000, 2048, 128), (256, 1088, 64), (256, 1536, 512), (256, 1000, 1000)):
        for with_zero in (False, True):
            weight = make_weight(n, k, group, with_zero)
            for m in (64, 300):
                x = torch.randn(m, k, device="cuda").bfloat16()
                codes, sums = int8_codes(x, None), module.row_sums(weight[2])
                for plan in (None, *int8_candidates(m)):
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
