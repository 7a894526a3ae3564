"""What the tests of artifacts share: a small network, trained and saved, and a comparison of integers."""

import torch
from torch import nn

import qat

W4 = qat.QuantSpec(bits=4)
A4 = qat.QuantSpec(bits=4, granularity="tensor")


class Net(nn.Module):
    """Conv, BatchNorm, linear, and two linears that share a weight."""

    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width * 16, 12)
        self.a = nn.Linear(12, 12, bias=False)
        self.b = nn.Linear(12, 12)
        self.b.weight = self.a.weight

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.b(torch.relu(self.a(torch.relu(self.fc(x)))))


def images(batch=4):
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def prepared(width=8, weight=W4, activation=A4, rules=()):
    torch.manual_seed(0)
    model = qat.prepare(Net(width), qat.QuantPolicy(weight=weight, activation=activation, rules=list(rules)), False)
    model(images()) if activation is None else qat.calibrate(model, [images()])
    return model.eval()


def saved(path, **options):
    """Return (fake-quant output, fake-quant tensors) of a model saved at path."""
    model = prepared(**options)
    output, tensors = model(images()).detach(), qat.quantized_tensors(model)
    qat.save(qat.freeze(model), path)
    return output, tensors


def assert_same(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.codes, others[name].codes), name
        assert torch.equal(tensor.scale, others[name].scale), name
        assert tensor.spec == others[name].spec, name
