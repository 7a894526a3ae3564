"""What a GPU may do to float32 is read off torch's own settings, which a machine without one has too."""

import pytest
import torch
from ptq_models import QUICK, READ_DATA, prepared
from torch import nn

import qat
from qat.float32 import in_float32

CONVOLUTIONS, PRODUCTS = torch.backends.cudnn.conv, torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _settings_of_torch():
    """Leave torch as it was: where both kinds of names were used, the newer ones first."""
    allowed, precision = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    newer = CONVOLUTIONS.fp32_precision, PRODUCTS.fp32_precision
    yield
    CONVOLUTIONS.fp32_precision, PRODUCTS.fp32_precision = newer
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision(precision)


class Precision(nn.Module):
    """Notes what may be done to float32 while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def forward(self, x):
        self.seen.add((CONVOLUTIONS.fp32_precision, PRODUCTS.fp32_precision))
        return x


def network(init):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), Precision(), nn.Flatten(), nn.Linear(128, 4)
    return prepared(nn.Sequential(*layers), init, group_size=None)


@pytest.mark.parametrize("init", READ_DATA)
def test_starts_from_data_multiply_in_float32(init):
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    model = network(init)
    qat.calibrate(model, [torch.randn(200, 3, 6, 6)], options=QUICK, verbose=False)
    assert model[2].seen and not any("tf32" in seen for seen in model[2].seen)
    assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"


def test_newer_names_stay_as_chosen():
    """torch refuses its older ones from then on, the question included."""
    PRODUCTS.fp32_precision = "tf32"
    model = network("gptq")
    qat.calibrate(model, [torch.randn(200, 3, 6, 6)], verbose=False)
    assert {products for _, products in model[2].seen} == {"tf32"} and PRODUCTS.fp32_precision == "tf32"
    assert "tf32" not in {convolutions for convolutions, _ in model[2].seen}


@pytest.mark.parametrize("matmul", [False, True])
def test_settings_return_after_an_error(matmul):
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(ZeroDivisionError), in_float32(matmul):
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == ("highest" if matmul else "medium")
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "medium"
