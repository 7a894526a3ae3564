"""What the tests of starts that read calibration data share: small models, their data, and GPTQ's slow definition."""

import torch
from torch import nn

import qat
from qat.models import build
from qat.ptq import Options
from qat.spec import Init, QuantSpec

READ_DATA = [init.value for init in Init if init.reads_data]
QUICK = Options(steps=8)


def correlated_inputs(rows=4096, inputs=64, spread=1.0, seed=0):
    """Channels of log-normal scale, correlated with one another."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + 0.5 * torch.eye(inputs)
    scales = (torch.randn(inputs, generator=generator) * spread).exp()
    return torch.randn(rows, inputs, generator=generator) @ mixing * scales


def spec(bits=4, **options):
    return QuantSpec(bits=bits, signed=True, **options)


def mlp(seed=0, width=32, depth=2):
    torch.manual_seed(seed)
    layers = [module for _ in range(depth) for module in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 8))


def language_model(depth=3):
    torch.manual_seed(0)
    return build({"builder": "gpt", "args": {"vocabulary": 64, "width": 32, "depth": depth, "heads": 2, "context": 16}})


def tokens(batches=4, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (size, 16), generator=generator) for _ in range(batches)]


def prepared(model, init, bits=3, group_size=16, **options):
    weight = QuantSpec(bits=bits, group_size=group_size, codebook="custom" if init == "squeezellm" else None)
    return qat.prepare(model, qat.QuantPolicy(weight=weight, init=init, **options), verbose=False)


def optimal_brain_quantizer(weight, hessian, order, round_column):
    """Round one column after another, by the inverse Hessian of the columns that remain (arXiv:2208.11580, eq. 4)."""
    weight, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    rounded_from = torch.empty_like(weight)
    remaining = list(order)
    for column in order:
        rounded_from[:, column] = weight[:, column]
        error = (weight[:, column] - round_column(weight[:, column], column)) / inverse[column, column]
        for other in remaining:
            weight[:, other] -= error * inverse[column, other]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        remaining.remove(column)
    return rounded_from


class Branches(nn.Module):
    """A second output, of layers that no factor goes through, and a first one that knows nothing of them."""

    def __init__(self):
        super().__init__()
        self.main, self.inner, self.outer = nn.Linear(32, 8), nn.Linear(32, 32), nn.Linear(32, 8)
        self.inner.weight.data[::9] *= 20

    def forward(self, x):
        return {"main": self.main(x), "more": [self.outer(torch.tanh(self.inner(x)))]}
