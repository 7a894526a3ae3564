"""Codebooks: nearest levels by hand, straight-through gradients, and one arithmetic from training to the artifact."""

import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qat
from qat import codebook, double_quantization
from qat.checkpoint import load_state
from qat.errors import LayerError, PolicyError, SpecError, StateError
from qat.frozen_model import from_model
from qat.numerics import QuantizedTensor
from qat.packing import pack, unpack
from qat.quantizers import WeightCodebook
from qat.quantizers.kmeans import kmeans_levels, normal_levels

TABLE = [-1.0, -0.5, 0.25, 1.0]  # 2 bits


def nf4(**options):
    return qat.QuantSpec(codebook="nf4", **options)


def custom(**options):
    return qat.QuantSpec(**{"bits": 2, "codebook": "custom", **options})


def prepared(spec, inputs=64, rows=8, dtype=torch.float32, levels=TABLE):
    model = nn.Sequential(nn.Linear(inputs, rows, dtype=dtype), nn.ReLU(), nn.Linear(rows, rows, dtype=dtype))
    rules = [{"match": "2", "weight": None}]
    qat.prepare(model, qat.QuantPolicy(weight=spec, rules=rules), verbose=False)
    if spec.codebook == "custom":
        model[0].weight_quantizer.set_levels(torch.tensor(levels))
    return model


def test_nf4_levels_are_the_quantiles_of_qlora():
    check_levels_of_nf4(codebook)


def check_levels_of_nf4(codebook):
    """arXiv:2305.14314, appendix E, with the offset 0.9677083 of its implementation, which the paper leaves unsaid."""
    normal = torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1]).flip(0)
    negative = -normal.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([negative, torch.zeros(1), positive]) / positive[-1]
    assert torch.allclose(torch.tensor(codebook.NF4, dtype=torch.float64), levels, atol=1e-6)


def test_the_mean_error_of_a_normal_weight_is_the_published_one():
    """bitsandbytes' tests/test_functional.py: mean |error| of NF4 on N(0, 1), 0.0728 +- 0.0005 in blocks of 64."""
    x = torch.randn(1024, 1024)
    for block, error in ((32, 0.0677), (64, 0.0728), (128, 0.0768), (256, 0.0803)):
        values = codebook.fake_quantized(x, (1024, 1024 // block), torch.tensor([codebook.NF4]))
        assert (values - x).abs().mean().item() == pytest.approx(error, abs=2e-4)


def test_nearest_levels_and_ties_by_hand():
    check_by_hand(codebook)


def check_by_hand(codebook):
    """With s = 4 the bounds lie at -3, -0.5 and 2.5; a tie goes to the lower level."""
    x = torch.tensor([[-4.0, -3.1, -3.0, -2.9, -0.5, 0.0, 2.5, 2.6, 3.9, 0.0]])
    scale = codebook.block_scale(x, (1, 1))
    levels = torch.tensor([TABLE])
    codes = codebook.quantize(x, scale, levels)
    assert scale.tolist() == [[4.0]] and codes.dtype == torch.int8
    assert codes.tolist() == [[0, 0, 0, 1, 1, 2, 2, 3, 3, 2]]
    assert codebook.dequantize(codes, scale, levels, torch.float32).tolist() == [[-4, -4, -4, -2, -2, 1, 1, 4, 4, 1]]


def test_the_reciprocal_of_the_scale_multiplies():
    check_reciprocal(codebook)


def check_reciprocal(codebook):
    """As in bitsandbytes, where x * (1 / s) and x / s lie on different sides of a bound; numpy is the judge."""
    levels = numpy.array(codebook.NF4, dtype=numpy.float32)
    bounds = (levels[1:] + levels[:-1]) / numpy.float32(2)
    scale = numpy.random.default_rng(0).random((2000, 1), dtype=numpy.float32) + numpy.float32(0.1)
    x = numpy.concatenate(
        [numpy.nextafter(bounds * scale, numpy.float32(way)) for way in (-9, 9)] + [bounds * scale], 1
    )
    expected = ((x * (numpy.float32(1) / scale))[..., None] > bounds).sum(-1)
    assert (expected != ((x / scale)[..., None] > bounds).sum(-1)).any()
    made = codebook.quantize(torch.from_numpy(x), torch.from_numpy(scale), torch.from_numpy(levels)[None])
    assert (made.numpy() == expected).all()


def test_a_block_of_zeros_stays_zero():
    check_zeros(codebook)


def check_zeros(codebook):
    x = torch.zeros(1, 64)
    x[0, 32:] = torch.linspace(-1, 1, 32)
    values = codebook.fake_quantized(x, (1, 2), torch.tensor([codebook.NF4]))
    assert values[0, :32].eq(0).all() and values.isfinite().all() and values[0, -1] == 1
    assert codebook.quantize(x, codebook.block_scale(x, (1, 2)), torch.tensor([codebook.NF4]))[0, :32].eq(7).all()


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    block=st.integers(1, 9),
    bits=st.integers(2, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_the_nearest_level_is_chosen(rows, groups, block, bits, dtype, seed):
    """Against distances to all levels in float64, of a table a row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, groups * block, generator=generator).to(dtype)
    levels = torch.rand(rows, 2**bits, generator=generator).sort().values * 2 - 1
    levels += torch.arange(2**bits) * 1e-4  # no two are equal
    scale = codebook.block_scale(x, (rows, groups))
    codes = codebook.quantize(x, scale, levels)
    ratio = x.double().view(rows, groups, block) / scale.double()[..., None]
    distance = (ratio.view(rows, -1, 1) - levels.double()[:, None]).abs()
    chosen = distance.gather(-1, codes.view(rows, -1, 1).long())[..., 0]
    assert (chosen <= distance.amin(-1) + 1e-6).all()
    made = codebook.dequantize(codes, scale, levels, torch.float32)
    expected = torch.stack([table[row.long()] for table, row in zip(levels, codes, strict=True)])
    assert torch.equal(made, expected * scale.repeat_interleave(block, 1))


def double(**options):
    return qat.QuantSpec(codebook="nf4_double", **options)


@pytest.mark.parametrize(
    "spec",
    [nf4(group_size=32), nf4(), nf4(granularity="tensor"), custom(group_size=16), double(group_size=16), double()],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_trains_is_what_is_frozen_saved_and_loaded(tmp_path, spec, dtype):
    model = prepared(spec, dtype=dtype)
    trained = model[0].weight_quantizer(model[0].weight)
    before = qat.quantized_tensors(model)["0"]
    assert before.codes.min() >= 0 and before.codes.max() < 2**spec.bits and before.scale.dtype == torch.float32
    assert torch.equal(before.dequantize(dtype), trained)
    qat.freeze(model)
    x = torch.randn(3, 64, dtype=dtype)
    assert torch.equal(model[0](x), nn.functional.linear(x, trained, model[0].bias))
    qat.save(model, tmp_path / "out")
    fresh = nn.Sequential(nn.Linear(64, 8, dtype=dtype), nn.ReLU(), nn.Linear(8, 8, dtype=dtype))
    after = qat.quantized_tensors(qat.load(tmp_path / "out", model=fresh))["0"]
    assert torch.equal(after.codes, before.codes) and torch.equal(after.dequantize(dtype), trained)
    assert after.spec == before.spec and after.bits_per_weight == before.bits_per_weight
    assert torch.equal(fresh(x), model(x))


def test_each_row_has_its_own_levels():
    check_rows(codebook)


def check_rows(codebook):
    levels = torch.tensor([TABLE, [-1.0, 0.0, 0.5, 1.0]])
    x = torch.tensor([[-4.0, 2.2, 1.0, 4.0], [-1.0, 0.55, 0.1, 1.0]])
    made = codebook.fake_quantized(x, (2, 1), levels)
    assert made.tolist() == [[-4.0, 1.0, 1.0, 4.0], [-1.0, 0.5, 0.0, 1.0]]


def check_gradient(codebook):
    x = torch.tensor([[-4.0, 0.3, 1.0, 4.0]], requires_grad=True)
    made = codebook.fake_quantize(x, (1, 2), torch.tensor([TABLE]))
    made.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert x.grad.tolist() == [[1.0, 2.0, 3.0, 4.0]]
    assert torch.equal(made, codebook.fake_quantized(x, (1, 2), torch.tensor([TABLE])))


def test_gradients_pass_straight_through():
    check_gradient(codebook)
    model = prepared(nf4(group_size=32))
    x, weight = torch.randn(5, 64), model[0].weight
    model[0](x).sum().backward()
    assert torch.equal(weight.grad, torch.ones(5, 8).T @ x)
    assert not list(model[0].weight_quantizer.parameters())


def check_nested(double_quantization):
    """By hand: levels -1, 0, 0.5 and 1; offset 2; the largest distance from it 2, so bounds at -1, 0.5 and 1.5."""
    levels = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    nested = double_quantization.nest(torch.tensor([[0.0, 4.0], [2.4, 2.6], [1.0, 2.0]]), levels)
    assert nested.offset == 2 and nested.factor.tolist() == [2.0]
    assert nested.codes.tolist() == [[0, 3], [1, 2], [0, 1]] and nested.codes.dtype == torch.uint8
    assert nested.values().tolist() == [[0.0, 4.0], [2.0, 3.0], [0.0, 2.0]]
    long = double_quantization.nest(torch.arange(600.0).view(2, 300), double_quantization.dynamic_map())
    assert long.factor.tolist() == [299.5, 211.5, 300.5 - 1]
    assert (long.values() - torch.arange(600.0).view(2, 300)).abs().max() < 4


def test_scales_are_quantized_by_hand():
    check_nested(double_quantization)


def test_the_dynamic_map():
    levels = double_quantization.dynamic_map()
    assert levels.shape == (256,) and (levels.diff() > 0).all()
    assert levels[-1] == 1 and 0.0 in levels and levels[0].item() == pytest.approx(-0.99296875)
    assert levels[128].item() == pytest.approx(0.55e-6)  # the one mean of the lowest decade


@pytest.mark.clients
def test_the_dynamic_map_is_bitsandbytes_own_but_for_its_rounding():
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.testing.assert_close(double_quantization.dynamic_map(), functional.create_dynamic_map(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("spec", [nf4(group_size=32), double(group_size=32)])
def test_compiled_training_has_the_same_bits(spec):
    model = prepared(spec)
    x = torch.randn(5, 64)
    eager = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    compiled.sum().backward()
    grad = model[0].weight.grad.clone()
    model[0].weight.grad = None
    eager.sum().backward()
    assert torch.equal(eager, compiled) and torch.equal(model[0].weight.grad, grad)


def test_convolutions_and_tied_weights():
    model = nn.Sequential(nn.Conv2d(4, 8, 4), nn.Conv2d(4, 8, 4))
    model[1].weight = model[0].weight
    qat.prepare(model, qat.QuantPolicy(weight=nf4(group_size=32)), verbose=False)
    assert model[0].weight_quantizer is model[1].weight_quantizer
    trained = model[0].weight_quantizer(model[0].weight)
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(qat.freeze(model)[0](x), nn.functional.conv2d(x, trained, model[0].bias))
    assert from_model(model).layers["1"].tied == "0"


def test_bits_are_counted():
    assert qat.quantized_tensors(prepared(nf4(group_size=64)))["0"].bits_per_weight == 4.5
    nested = qat.quantized_tensors(prepared(double(group_size=64), inputs=2048, rows=64))["0"]
    assert nested.bits_per_weight == 4 + 8 / 64 + 32 / (64 * 256) + 32 * 257 / (64 * 2048)
    own = qat.quantized_tensors(prepared(custom(group_size=64)))["0"]
    assert own.bits_per_weight == 2 + 32 / 64 + 4 * 32 / 64
    assert " 4.50\n" in qat.summary(prepared(nf4(group_size=64)))
    assert " 4.50\n" in qat.summary(prepared(custom(group_size=64)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_indices_pack_from_zero(bits):
    codes = torch.randint(0, 2**bits, (3, 21), dtype=torch.int8)
    assert torch.equal(unpack(pack(codes, bits, 0), bits, 21, 0), codes)
    assert pack(torch.tensor([[1, 2]], dtype=torch.int8), 4, 0).tolist() == [[0x21]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook": "nf5"}, "codebook='nf5' is unknown.*did you mean 'nf4'"),
        ({"codebook": "nf4", "bits": 3}, "codebook='nf4' has 4 bits, not 3"),
        ({"codebook": "custom", "bits": 5}, "2 to 4 bits, not 5"),
        ({"codebook": "nf4", "symmetric": False}, "drop symmetric=False"),
        ({"codebook": "nf4", "signed": False}, "signed=False"),
        ({"codebook": "nf4", "scale_dtype": "bfloat16"}, "float32, as in bitsandbytes"),
    ],
)
def test_specs_that_cannot_be(options, message):
    with pytest.raises(SpecError, match=message):
        qat.QuantSpec(**options)


def test_specs():
    assert (nf4().q_n, nf4().q_p, nf4().scale_dtype) == (0, 15, "float32")
    assert str(nf4(group_size=64)) == "nf4 g64" and str(custom()) == "codebook2 channel"
    assert qat.QuantSpec(group_size=64).override({"codebook": "nf4"}) == nf4(group_size=64)
    assert nf4(group_size=64).override({"codebook": None}) == qat.QuantSpec(group_size=64)
    assert qat.QuantSpec.from_dict(nf4(group_size=64).to_dict()) == nf4(group_size=64)
    with pytest.raises(PolicyError, match="activations take no codebook"):
        qat.QuantPolicy(weight=nf4(), activation=nf4(granularity="tensor")).specs_of(None)


def test_a_rule_can_give_a_layer_a_codebook():
    policy = qat.QuantPolicy(weight={"group_size": 32}, rules=[{"match": "0", "weight": {"codebook": "nf4"}}])
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    qat.prepare(model, policy, verbose=False)
    assert isinstance(model[0].weight_quantizer, WeightCodebook)
    assert str(model[1].weight_quantizer.spec) == "int4 g32"
    assert qat.QuantPolicy.from_dict(policy.to_dict()) == policy


def test_inputs_that_blocks_do_not_divide_are_refused_with_sizes_that_do():
    with pytest.raises(
        LayerError, match="group_size=64 does not divide its 96 inputs; group sizes that do: 8, 16, 24, 32"
    ):
        prepared(nf4(group_size=64), inputs=96)


def test_a_custom_codebook_must_be_set_and_fit():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4))
    qat.prepare(model, qat.QuantPolicy(weight=custom()), verbose=False).to_empty(device="cpu")
    model[0].weight_quantizer.levels.copy_(torch.arange(4.0))  # what to_empty finds in memory can look like levels
    model.load_state_dict({"0.weight": torch.randn(4, 8), "0.bias": torch.zeros(4)}, strict=False)
    for act in (lambda: model(torch.ones(1, 8)), lambda: qat.freeze(model), lambda: qat.quantized_tensors(model)):
        with pytest.raises(StateError, match=r"the codebook of '0' was never set: .*call set_levels"):
            act()
    quantizer = model[0].weight_quantizer
    for levels, message in (
        (torch.tensor([0.0, 1.0]), "give .4, 4., or one table of 4"),
        (torch.tensor([0.0, 1.0, 1.0, 2.0]), "finite and ascend"),
        (torch.tensor([0.0, 1.0, torch.nan, 2.0]), "finite and ascend"),
        (torch.zeros(3, 4), "give .4, 4."),
    ):
        with pytest.raises(LayerError, match=f"'0': .*{message}"):
            quantizer.set_levels(levels)
    quantizer.set_levels(torch.tensor(TABLE))
    state = model.state_dict()
    other = nn.Sequential(nn.Linear(8, 4))
    qat.prepare(other, qat.QuantPolicy(weight=custom()), verbose=False)
    load_state(other, state, "a checkpoint")
    assert torch.equal(other(torch.ones(1, 8)), model(torch.ones(1, 8)))


def test_kmeans_finds_the_levels_of_a_row_that_has_as_many_values():
    values = torch.tensor([[0.1, -1.0, 0.1, 0.5, 0.5, 1.0, -1.0, 1.0], [-1.0, -1.0, 0, 0, 0.25, 0.25, 1.0, 1.0]])
    expected = [[-1.0, 0.1, 0.5, 1.0], [-1.0, 0.0, 0.25, 1.0]]
    torch.testing.assert_close(kmeans_levels(values, torch.ones_like(values), normal_levels(2)), torch.tensor(expected))


def test_kmeans_weighs_values():
    """Two levels for three values: the heavy ones are met, the light one joins the nearer."""
    values, importance = torch.tensor([[0.0, 0.6, 1.0]]), torch.tensor([[10.0, 1.0, 3.0]])
    torch.testing.assert_close(kmeans_levels(values, importance, torch.tensor([0.0, 1.0])), torch.tensor([[0.0, 0.9]]))


@given(rows=st.integers(1, 4), size=st.integers(1, 200), bits=st.integers(2, 4), seed=st.integers(0, 99))
def test_kmeans_is_a_fixed_point_and_ascends(rows, size, bits, seed):
    """Each level is the mean of the values nearest to it, against a plain assignment in numpy."""
    values = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    levels = kmeans_levels(values, torch.ones_like(values), normal_levels(bits))
    assert (levels.diff() > 0).all()
    for row, table in zip(values.double().numpy(), levels.double().numpy(), strict=True):
        nearest = numpy.abs(row[:, None] - table).argmin(1)
        error = ((row - table[nearest]) ** 2).mean()
        means = [row[nearest == at].mean() if (nearest == at).any() else table[at] for at in range(2**bits)]
        better = ((row[:, None] - numpy.array(means)) ** 2).min(1).mean()
        assert error <= better + 0.02 * row.var() + 1e-9  # Lloyd may stop before its fixed point


def test_normal_levels_are_nf4_for_4_bits():
    torch.testing.assert_close(normal_levels(4), torch.tensor(codebook.NF4), atol=1e-6, rtol=0)
    for bits in (2, 3):
        levels = normal_levels(bits)
        assert len(levels) == 2**bits and (levels.diff() > 0).all() and {-1.0, 0.0, 1.0} <= set(levels.tolist())


def test_custom_levels_start_nearer_than_nf4():
    weight = torch.randn(64, 1024) ** 3  # heavier tails than a normal distribution's
    error = {}
    for name in ("nf4", "custom"):
        fresh = nn.Sequential(nn.Linear(1024, 64, bias=False))
        fresh[0].weight.data = weight.clone()
        qat.prepare(fresh, qat.QuantPolicy(weight=qat.QuantSpec(codebook=name, group_size=64)), verbose=False)
        error[name] = (fresh[0].weight_quantizer(weight) - weight).square().mean().item()
    assert error["custom"] < 0.8 * error["nf4"]


def test_a_tensor_without_its_levels_is_refused():
    with pytest.raises(LayerError, match="without its levels"):
        QuantizedTensor(torch.zeros(1, 8, dtype=torch.int8), torch.ones(1, 1), replace(custom(), signed=True))


def test_a_weight_with_nan_is_refused_by_name():
    model = prepared(nf4(group_size=32))
    model[0].weight.data[1, 2] = torch.nan
    with pytest.raises(LayerError, match=r"'0': .*NaN"):
        qat.freeze(model)


def test_a_model_moved_from_the_meta_device_keeps_the_levels():
    model = prepared(nf4(group_size=32)).to("meta").to_empty(device="cpu")
    assert model[0].weight_quantizer.levels[0].tolist() == pytest.approx(codebook.NF4)
    frozen = qat.freeze(prepared(nf4(group_size=32))).to("meta").to_empty(device="cpu")
    assert frozen[0].packed_weight.levels[0].tolist() == pytest.approx(codebook.NF4)


def test_configs_take_the_word(tmp_path):
    command = [sys.executable, "-P", "-m", "qat.train", "--cfg", "job", "--package", "policy"]
    command += ["experiment=topics_w4", "policy.weight.codebook=nf4", "policy.weight.group_size=64"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert "codebook: nf4" in shown
    assert str(qat.QuantPolicy.from_yaml("lm_nf4").weight) == "nf4 g64"
