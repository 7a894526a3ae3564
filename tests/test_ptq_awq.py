"""AWQ: what it clips, what it scales, and where it folds nothing."""

import copy

import pytest
import torch
from ptq_models import Branches, correlated_inputs, prepared
from torch import nn

from qat.layers import quant_layers
from qat.ptq import initialise
from qat.ptq.awq import ALPHAS, channel_scales, clip_layer
from qat.ptq.gptq import rounded_weight
from qat.ptq.moments import Moments
from qat.quantizers.lsq import weight_step_size
from qat.spec import Init


def test_alpha_0_changes_nothing():
    magnitude = torch.rand(8) + 0.1
    assert ALPHAS[0] == 0 and torch.equal(channel_scales(magnitude, 0.0), torch.ones(8))
    scales = channel_scales(magnitude, 0.5)
    assert (scales.max() * scales.min()).item() == pytest.approx(1)


def test_awq_does_not_clip_queries_and_keys():
    """Their step sizes are max|w|/Q_P; others may be smaller, and change the layer's output no more."""
    moments, layers = Moments(), {name: prepared(nn.Linear(32, 16), "awq") for name in ("a.q_proj", "a.v_proj")}
    x = correlated_inputs(inputs=32)
    moments.update(layers["a.q_proj"], x)
    moments.finish("a.q_proj")
    for name, layer in layers.items():
        weight, grid = layer.weight.detach().clone(), layer.weight_quantizer.spec
        largest = weight_step_size(weight, grid, Init.minmax)
        with torch.no_grad():
            clip_layer(name, layer, moments)
        step = layer.weight_quantizer.step_size
        if "q_proj" in name:
            assert torch.equal(step, largest)
            continue
        assert (step <= largest).all() and (step < largest).any()
        for group in range(2):  # by the group's own inputs, written out
            part = slice(16 * group, 16 * group + 16)
            errors = []
            for steps in (step, largest):
                change = rounded_weight(weight, steps, grid) - weight
                errors.append((x[:, part] @ change[:, part].T).square().sum(0))
            assert (errors[0] <= errors[1] * (1 + 1e-4)).all()


class Outliers(nn.Module):
    """A block with a norm before two layers that read its output, one of whose channels is large."""

    def __init__(self, width=32):
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(width), nn.Linear(width, 64), nn.Linear(width, 64)
        self.down = nn.Linear(64, width)
        self.norm.weight.data[3] = 40.0

    def forward(self, x):
        x = self.norm(x)
        return self.down(torch.relu(self.gate(x)) * self.up(x))


def test_awq_scales_what_it_can_fold_exactly():
    torch.manual_seed(0)
    original, x = Outliers(), [torch.randn(256, 32) for _ in range(2)]
    nearest = prepared(copy.deepcopy(original), "minmax")
    scaled = Outliers()
    scaled.load_state_dict(original.state_dict())
    report = initialise(prepared(scaled, "awq"), x, lambda model, batch: model(batch))
    assert scaled.norm.weight[3] < 30 and not report.notes  # norm -> gate and up, up -> down
    assert max(report.losses.values()) < 0.9
    with torch.no_grad():
        rows = original.norm(torch.cat(x))
        found = scaled.gate(scaled.norm(torch.cat(x))) - original.gate(rows)
        change = nearest.gate.weight_quantizer(original.gate.weight) - original.gate.weight
        usual = (rows @ change.T).square().sum().item()
        assert report.losses["gate"] == pytest.approx(found.square().sum().item() / usual, rel=1e-3)
        expected = original(x[0])
        assert (scaled(x[0]) - expected).square().mean() < 0.5 * (nearest(x[0]) - expected).square().mean()
        for _, layer in quant_layers(scaled):
            layer.weight_quantizer.enabled = False
        assert (scaled(x[0]) - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_the_error_of_a_layer_whose_outputs_were_scaled_is_of_the_scaled_ones():
    """As of gate, by which the inputs of down are scaled: its error stood beside one of unscaled outputs."""
    torch.manual_seed(0)
    original, x = Outliers(), torch.randn(512, 32)
    original.up.weight[::9] *= 20
    scaled = copy.deepcopy(original)
    report = initialise(prepared(scaled, "awq"), [x], lambda model, batch: model(batch))
    folded, grid = original.gate.bias / scaled.gate.bias, scaled.gate.weight_quantizer.spec
    assert folded.max() > 2 * folded.min()
    weight = original.gate.weight / folded[:, None]
    change = rounded_weight(weight, weight_step_size(weight, grid, Init.minmax), grid) - weight
    error = scaled.gate(scaled.norm(x)) - original.gate(original.norm(x)) / folded
    usual = original.norm(x) @ change.T
    expected = error.square().sum().item() / usual.square().sum().item()
    assert report.losses["gate"] == pytest.approx(expected, rel=1e-2)


@torch.no_grad()
def test_awq_folds_nothing_that_any_output_would_notice():
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(256, 32)
    expected = model(x)
    report = initialise(prepared(model, "awq"), [x], lambda model, batch: model(batch))
    assert "outer" in report.notes
    for _, layer in quant_layers(model):
        layer.weight_quantizer.enabled = False
    found = model(x)
    torch.testing.assert_close(found, expected)


class Shared(Outliers):
    """The norm's output also goes past the layers: nothing may be folded into it."""

    def forward(self, x):
        x = self.norm(x)
        return x + self.down(torch.tanh(self.gate(x)) * torch.tanh(self.up(x)))


def test_awq_folds_nothing_where_that_is_not_exact():
    torch.manual_seed(0)
    model = Shared()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = initialise(prepared(model, "awq"), [torch.randn(256, 32)], lambda model, batch: model(batch))
    assert set(report.notes) == {"gate", "up", "down"}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name in state)
