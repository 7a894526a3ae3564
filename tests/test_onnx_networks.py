"""ONNX of networks as people build them: joined features, layers called in other ways, several outputs."""

import pytest
import torch
import torch.nn.functional as F
from onnx_models import PER_TENSOR, clients, frozen, written
from torch import nn

import qat
from qat.formats import onnx


class Skips(nn.Module):
    """Features that are joined before a convolution, as in a U-Net, DenseNet or CSP block; or that are a maximum."""

    def __init__(self, join):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)
        self.join = join

    def forward(self, x):
        x = F.silu(self.first(x))
        return self.last(self.join(torch.cat([x, self.second(x)], 1)))


def exact(rows, runtime):
    """Return whether outputs are within float32's error: ``verify`` allows for codes that fall to the other side."""
    return float(rows[f"{runtime}, outputs"].split()[4]) < 1e-5


@pytest.mark.clients
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "join",
    [nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.AdaptiveMaxPool2d(1), lambda x: x.roll(1, 2), lambda x: x.amax(2, True)],
)
def test_openvino_computes_what_is_joined_before_an_8_bit_input(tmp_path, join, symmetric):
    """It was wrong by half of the largest output."""
    pytest.importorskip("openvino")
    activation = qat.QuantSpec(bits=8, symmetric=symmetric, **PER_TENSOR)
    clients()
    model = frozen(Skips(join), qat.QuantSpec(bits=8), activation)
    onnx.write(model, tmp_path, Skips(join))
    rows = dict(onnx.verify(tmp_path, model, Skips(join)))
    assert exact(rows, "onnxruntime") and "differ by at most" in rows["OpenVINO, outputs"]


class Reflecting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.down = nn.Conv2d(8, 8, 3, padding=(1, 0), padding_mode="replicate", stride=2, groups=2)
        self.last = nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.last(self.down(self.up(F.silu(self.first(x)))))


@pytest.mark.clients
@pytest.mark.parametrize("activation_bits", [None, 4, 8])
def test_padding_with_values_of_the_image(tmp_path, activation_bits):
    activation = activation_bits and qat.QuantSpec(bits=activation_bits, **PER_TENSOR)
    _, rows = written(frozen(Reflecting(), qat.QuantSpec(bits=8), activation), tmp_path, Reflecting())
    assert exact(rows, "onnxruntime")  # OpenVINO's within the 5 % of a code that falls to the other side


class Chain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))


@pytest.mark.clients
@pytest.mark.parametrize("whole", [True, False])
def test_a_weight_in_floats_stays_so_between_8_bit_inputs(tmp_path, whole):
    """onnxruntime rounded it to int8, where only inputs are quantized, of all layers or of one."""
    activation = qat.QuantSpec(bits=8, **PER_TENSOR)
    weight, rules = (None, []) if whole else (qat.QuantSpec(bits=4), [{"match": "2", "weight": None}])
    _, rows = written(frozen(Chain(), weight, activation, rules), tmp_path, Chain())
    assert exact(rows, "onnxruntime")


class Called(nn.Module):
    """Asks its layers for sizes and dtypes, names their argument, and says how large an image is to become."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 6, 3, 2, 1)
        self.again, self.head = nn.ConvTranspose2d(6, 6, 3, 2, 1), nn.Linear(6, 5)

    def forward(self, x):
        y = torch.relu(self.down(input=x.to(self.down.weight.dtype)))
        y = torch.relu(self.up(y, output_size=x.shape[2:]))
        y = self.again(y, [2 * x.shape[2], 2 * x.shape[3]]).mean((2, 3))
        return self.head(input=y.view(-1, self.head.in_features))


@pytest.mark.clients
@pytest.mark.parametrize("activation_bits", [None, 4])
def test_layers_that_are_called_in_other_ways(tmp_path, activation_bits):
    activation = activation_bits and qat.QuantSpec(bits=activation_bits, **PER_TENSOR)
    _, rows = written(frozen(Called(), qat.QuantSpec(bits=4), activation), tmp_path, Called())
    assert exact(rows, "onnxruntime")
