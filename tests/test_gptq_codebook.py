"""GPTQ on a codebook: the optimal brain quantizer's codes, in NF4's own layout, from calibration to artifact."""

import pytest
import torch
from ptq_models import correlated_inputs, language_model, optimal_brain_quantizer, tokens
from torch import nn

import qat
from qat import codebook
from qat.checkpoint import read_checkpoint
from qat.convert import main as convert
from qat.double_quantization import dynamic_map, nest
from qat.errors import LayerError, StateError
from qat.layers import quant_layers
from qat.ptq.gptq import factorize, gptq_to_levels
from qat.train import main as train

LEVELS = torch.tensor(codebook.NF4)
POLICY = {"weight": {"codebook": "nf4", "group_size": 32}, "init": "gptq"}


def layer(dtype=torch.float32, inputs=128, **weight):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 24)).to(dtype)
    policy = {**POLICY, "weight": {**POLICY["weight"], **weight}}
    return qat.prepare(model, qat.QuantPolicy.from_dict(policy), verbose=False)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("double", [True, False])
def test_it_is_the_optimal_brain_quantizer_with_each_blocks_largest_weight_kept(act_order, double):
    torch.manual_seed(0)
    weight, x = torch.randn(6, 192).double(), correlated_inputs(inputs=192, spread=0.7).double()
    hessian = x.T @ x / len(x)
    scale = weight.view(6, 3, 64).abs().amax(-1)
    shipped = nest(scale.float(), dynamic_map(torch.device("cpu"))).values().double() if double else scale
    factor = factorize(hessian, 0.01, act_order)
    codes, values = gptq_to_levels(weight, factor, LEVELS.double(), scale, shipped)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(192)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else range(192)
    chosen = torch.zeros_like(codes)

    def round_column(column, at):
        distance = (column[:, None] / scale[:, at // 64, None] - LEVELS.double()).abs()
        chosen[:, at] = distance.argmin(-1).to(torch.int8)
        largest = weight[:, at].abs() == scale[:, at // 64]
        chosen[largest, at] = torch.where(weight[largest, at] > 0, 15, 0).to(torch.int8)
        return LEVELS.double()[chosen[:, at].int()] * shipped[:, at // 64]

    optimal_brain_quantizer(weight, damped, order, round_column)
    assert torch.equal(codes, chosen)
    assert torch.equal(values, (LEVELS.double()[codes.int()].view(6, 3, 64) * scale[..., None]).view(6, 192))


@pytest.mark.parametrize("kind", ["nf4", "nf4_double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [{}, {"granularity": "channel", "group_size": None}])
def test_codes_ship_with_the_scales_that_bitsandbytes_takes(kind, dtype, grid, tmp_path):
    model = layer(dtype, codebook=kind, **grid)
    with torch.no_grad():
        model[0].weight[3, :32] = 0  # a block of zeros has no largest weight to keep
    before, x = model[0].weight.detach().clone(), correlated_inputs(inputs=128).to(dtype)
    with pytest.raises(StateError, match="the weight of '0' was never set: init=gptq reads data"):
        qat.freeze(model)
    qat.calibrate(model, [x[:2048], x[2048:]], verbose=False)
    quantizer = model[0].weight_quantizer
    scale, trained = codebook.block_scale(before, quantizer.shape), qat.quantized_tensors(model)["0"]
    assert torch.equal(codebook.block_scale(model[0].weight, quantizer.shape), scale)
    shipped = scale if kind == "nf4" else nest(scale, quantizer.scale_levels).values()
    assert torch.equal(trained.scale, shipped)
    nearest = codebook.quantize(before, scale, LEVELS[None])
    assert not torch.equal(trained.codes, nearest)
    weights = (codebook.dequantize(codes, shipped, LEVELS[None], torch.float64) for codes in (trained.codes, nearest))
    errors = [(x.double() @ (weight - before.double()).T).square().mean() for weight in weights]
    assert errors[0] < 0.6 * errors[1]
    out = model(x[:5])
    qat.save(qat.freeze(model), tmp_path / "a")
    loaded = qat.load(tmp_path / "a", nn.Sequential(nn.Linear(128, 24)).to(dtype))
    shipped_tensor = qat.quantized_tensors(loaded)["0"]
    assert torch.equal(shipped_tensor.codes, trained.codes)
    assert torch.equal(shipped_tensor.dequantize(), trained.dequantize())
    torch.testing.assert_close(loaded(x[:5]), out, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)


def test_inputs_that_have_nothing_in_common_leave_nothing_to_make_up_for():
    model = layer()
    expected = codebook.quantize(model[0].weight.detach(), codebook.block_scale(model[0].weight, (24, 4)), LEVELS[None])
    qat.calibrate(model, [torch.eye(128)], verbose=False)
    assert torch.equal(qat.quantized_tensors(model)["0"].codes, expected)


def test_a_checkpoint_of_it_needs_no_calibration():
    model, other = language_model(), language_model()
    for each in (model, other):
        qat.prepare(each, qat.QuantPolicy.from_dict({**POLICY, "rules": [{"match": "lm_head", "weight": None}]}))
    qat.calibrate(model, tokens(), verbose=False)
    other.load_state_dict(model.state_dict())
    qat.calibrate(other, tokens(seed=1), verbose=False)  # nothing waits
    there = qat.quantized_tensors(model)
    for name, tensor in qat.quantized_tensors(other).items():
        assert torch.equal(tensor.codes, there[name].codes), name
    assert {layer.weight_quantizer.init.value for _, layer in quant_layers(other) if layer.weight_quantizer} == {"gptq"}


@pytest.mark.parametrize(
    ("init", "kind", "what"),
    [("awq", "nf4", "codebooks"), ("blockwise", "nf4", "codebooks"), ("gptq", "custom", "custom codebooks")],
)
def test_methods_that_move_step_sizes_refuse_codebooks(init, kind, what):
    policy = qat.QuantPolicy.from_dict({"weight": {"codebook": kind, "group_size": 32}, "init": init})
    with pytest.raises(LayerError, match=rf"init={init} does not know {what} \('0'\)"):
        qat.prepare(nn.Sequential(nn.Linear(64, 8)), policy, verbose=False)


def test_from_the_command_line_to_an_artifact(verify_here, tmp_path, monkeypatch, capsys):
    """policy=lm_nf4 policy.init=gptq trainer.max_steps=0, convert; what is loaded has the calibrated codes."""
    monkeypatch.chdir(tmp_path)
    run = ["experiment=topics_w4", "policy=lm_nf4", "policy.init=gptq", "trainer.max_steps=0", "run_dir=run"]
    run += ["model.args.width=64", "model.args.depth=2", "trainer.accelerator=cpu", "callbacks.calibration.batches=2"]
    monkeypatch.setattr("sys.argv", ["train", *run])
    train()
    assert "gptq: " in capsys.readouterr().out
    assert convert(["run/last.ckpt", "--out", "out", "--verify"]) in (0, None)
    trained = qat.quantized_tensors(read_checkpoint("run/last.ckpt").build())
    shipped = qat.quantized_tensors(qat.load("out"))
    assert trained.keys() == shipped.keys() and len(trained) > 4
    for name, tensor in trained.items():
        assert torch.equal(tensor.codes, shipped[name].codes) and torch.equal(tensor.scale, shipped[name].scale)
