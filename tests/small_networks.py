"""What the tests of prepare and of its summary share: small networks, and what became of their layers."""

import re

import torch
from torch import nn

import qat.surgery
from qat import QuantPolicy, QuantSpec
from qat.layers import QuantConv2d, QuantLinear

W4 = QuantSpec(bits=4)
POLICY = QuantPolicy(weight=W4)


class Net(nn.Module):
    """Conv, norm, embedding and linears."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.embed = nn.Embedding(10, 8)
        self.fc = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4, bias=False)

    def forward(self, x):
        return self.head(torch.relu(self.fc(self.norm(self.conv(x)).mean((2, 3)))))


class Tied(nn.Module):
    """Two linears with one weight, and an embedding with the head's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.b(self.a(self.embed(x))))


def prepare(model, policy=POLICY, **options):
    return qat.surgery.prepare(model, policy, verbose=False, **options)


def bits_of(model):
    """Return {layer: (weight bits, input bits)}."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear | QuantConv2d):
            parts = layer.weight_quantizer, layer.activation_quantizer
            found[name] = tuple(part and part.spec.bits for part in parts)
    return found


def row_of(text, name):
    """Return the summary's line for a layer as a list of cells."""
    lines = [line for line in text.splitlines() if re.match(rf"{re.escape(name)}\s", line)]
    assert len(lines) == 1, f"{len(lines)} lines for {name}"
    return re.split(r"\s{2,}", lines[0])
