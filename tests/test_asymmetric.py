"""Weights with zero points: LSQ's formulas on a shifted grid, and all the way into the artifact and a format."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qat
from qat.errors import LayerError
from qat.frozen_model import from_model, to_model
from qat.quantizers import AsymmetricLSQ, WeightLSQ

SPEC = {"group_size": 8, "symmetric": False}


def quantizer(weight, spec, step_size, zero_point):
    made = AsymmetricLSQ(spec, weight, "w")
    made.start(step_size, zero_point)
    return made


@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_are_the_formulas(bits, rows, groups, seed):
    """In float64, one element at a time, with scales that bf16 holds."""
    generator = torch.Generator().manual_seed(seed)
    spec = qat.QuantSpec(bits=bits, group_size=8, symmetric=False, signed=True)
    weight = torch.randn(rows, 8 * groups, generator=generator, dtype=torch.float64)
    step_size = (0.05 + torch.rand(rows, groups, generator=generator)).bfloat16()
    zero_point = torch.randint(-spec.q_n, spec.q_p + 1, (rows, groups), generator=generator, dtype=torch.int8)
    made = quantizer(weight, spec, step_size.float(), zero_point)
    x = weight.clone().requires_grad_()
    upstream = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    (made(x) * upstream).sum().backward()
    assert torch.equal(made.quantize(weight).dequantize(torch.float64), made(weight))
    for row in range(rows):
        for group in range(groups):
            s, z, slope = step_size[row, group].double(), int(zero_point[row, group]), 0.0
            for column in range(8 * group, 8 * group + 8):
                ratio = weight[row, column] / s
                code = min(max(round(ratio.item()) + z, -spec.q_n), spec.q_p)
                assert made(weight)[row, column] == (code - z) * s
                inside = -spec.q_n < ratio + z < spec.q_p
                assert x.grad[row, column] == (upstream[row, column] if inside else 0)
                slope += upstream[row, column] * ((code - z) - (ratio if inside else 0))
            expected = slope / (8 * spec.q_p) ** 0.5
            assert torch.isclose(made.step_size.grad[row, group].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_shift_it_is_symmetric_lsq(dtype):
    weight = torch.randn(6, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    plain = WeightLSQ(qat.QuantSpec(group_size=8, signed=True), weight, "w")
    made = quantizer(weight, qat.QuantSpec(**SPEC), plain.step_size.detach(), torch.zeros_like(plain.step_size))
    grads = []
    for each in (plain, made):
        x = weight.clone().requires_grad_()
        value = each(x)
        value.square().sum().backward()
        grads += [value.detach(), x.grad, each.step_size.grad]
    assert all(map(torch.equal, grads[:3], grads[3:]))


def test_it_starts_with_the_range_of_each_group():
    weight = torch.tensor(
        [[0.0, 1.5, 3.0, 0.5], [-1.5, 0.0, -0.75, -3.0], [-1.0, 1.0, 2.0, -2.0], [0.0, 0.0, 0.0, 0.0]]
    )
    made = AsymmetricLSQ(qat.QuantSpec(bits=2, symmetric=False), weight, "w")
    assert made.step_size.flatten()[:3].tolist() == pytest.approx([1, 1, 4 / 3])
    assert made.zero_point.flatten().tolist() == [-2, 1, 0, -2]
    assert made(weight)[:2].tolist() == [[0, 2, 3, 0], [-2, 0, -1, -3]]
    assert not made(weight)[3].any()


def test_trained_frozen_saved_and_exported_it_is_the_same(tmp_path):
    torch.manual_seed(0)

    def net():
        return nn.Sequential(nn.Conv2d(2, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8))

    policy = qat.QuantPolicy(SPEC, rules=[{"match": "0", "weight": {"granularity": "channel"}}])
    model = qat.prepare(net(), policy, verbose=False)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x = torch.randn(16, 2, 3, 3)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state, trained, tensors = model.state_dict(), model(x), qat.quantized_tensors(model)
    assert "3.zero_point" not in state and tensors["3"].zero_point.dtype == torch.int8
    older = {name: value.to(torch.int8) if name.endswith("zero_point") else value for name, value in state.items()}
    for checkpoint in (state, older):
        again = qat.prepare(net(), policy, verbose=False)
        again.load_state_dict(checkpoint)
        assert torch.equal(again(x), trained)
    frozen = qat.freeze(model)
    assert torch.equal(frozen(x), trained)
    qat.save(frozen, tmp_path)
    assert torch.equal(qat.load(tmp_path, net())(x), trained)
    for name, tensor in from_model(frozen).layers.items():
        assert not tensor.weight.symmetric
        assert torch.equal(from_model(frozen).quantized(name).codes, tensors[name].codes)
    assert torch.equal(to_model(from_model(frozen), net())(x), trained)


@pytest.mark.parametrize("real", [None, "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_the_same_to_the_bit(dtype, real):
    torch.manual_seed(0)
    policy = qat.QuantPolicy({**SPEC, "zero_point_dtype": real})
    layer = qat.prepare(nn.Sequential(nn.Linear(32, 6)), policy, verbose=False).to(dtype)
    x, seen = torch.randn(4, 32, dtype=dtype), []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        y = run(x)
        y.float().square().sum().backward()
        seen.append([y.detach(), layer[0].weight.grad.clone(), layer[0].weight_quantizer.step_size.grad.clone()])
    assert all(map(torch.equal, *seen))


def test_what_has_no_zero_points_says_so():
    with pytest.raises(LayerError, match=r"init=gptq does not know zero points \('0'\)"):
        qat.prepare(nn.Sequential(nn.Linear(8, 8)), qat.QuantPolicy(SPEC, init="gptq"))
    many = nn.Sequential(*(nn.Linear(8, 8) for _ in range(10)))
    with pytest.raises(LayerError, match=r"zero points \('0', .*, '7' and 2 more\): use init=mse"):
        qat.prepare(many, qat.QuantPolicy(SPEC, init="gptq"))
    rules = [{"match": "Embedding", "weight": {"bits": 8}}]
    with pytest.raises(LayerError, match="'0': an Embedding takes no zero points"):
        qat.prepare(nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8)), qat.QuantPolicy(SPEC, rules=rules))
    model = qat.prepare(nn.Sequential(nn.Linear(8, 8)), qat.QuantPolicy(SPEC), verbose=False)
    with pytest.raises(LayerError, match="'0': a weight with zero points is not sharded"):
        qat.shard_step_sizes(model)
