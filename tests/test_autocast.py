"""A half-precision model under autocast of the other dtype: what trains and what ships round once, to the same bits."""

import pytest
import torch
from torch import nn

import qat
from qat import QuantPolicy
from qat.joint_lora import joint_lora
from qat.qa_lora import qa_lora

HALVES = [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)]
GROUPS = {"bits": 4, "group_size": 16}
WEIGHTS = {
    "8 bits": {"bits": 8},
    "real zero points": {**GROUPS, "symmetric": False, "zero_point_dtype": "float16"},
    "NF4": {"codebook": "nf4", "group_size": 64},
    "custom": {"bits": 3, "codebook": "custom", "granularity": "channel"},
    "minmax": {"bits": 8},
}
INPUTS = {
    "none": {},
    "LSQ": {"activation": {"bits": 8}},
    "LSQ+": {"activation": {"bits": 8, "symmetric": False}},
    "PACT": {"activation": {"bits": 8}, "activation_quantizer": "pact"},
    "q8_0": {"dynamic": "q8_0"},
}
LAYERS = {
    "linear": (lambda: nn.Linear(64, 32), (5, 64)),
    "conv": (lambda: nn.Conv2d(64, 32, 3), (2, 64, 5, 5)),
    "circular conv": (lambda: nn.Conv1d(64, 32, 3, padding=1, padding_mode="circular"), (2, 64, 6)),
    "transposed conv": (lambda: nn.ConvTranspose1d(64, 32, 3), (2, 64, 6)),
}


def calibrated(layer, x, dtype, **policy):
    """Return the layer prepared, with step sizes off the stored grid: where rounding twice shows."""
    rules = [{"match": type(layer).__name__, "weight": policy["weight"]}]
    model = qat.prepare(nn.Sequential(layer).to(dtype), QuantPolicy(**policy, rules=rules), verbose=False)
    qat.calibrate(model, [x])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("step_size", "offset")):
                parameter.mul_(1.0123)
    return model.eval()


def assert_ships_what_it_trained(model, x, autocast):
    with torch.no_grad(), torch.autocast("cpu", autocast):
        trained = model(x)
        shipped = qat.freeze(model)(x)
    assert trained.dtype == shipped.dtype == autocast
    assert torch.equal(trained, shipped)


@pytest.mark.parametrize(("dtype", "autocast"), HALVES, ids=str)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer, weight, inputs, dtype, autocast):
    if inputs == "q8_0" and layer != "linear":
        return  # runtimes round the inputs of linear layers
    make, shape = LAYERS[layer]
    x = torch.randn(shape).to(dtype)
    policy = {"weight": WEIGHTS[weight], **INPUTS[inputs]}
    if weight == "minmax":
        policy["weight_quantizer"] = "minmax"
    assert_ships_what_it_trained(calibrated(make(), x, dtype, **policy), x, autocast)


@pytest.mark.parametrize(("dtype", "autocast"), HALVES, ids=str)
def test_adapters(dtype, autocast):
    """Inputs rounded in front of adapters, also by the scales of a frozen base, and where the weight is left alone."""
    x, policy = torch.randn(5, 64).to(dtype), {"weight": GROUPS, "activation": {"bits": 8, "symmetric": False}}
    bases = [qat.freeze(calibrated(nn.Linear(64, 32), x, dtype, **policy)) for _ in range(2)]
    joint = joint_lora(nn.Sequential(nn.Linear(64, 32)).to(dtype), QuantPolicy(**policy), verbose=False)
    qat.calibrate(joint, [x])
    inputs = calibrated(nn.Linear(64, 32), x, dtype, **{**policy, "weight": None})
    for model in (joint, joint_lora(bases[0], QuantPolicy(**policy), verbose=False), qa_lora(bases[1]), inputs):
        assert_ships_what_it_trained(model.eval(), x, autocast)
