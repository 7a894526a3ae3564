"""SignRound and block-wise LSQ: train how a block's weights are rounded, so that its output stays what it was.

SignRound (Cheng et al. 2023, arXiv:2309.05516) learns for each weight an offset V in [-1/2, 1/2] before the rounding,
and for each scale a factor in (0, 1], by the sign of their gradients. Block-wise LSQ learns weights and step sizes by
Adam, as EfficientQAT's first phase does (Chen et al. 2024, arXiv:2407.11062). Both compare the block's output behind
quantized predecessors with that of the unquantized model, and both go through LSQ's fake quantization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CalibrationError
from ..layers import QuantLayer
from ..numerics import MIN_SCALE, fake_quantize
from ..quantizers.lsq import gradient_scale, weight_step_size
from ..spec import Init
from .error_compensation import fall_back_unreached
from .options import Options
from .report import Report, set_layer
from .units import Unit, floats_of

CHECKS = 4  # how often the loss over all batches is looked at; the best state is kept
STEPS_OF_A_STEP_SIZE = 0.02  # block-wise LSQ: what Adam moves a weight by at first, in step sizes
STEP_SIZE_LR = 0.1  # of a weight's


class SignRounding(nn.Module):
    """In place of a layer's quantizer: rounds weight + offset * step size, with step size = factor * max|w|/Q_P."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.spec = layer.weight_quantizer.spec
        self.weight = layer.weight.detach().float()
        self.largest = weight_step_size(layer.weight, self.spec, Init.minmax).clamp_min(MIN_SCALE)
        self.offset = nn.Parameter(torch.zeros_like(self.weight))
        self.factor = nn.Parameter(torch.ones_like(self.largest))

    def latent(self) -> tuple[Tensor, Tensor]:
        """Return what is rounded, in the weight's shape, and the step sizes."""
        step_size = self.largest * self.factor
        offset = (self.offset.reshape(*step_size.shape, -1) * step_size[..., None]).view_as(self.weight)
        return self.weight + offset, step_size

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight in the weight's dtype."""
        return fake_quantize(*self.latent(), self.spec).to(weight.dtype)

    @torch.no_grad()
    def project(self) -> None:
        """Keep what is learned in its range."""
        self.offset.clamp_(-0.5, 0.5)
        self.factor.clamp_(MIN_SCALE, 1.0)


class BlockLSQ(nn.Module):
    """In place of a layer's quantizer: LSQ on float32 copies of weight and step sizes."""

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.spec = layer.weight_quantizer.spec
        self.weight = nn.Parameter(layer.weight.detach().float().clone())
        self.step_size = nn.Parameter(weight_step_size(layer.weight, self.spec, Init.mse).clamp_min(MIN_SCALE))

    def latent(self) -> tuple[Tensor, Tensor]:
        """Return what is rounded, in the weight's shape, and the step sizes."""
        return self.weight, self.step_size

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight in the weight's dtype."""
        grad_scale = gradient_scale(self.weight.numel() // self.step_size.numel(), self.spec)
        return fake_quantize(*self.latent(), self.spec, grad_scale).to(weight.dtype)

    @torch.no_grad()
    def project(self) -> None:
        """Keep what is learned in its range."""
        self.step_size.clamp_(min=MIN_SCALE)


def quantize_unit(unit: Unit, options: Options, report: Report) -> None:
    """Train the rounding of all of a unit's layers together.

    Raises:
        CalibrationError: NaN in its output, or a layer that no batch reached.
    """
    unit.find_stages()
    layers = {name: layer for name, layer in unit.layers.items() if name in unit.calls}
    targets = []
    for batch in range(unit.batches):
        outputs = floats_of(unit.run(unit.twin, batch))
        targets.append(outputs if options.device is None else [output.cpu() for output in outputs])
    if not all(target.isfinite().all() for outputs in targets for target in outputs):
        raise CalibrationError(f"the output of {unit.name!r} holds NaN or infinity: check the data and the model")
    nearest, roundings = [{name: SignRounding(layer) for name, layer in layers.items()} for _ in range(2)]
    if report.init is Init.blockwise:
        roundings = {name: BlockLSQ(layer) for name, layer in layers.items()}
    with rounded_by(layers, nearest):
        nearest_loss = total_loss(unit, targets)
    train = train_signs if report.init is Init.signround else train_lsq
    with rounded_by(layers, roundings):
        loss = train(unit, list(roundings.values()), targets, options)
    for name, rounding in roundings.items():
        set_layer(layers[name], *rounding.latent())
        layers[name].weight_quantizer.enabled = True
    report.losses[unit.name] = loss / nearest_loss if nearest_loss else 1.0
    fall_back_unreached(unit, options, report)


def train_signs(unit: Unit, roundings: list[SignRounding], targets: list[list[Tensor]], options: Options) -> float:
    """Descend along the signs of the gradients, with a rate that falls to 0; return the loss of the best state."""
    parameters = [parameter for rounding in roundings for parameter in rounding.parameters()]
    lr = options.lr or 1 / max(1, options.steps)

    def step(gradients: tuple[Tensor, ...], progress: float) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient.sign_(), alpha=lr * (1 - progress))

    return descend(unit, roundings, parameters, targets, options.steps, step)


def train_lsq(unit: Unit, roundings: list[BlockLSQ], targets: list[list[Tensor]], options: Options) -> float:
    """Train weights and step sizes by Adam with a cosine to 0; return the loss of the best state."""
    groups = []
    for rounding in roundings:
        lr = (options.lr or STEPS_OF_A_STEP_SIZE) * rounding.step_size.mean().item()
        groups += [
            {"params": [rounding.weight], "lr": lr, "first": lr},
            {"params": [rounding.step_size], "lr": lr * STEP_SIZE_LR, "first": lr * STEP_SIZE_LR},
        ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    parameters = [parameter for group in groups for parameter in group["params"]]

    def step(gradients: tuple[Tensor, ...], progress: float) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = group["first"] * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.step()

    return descend(unit, roundings, parameters, targets, options.steps, step)


def descend(
    unit: Unit,
    roundings: list[nn.Module],
    parameters: list[Tensor],
    targets: list[list[Tensor]],
    steps: int,
    step: Callable[[tuple[Tensor, ...], float], None],
) -> float:
    """Take steps on one batch each, in a fixed random order; leave the state of least loss over all of them."""
    generator = torch.Generator().manual_seed(0)
    least, best = total_loss(unit, targets), [parameter.detach().clone() for parameter in parameters]
    for index in range(steps):
        batch = int(torch.randint(unit.batches, (), generator=generator, device="cpu"))
        with torch.enable_grad():
            loss = batch_loss(unit, batch, targets)
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)  # an expert may get no token
        step(gradients, index / steps)
        for rounding in roundings:
            rounding.project()
        if (index + 1) % max(1, steps // CHECKS) == 0 or index + 1 == steps:
            loss = total_loss(unit, targets)
            if loss < least:
                least, best = loss, [parameter.detach().clone() for parameter in parameters]
    for parameter, value in zip(parameters, best, strict=True):
        parameter.data.copy_(value)
    return least


def batch_loss(unit: Unit, batch: int, targets: list[list[Tensor]]) -> Tensor:
    """Return the mean squared difference of the unit's output to the unquantized one; of several, their sum."""
    pairs = zip(floats_of(unit.run(unit.module, batch)), targets[batch], strict=True)
    return sum(F.mse_loss(output.float(), target.to(output.device).float()) for output, target in pairs)


def total_loss(unit: Unit, targets: list[list[Tensor]]) -> float:
    """Return the mean of all batches' losses."""
    return sum(batch_loss(unit, batch, targets).item() for batch in range(unit.batches)) / unit.batches


@contextmanager
def rounded_by(layers: dict[str, QuantLayer], roundings: dict[str, nn.Module]) -> Iterator[None]:
    """Let other modules round the layers' weights."""
    quantizers = {name: layer.weight_quantizer for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.weight_quantizer = roundings[name]
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.weight_quantizer = quantizers[name]
