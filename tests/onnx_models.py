"""What the tests of ONNX share: a small network, frozen with an example of its inputs, and its file."""

import pytest
import torch
from torch import nn

import qat
from qat.formats import onnx
from qat.frozen_model import from_model
from qat.numerics import QuantizedTensor, scale_shape

IMAGES = {"shape": [3, 16, 16], "dtype": "float32", "low": -1, "high": 1}
TOKENS = {"shape": [12], "dtype": "int64", "low": 0, "high": 255}
PER_TENSOR = {"granularity": "tensor"}


def random_tensor(shape, spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = scale_shape(shape, spec)

    def integers(*size):
        return torch.randint(-spec.q_n, spec.q_p + 1, size, dtype=torch.int8, generator=generator)

    scale = (torch.rand(groups, generator=generator) * 0.1 + 0.01).bfloat16()
    return QuantizedTensor(integers(*shape), scale, spec, None if spec.symmetric else integers(*groups))


class Net(nn.Module):
    """No batch norm: onnxruntime may fuse everything. A bias, a shared weight, and a module called layer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, bias=False)
        self.layer = nn.Sequential(nn.Conv2d(8, 6, 3, stride=2, groups=2), nn.ReLU())
        self.b = nn.Linear(6, 6)
        self.c = nn.Linear(6, 6, bias=False)
        self.c.weight = self.b.weight
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.layer(torch.relu(self.a(x))).mean((2, 3))
        return self.head(torch.relu(self.c(torch.relu(self.b(x)))))


def frozen(network, weight, activation=None, rules=(), example=IMAGES):
    torch.manual_seed(0)
    policy = qat.QuantPolicy(weight=weight, activation=activation, rules=list(rules))
    qat.prepare(network, policy, False)
    if activation is not None:
        qat.calibrate(network, [onnx.random_input(example, 8)])
    model = from_model(qat.freeze(network))
    model.example = example
    return model


def net(bits=4, activation_bits=4, **options):
    torch.manual_seed(0)
    activation = activation_bits and qat.QuantSpec(bits=activation_bits, **PER_TENSOR)
    return frozen(Net(), qat.QuantSpec(bits=bits), activation, **options)


def clients():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


def written(model, folder, network=None, **options):
    clients()
    notes = onnx.write(model, folder, network, **options)
    return notes, dict(onnx.verify(folder, model, None if network is None else type(network)()))
