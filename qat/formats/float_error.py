"""How far a client's outputs may be from ours: by TOLERANCE, or in a deep model as far as float32 is from exactness.

The measure is a float64 run of the same codes, scales and float tensors. Against it our own float32 outputs have an
error that depends on the order of the sums, so they are taken several times, with the inputs of each product in another
order, and once added up few at a time: the same model, the same bits, other roundings. A client's float32 kernels
are allowed a small multiple of the largest of these. An output that feels an early rounding a thousand times over, as
some tokens' do in a deep language model, shows that in ours too, while a client that computes something slightly
different shows it on every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..inputs import Inputs, mapped
from .outputs import difference, outputs

TOLERANCE = 1e-5  # of the largest output: the same float32 products, perhaps summed in another order
ORDERS = 4  # beside the plain one
LARGE = 2**20  # elements, from which a weight becomes float64 a piece at a time, where it is used
FEW = 4  # products at a time in the running sum: one at a time takes minutes for a layer of 14,336 inputs
TYPICAL = 2.0  # times the error that one of our own orders has at the same row
OVERALL = 5.0  # times the root mean square over all outputs, which one ill-conditioned row decides


@dataclass
class FloatError:
    """A client's error against float64, in units of our own float32's.

    Attributes:
        typical: the median over rows (tokens, or images) of the client's error over the largest of ours at that row.
        overall: the same of the root mean squares over all outputs.
        found: the client's root mean square.
    """

    typical: float
    overall: float
    found: float

    def explained(self, overall: float = OVERALL) -> bool:
        """Return whether float32 explains it."""
        return self.typical <= TYPICAL and self.overall <= overall

    def __str__(self) -> str:
        """Say it in a table's words."""
        return (
            f"its error against float64 is {self.typical:.2g} times our own float32's (median of rows), "
            f"{self.overall:.2g} times over all ({self.found:.2g}, root mean square)"
        )


@torch.no_grad()
def float_error(found: Tensor, network: nn.Module, x: Inputs, name: str | None = None) -> FloatError:
    """Return a client's error in units of our own.

    Args:
        found: the client's output for x, float32.
        network: a frozen float32 network; it becomes float64 for a while, which is exact both ways.
        x: inputs; language models' are int64.
        name: which of the network's ``outputs`` was found; None for the only one.
    """
    ours = [_output(network, x, name), *in_other_orders(network, x, name)]
    with _OneAfterAnother():
        ours.append(_output(network, x, name))
    large = double_(network)
    with _Float64(large):
        exact = _output(network, mapped(x, lambda part: part.double() if part.is_floating_point() else part), name)
    network.float()
    errors = [_rows(difference(other, exact)) for other in (found, *ours)]
    own = torch.stack(errors[1:])
    whole = [root_mean_square(rows) for rows in errors]
    return FloatError(
        typical=_ratio(errors[0], own.amax(0)).median().item(),
        overall=whole[0] / max(*whole[1:], torch.finfo(torch.float64).tiny),
        found=whole[0],
    )


@torch.no_grad()
def in_other_orders(network: nn.Module, x: Inputs, name: str | None = None) -> list[Tensor]:
    """Return a network's output for x, ORDERS times, with the sums of each product in other orders."""
    found = []
    for seed in range(ORDERS):
        with _OtherOrder(seed):
            found.append(_output(network, x, name))
    return found


def double_(network: nn.Module) -> set[Tensor]:
    """Make a network's floats float64, in place, but for large weights of layers; return these."""
    layers = (nn.Linear, nn.Embedding)
    held = {layer.weight for layer in network.modules() if type(layer) in layers and layer.weight.numel() >= LARGE}
    kept = {weight: weight.data for weight in held}
    for weight in held:
        weight.data = weight.new_empty(0)
    network.double()
    for weight, values in kept.items():
        weight.data = values
    return held


def root_mean_square(values: Tensor) -> float:
    """Return it."""
    return values.square().mean().sqrt().item()


def _output(network: nn.Module, x: Inputs, name: str | None) -> Tensor:
    made = outputs(network, x)
    return next(iter(made.values())) if name is None else made[name]


def _rows(error: Tensor) -> Tensor:
    return error.square().mean(-1).sqrt().flatten()


def _ratio(error: Tensor, own: Tensor) -> Tensor:
    """Return error / own, and 1 for 0 / 0."""
    return torch.where(error == own, 1.0, error / own)


class _OtherOrder(TorchFunctionMode):
    """Gives linear layers and convolutions their input channels, and their weights', in a random order."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        axis = {F.linear: -1, F.conv1d: 1, F.conv2d: 1, F.conv3d: 1}.get(function)
        if axis is not None and args[0].shape[axis] == args[1].shape[1]:  # else it is a convolution with groups
            order = torch.randperm(args[1].shape[1], generator=self._generator)
            args = (args[0].index_select(axis, order), args[1].index_select(1, order), *args[2:])
        return function(*args, **(kwargs or {}))


class _OneAfterAnother(TorchFunctionMode):
    """Adds up a linear layer's products in a running sum, as some kernels do: the longer, the less exact."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is not F.linear:
            return function(*args, **(kwargs or {}))
        x, weight, *bias = args
        y = x.new_zeros(*x.shape[:-1], weight.shape[0])
        for part, columns in zip(x.split(FEW, -1), weight.split(FEW, 1), strict=True):
            y += function(part, columns)
        return y if not bias or bias[0] is None else y + bias[0]


class _Float64(TorchFunctionMode):
    """Keeps float64 where a model says float32, as transformers' norms do; takes large float32 weights as float64."""

    def __init__(self, large: set[Tensor]) -> None:
        super().__init__()
        self._large = large

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in (F.linear, F.embedding) and len(args) > 1 and args[1] in self._large:
            return self._with_large(function, *args, **(kwargs or {}))
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return function(*args, **kwargs)

    @staticmethod
    def _with_large(function: Any, x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Tensor:
        if function is F.embedding:
            return function(x, weight, *rest, **named).double()
        (bias,) = (*rest, *named.values()) or (None,)
        rows = max(1, LARGE // weight.shape[1])
        y = torch.cat([function(x, part.double()) for part in weight.split(rows)], -1)
        return y if bias is None else y + bias
