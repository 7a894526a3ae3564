"""SqueezeLLM's levels: k-means in which a weight counts by its input's mean square, from calibration to artifact."""

import pytest
import torch
from torch import nn

import qat
from qat import codebook
from qat.checkpoint import read_checkpoint
from qat.convert import main as convert
from qat.errors import CalibrationError, LayerError, StateError
from qat.ptq import Options
from qat.train import main as train

WEIGHT = {"codebook": "custom", "bits": 3, "group_size": 32}
POLICY = {"weight": WEIGHT, "init": "squeezellm"}


def prepared(model, init="squeezellm"):
    return qat.prepare(model, qat.QuantPolicy.from_dict({**POLICY, "init": init}), verbose=False)


def loud_inputs(inputs=64, count=512):
    """Return inputs of which every fifth is forty times as loud."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, inputs, generator=generator) * torch.where(torch.arange(inputs) % 5 == 0, 4.0, 0.1)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24))


def test_each_level_is_the_weighted_mean_of_the_values_that_are_nearest_to_it():
    model, x = prepared(linear()), loud_inputs()
    weight = model[0].weight.detach().double()
    qat.calibrate(model, [x], verbose=False)
    assert torch.equal(model[0].weight.detach().double(), weight)
    scale = weight.view(24, 2, 32).abs().amax(-1, keepdim=True)
    values, squares = (weight.view(24, 2, 32) / scale).view(24, 64), x.double().square().mean(0)
    importance = (squares.view(2, 32) * scale**2).view(24, 64)
    for row, levels in enumerate(model[0].weight_quantizer.levels.double()):
        nearest = (values[row, :, None] - levels).abs().argmin(-1)
        for level in nearest.unique():
            mine = nearest == level
            mean = (importance[row] * values[row])[mine].sum() / importance[row][mine].sum()
            torch.testing.assert_close(levels[level], mean, rtol=0, atol=2e-5)


def test_loud_inputs_are_heard(capsys):
    x, outputs = loud_inputs(), []
    for init in ("minmax", "squeezellm"):
        model = prepared(linear(), init)
        if init == "squeezellm":
            qat.calibrate(model, [x])
        outputs.append(model(x))
    exact = linear()(x)
    plain, ours = ((output - exact).square().mean() for output in outputs)
    assert ours < 0.6 * plain
    assert (
        f"squeezellm: 1 layers, output error {ours / plain:.3f} of plain k-means' on average" in capsys.readouterr().out
    )


def test_groups_of_a_convolution_have_inputs_of_their_own():
    torch.manual_seed(0)
    spec = {"weight": {"codebook": "custom", "bits": 2, "granularity": "channel"}, "init": "squeezellm"}
    x = torch.randn(8, 4, 9, 9) * torch.tensor([5.0, 0.1, 0.1, 5.0])[:, None, None]
    both = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    parts = [nn.Sequential(nn.Conv2d(2, 3, 3)) for _ in range(2)]
    for at, part in enumerate(parts):
        part[0].load_state_dict({name: value[3 * at : 3 * at + 3] for name, value in both[0].state_dict().items()})
    levels = []
    for model, inputs in ((both, x), (parts[0], x[:, :2]), (parts[1], x[:, 2:])):
        qat.calibrate(qat.prepare(model, qat.QuantPolicy.from_dict(spec), verbose=False), [inputs], verbose=False)
        levels.append(model[0].weight_quantizer.levels)
    torch.testing.assert_close(levels[0], torch.cat(levels[1:]), rtol=0, atol=1e-6)


def test_a_checkpoint_keeps_the_levels_and_waits_no_more(tmp_path):
    model, other = prepared(linear()), prepared(linear())
    with pytest.raises(StateError, match="init=squeezellm reads data"):
        model(loud_inputs())
    qat.calibrate(model, [loud_inputs()], verbose=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(loud_inputs()), other(loud_inputs()))
    qat.save(qat.freeze(model), tmp_path / "out")
    shipped, trained = (qat.quantized_tensors(each)["0"] for each in (qat.load(tmp_path / "out", linear()), other))
    assert torch.equal(shipped.codes, trained.codes) and torch.equal(shipped.levels, trained.levels)


def test_other_grids_are_refused_by_name():
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    for weight in ({"bits": 4}, {"codebook": "nf4", "group_size": 8}):
        policy = {"weight": weight, "init": "squeezellm", "rules": [{"match": "0", "weight": WEIGHT}]}
        with pytest.raises(
            LayerError, match=r"does not know grids but custom codebooks \('1'\): use weight.codebook=custom"
        ):
            qat.prepare(model, qat.QuantPolicy.from_dict(policy), verbose=False)


def test_bad_data_is_an_error_or_a_counted_fallback(capsys):
    x = torch.ones(9, 64)
    with pytest.raises(CalibrationError, match="are multiples of one vector"):
        qat.calibrate(prepared(linear()), [x], verbose=False)
    model, plain = prepared(linear()), prepared(linear(), "minmax")
    qat.calibrate(model, [x], options=Options(allow_fallback=True))
    assert "squeezellm: fallbacks: 1" in capsys.readouterr().out and torch.equal(model(x), plain(x))


def test_from_the_command_line_to_an_artifact(verify_here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = ["experiment=topics_w4", "policy.weight.codebook=custom", "policy.weight.bits=3", "policy.init=squeezellm"]
    run += ["trainer.max_steps=0", "run_dir=run", "trainer.accelerator=cpu", "callbacks.calibration.batches=2"]
    run += ["model.args.width=64", "model.args.depth=2"]
    monkeypatch.setattr("sys.argv", ["train", *run])
    train()
    assert "squeezellm: " in capsys.readouterr().out
    assert convert(["run/last.ckpt", "--out", "out", "--verify"]) in (0, None)
    trained, shipped = (
        qat.quantized_tensors(read_checkpoint("run/last.ckpt").build()),
        qat.quantized_tensors(qat.load("out")),
    )
    assert trained.keys() == shipped.keys() and len(trained) > 4
    for name, tensor in trained.items():
        levels = [
            codebook.dequantize(each.codes, each.scale, each.levels, torch.float32) for each in (tensor, shipped[name])
        ]
        assert torch.equal(*levels), name
