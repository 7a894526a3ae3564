"""A calibration that is started again, or runs on several ranks, ends where one undisturbed process does."""

import pytest
import torch
from ptq_models import QUICK, READ_DATA, language_model, mlp, prepared, tokens
from ranks import answers

import qat
from qat.errors import CalibrationError, StateError
from qat.ptq import Options, initialise


def test_calibrating_again_changes_nothing():
    model = prepared(mlp(), "gptq")
    qat.calibrate(model, [torch.randn(64, 32)], verbose=False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    qat.calibrate(model, [torch.randn(64, 32)], verbose=False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(StateError, match="no weight waits"):
        initialise(model, [torch.randn(64, 32)], lambda network, batch: network(batch))


@pytest.mark.parametrize("init", READ_DATA)
def test_goes_on_after_a_kill(init, tmp_path):
    """A run that dies in the third block and is started again ends where an undisturbed one does."""
    whole = prepared(language_model(), init)
    qat.calibrate(whole, tokens(), options=QUICK, verbose=False)
    options = Options(steps=8, folder=str(tmp_path))
    killed = prepared(language_model(), init)

    def die():
        raise KeyboardInterrupt

    killed.blocks[2].attention.register_forward_hook(
        lambda module, *_: (
            die() if "forward" not in killed.blocks[2].__dict__ and len(list(tmp_path.glob("*1.safetensors"))) else None
        )
    )
    with pytest.raises(KeyboardInterrupt):
        qat.calibrate(killed, tokens(), options=options, verbose=False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    again = prepared(language_model(), init)
    report = initialise(again, tokens(), lambda network, batch: network(batch), options)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())
    assert any("blocks.0" in name for name in report.losses)


def test_another_calibration_does_not_take_up_what_is_stored(tmp_path):
    options = Options(folder=str(tmp_path))
    qat.calibrate(prepared(language_model(), "gptq"), tokens(), options=options, verbose=False)
    for bits, seed, damping in [(4, 0, 0.01), (3, 1, 0.01), (3, 0, 0.02)]:
        other = Options(folder=str(tmp_path), damping=damping)
        with pytest.raises(CalibrationError, match="made from other weights, calibration data or options"):
            qat.calibrate(prepared(language_model(), "gptq", bits), tokens(seed=seed), options=other, verbose=False)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CalibrationError, match=r"damaged.*delete it"):
        qat.calibrate(prepared(language_model(), "gptq"), tokens(), options=options, verbose=False)


RANK = """
import qat.ptq
def run(init):
    torch.manual_seed(0)
    layers = torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)
    policy = qat.QuantPolicy(weight=qat.QuantSpec(bits=3, group_size=8), init=init)
    model = qat.prepare(torch.nn.Sequential(*layers), policy, verbose=False)
    torch.manual_seed(rank)
    qat.calibrate(model, [torch.randn(64, 16) * torch.rand(16)], options=qat.ptq.Options(steps=4), verbose=False)
    assert all(layer.weight_quantizer.is_initialised for layer in (model[0], model[2]))
    return [tensor.codes.tolist() for tensor in qat.quantized_tensors(model).values()]
answer = {init: run(init) for init in ("gptq", "awq", "blockwise")}
"""


def test_ranks_get_the_same_codes(tmp_path):
    """From different data on each; every rank ends with those of the first."""
    one, other = answers(RANK, tmp_path)
    assert one == other and len(one) == 3
