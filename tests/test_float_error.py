"""What float32 leaves open: our own other orders of summation pass, a slightly different model does not."""

import copy

import pytest
import torch
from torch import nn

from qat.formats import float_error as float_error_module
from qat.formats.float_error import FloatError, _OtherOrder, double_, float_error


class Deep(nn.Module):
    """Residual layers; the norm works in float32, as transformers' do."""

    def __init__(self, epsilon=1e-6, depth=12, width=192):
        super().__init__()
        self.epsilon = epsilon
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            wide = x.float()
            x = x + layer((wide * (wide.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()).to(x.dtype)).relu()
        return x


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, groups=2)

    def forward(self, x):
        return self.b(self.a(x).relu()).mean((2, 3))


@pytest.mark.parametrize(("network", "shape"), [(Deep, (2, 24, 192)), (Convolution, (16, 16, 9, 9))])
@torch.no_grad()
def test_another_order_of_sums_is_explained(network, shape):
    network, x = network().eval(), torch.randn(shape)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with _OtherOrder(seed=99):
        found = network(x)
    assert not torch.equal(found, network(x))
    error = float_error(found, network, x)
    assert error.explained() and 0.2 < error.typical < 1.2
    state = network.state_dict()
    assert all(value.dtype == torch.float32 and torch.equal(value, before[name]) for name, value in state.items())


@torch.no_grad()
def test_the_reference_is_float64_throughout():
    """Its error against a float64 network without the detour through float32 is nothing beside float32's."""
    network, x = Deep(), torch.randn(2, 8, 192)
    exact = x.double()
    for layer in network.layers:
        normed = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        exact = exact + (normed @ layer.weight.double().t() + layer.bias.double()).relu()
    error = float_error(exact, network, x)
    assert error.typical < 1e-6 and error.overall < 1e-6


class Tied(nn.Module):
    """An embedding, whose weight is also the head's, and a linear layer of another module between them."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.inner(self.embed(x)).relu())


@torch.no_grad()
def test_large_weights_are_float64_where_they_are_used(monkeypatch):
    network, x = Tied(), torch.randint(50, (3, 7))
    exact = copy.deepcopy(network).double()(x)
    for large in (1, 33 * 32, 2**20):  # all weights, a row of one at a time; the tied one; none
        monkeypatch.setattr(float_error_module, "LARGE", large)
        held = double_(network)
        assert len(held) == {1: 2, 33 * 32: 1}.get(large, 0)
        assert all(weight.dtype == torch.float32 and weight.numel() for weight in held)
        network.float()
        assert network.head.weight is network.embed.weight
        error = float_error(exact, network, x)
        assert error.typical < 1e-6 and error.overall < 1e-6
        assert float_error(network(x), network, x).explained()


@torch.no_grad()
def test_a_slightly_different_model_is_not_explained():
    network, x = Deep(), torch.randn(2, 24, 192)
    other = Deep(epsilon=1e-5)
    other.load_state_dict(network.state_dict())
    assert not float_error(other(x), network, x).explained()
    found = network(x) * (1 + 2e-6)
    assert not float_error(found, network, x).explained()


def test_both_limits_count():
    assert FloatError(typical=1.9, overall=4.9, found=1e-5).explained()
    assert not FloatError(typical=2.1, overall=1.0, found=1e-5).explained()
    assert not FloatError(typical=1.0, overall=5.1, found=1e-5).explained()
    assert not FloatError(typical=1.0, overall=2.1, found=1e-5).explained(overall=2.0)
