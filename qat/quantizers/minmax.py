"""Min-max: step sizes that are not learned but follow the range of the values (Jacob et al. 2018, arXiv:1712.05877).

A weight's come from the weight at every forward; an activation's from a running average over the training batches,
which stays as it is in evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import numerics
from ..numerics import QuantizedTensor, quantize_tensor, stored_scale
from ..once import Function
from ..ranks import max_over_ranks_
from ..spec import Init, QuantSpec
from . import asymmetric, lsq_plus
from .lsq import ActivationLSQ, minmax_step_size, weight_step_size
from .lsq_plus import ActivationLSQPlus, step_of
from .rounding import Rounding

MOMENTUM = 0.01  # of the running average, as in PyTorch's own observer


class WeightMinMax(nn.Module):
    """Fake-quantizes a weight per tensor, channel or group; its gradient passes straight through.

    Attributes:
        enabled: False passes tensors through, for a delayed start.
        name: the layer's, for messages.
    """

    def __init__(self, spec: QuantSpec, name: str) -> None:
        super().__init__()
        self.spec, self.name, self.enabled = spec.override({"signed": True}), name, True

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight in the weight's dtype."""
        return fake_quantize(weight, self.spec) if self.enabled else weight

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return the integers that ``forward`` uses.

        Raises:
            LayerError: the weight holds NaN or infinity.
        """
        step_size, zero_point = step_and_zero(weight, self.spec)
        zero_point = None if zero_point is None else zero_point.to(torch.int8)
        return quantize_tensor(weight, stored_scale(step_size, self.spec), self.spec, zero_point)


def step_and_zero(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Return the step size (rows, groups) that clips nothing and, on an asymmetric grid, the zero point: float32."""
    if spec.symmetric:
        return weight_step_size(weight, spec, Init.minmax), None
    return asymmetric.range_of(weight, spec)


def fake_quantize(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return ``fake_quantized``, whose gradient is the incoming one."""
    if torch.compiler.is_dynamo_compiling():
        from .. import compiled  # keeps Inductor's own rounding out

        return compiled.minmax_fake_quantize(weight, spec)
    return _FakeQuantize.apply(weight, spec)


def fake_quantized(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return the fake-quantized weight in its own dtype, without gradients."""
    step_size, zero_point = step_and_zero(weight, spec)
    return numerics.arithmetic(weight, step_size).fake_quantized(weight, step_size, spec, weight.dtype, zero_point)


class _FakeQuantize(Function):
    """Saves nothing."""

    @staticmethod
    def forward(ctx, weight: Tensor, spec: QuantSpec) -> Tensor:
        return fake_quantized(weight, spec)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None


class _Follows:
    """Moves the range towards that of each training batch, before the batch is rounded.

    On several ranks the range is that of all their batches, so every rank has to reach the layer, as with
    SyncBatchNorm. Activation checkpointing, which runs a layer twice, moves it twice. What follows is a buffer, so that
    no optimizer holds it and nothing shards it; a forward rounds with a copy, which its backward finds as it was.
    """

    def __init__(self, spec: QuantSpec, device: torch.device, name: str) -> None:
        super().__init__(spec, device, name, Init.minmax)
        for key, parameter in list(self.named_parameters()):
            delattr(self, key)
            self.register_buffer(key, parameter.detach())

    def passes(self, x: Tensor) -> bool:
        """Return whether x passes through; if not, and in training, follow its range."""
        passes = super().passes(x)
        if self.training and not passes:
            self.follow(*seen_range(x))
        return passes


class ActivationMinMax(_Follows, ActivationLSQ):
    """Fake-quantizes an activation per tensor on a symmetric or unsigned grid; its step size follows the range."""

    def rounding(self, x: Tensor) -> Rounding | None:
        """Return what ``forward`` does to x; None if x passes through, observed during calibration."""
        return None if self.passes(x) else Rounding(self.spec, self.step_size.clone())

    @torch.no_grad()
    def follow(self, low: Tensor, high: Tensor) -> None:
        """Move the step size towards that of a range."""
        most = torch.maximum(-low, high) if self.spec.q_n else high
        self.step_size.lerp_(minmax_step_size(most, self.spec).reshape(1, 1), MOMENTUM)


class ActivationRange(_Follows, ActivationLSQPlus):
    """Fake-quantizes an activation per tensor; step size and zero point follow the range."""

    def rounding(self, x: Tensor) -> Rounding | None:
        """Return what ``forward`` does to x; None if x passes through, observed during calibration."""
        if self.passes(x):
            return None
        return Rounding(self.spec, self.step_size.clone(), offset=self.offset.clone(), rule=lsq_plus)

    @torch.no_grad()
    def follow(self, low: Tensor, high: Tensor) -> None:
        """Move step size and offset towards those of a range."""
        self.step_size.lerp_(step_of(low, high, self.spec).reshape(1, 1), MOMENTUM)
        self.offset.lerp_(low.reshape(1, 1), MOMENTUM)


def seen_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of all ranks' x, 0 included: float32 scalars."""
    ends = torch.zeros(2, dtype=torch.float32, device=x.device)
    if x.numel():
        low, high = x.detach().aminmax()
        ends = torch.maximum(ends, torch.stack([-low.float(), high.float()]))
    max_over_ranks_(ends)
    return -ends[0], ends[1]
