"""Learned step size quantization, as published: Esser et al. 2020, arXiv:1902.08153.

The step size is one float32 parameter a scale, created when the model is prepared. What differs from the paper: it is
rounded to the stored scale's dtype inside the forward (straight through), so that training uses the shipped scale.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import StateError, some_of
from ..numerics import MIN_SCALE, QuantizedTensor, quantize_tensor, scale_shape, stored_scale
from ..spec import Init, QuantSpec
from .fixed_dtype import FixedDtype
from .least_error import best_step_size, squared_errors
from .observer import ActivationStatistics
from .rounding import Rounding

CAST = (
    "the {what} of {name!r} arrives as {dtype}, cast for the forward (FSDP2's MixedPrecisionPolicy does that), and "
    "what trains would not be what ships: leave out param_dtype; for speed, train a bf16 model with "
    "qat.shard_step_sizes, or under autocast"
)

_STORED = torch.float32, torch.float64


def lsq_step_size(mean_magnitude: Tensor, spec: QuantSpec) -> Tensor:
    """Return 2<|v|>/sqrt(Q_P) (section 2.1 of the paper)."""
    return 2 * mean_magnitude / math.sqrt(spec.q_p)


def minmax_step_size(max_magnitude: Tensor, spec: QuantSpec) -> Tensor:
    """Return the smallest step size that clips nothing: max|v|/Q_P."""
    return max_magnitude / spec.q_p


def weight_step_size(weight: Tensor, spec: QuantSpec, init: Init, weights: Tensor | None = None) -> Tensor:
    """Return the initial step size of a weight, (rows, groups) float32.

    Args:
        weight: any float tensor.
        spec: the grid.
        init: one that reads no data.
        weights: of the squared errors, for Init.mse: float32 that broadcasts to the weight; None for 1.
    """
    magnitude = weight.detach().abs().float().reshape(*scale_shape(weight.shape, spec), -1)
    if init is Init.lsq:
        return lsq_step_size(magnitude.mean(-1), spec)
    largest = minmax_step_size(magnitude.amax(-1), spec)
    return largest if init is Init.minmax else best_step_size(squared_errors(weight, largest, spec, weights), largest)


def gradient_scale(elements: int, spec: QuantSpec) -> float:
    """Return g = 1/sqrt(N Q_P) (section 2.2), with N the elements that share a step size."""
    return 1 / math.sqrt(elements * spec.q_p)


class LearnedStepSize(FixedDtype):
    """State shared by weight and activation quantizers.

    Attributes:
        step_size: float32 parameter (rows, groups).
        initialised: buffer, 1 or 0; saved, so that a resumed run is never calibrated again.
        enabled: False passes tensors through, for a delayed start.
        name: the layer's, for messages.
        fix: what to do about a step size that was never initialised.
    """

    fix = "load a trained checkpoint"

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], name: str, init: Init, device: torch.device) -> None:
        super().__init__()
        self.spec, self.name, self.init = spec, name, init
        self.enabled = True
        self.step_size = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=device))
        # In float32, as are all buffers here: averages of buffers, such as Lightning's WeightAveraging makes, take no
        # bool, and cut the fraction off the mean of two equal integers.
        self.register_buffer("initialised", torch.zeros((), dtype=torch.float32, device=device))
        self._ready = False  # the buffer's value, read without a device synchronisation

    @torch.no_grad()
    def set_step_size(self, step_size: Tensor) -> None:
        """Start from the given step size, in place: an optimizer that holds the parameter goes on holding it."""
        self.step_size.copy_(step_size.reshape(self.step_size.shape).clamp_min(MIN_SCALE))
        self.initialised.fill_(1)
        self._ready = True

    @torch.no_grad()
    def project(self) -> None:
        """Keep the parameter positive after an optimizer step."""
        self.step_size.clamp_(min=MIN_SCALE)

    @property
    def is_initialised(self) -> bool:
        """Whether a step size was ever set or loaded, or copied into the tensors here, as averages of a model do."""
        # An unwritten buffer is not asked: to_empty may have left anything in it.
        if not self._ready and not self.initialised.is_inference() and self.initialised._version:
            self._read_buffers()
        return self._ready

    def _read_buffers(self) -> None:
        self._ready = self.initialised.device.type != "meta" and bool(self.initialised)

    def scale(self) -> Tensor:
        """Return the stored scale: (rows, groups) in ``spec.scale_dtype``."""
        return stored_scale(self.trained_step_size(), self.spec)

    def require_initialised(self) -> None:
        """Raise StateError if no step size was ever set."""
        self.trained_step_size()

    def trained_step_size(self) -> Tensor:
        """Return the step size, which a module takes a while to find; StateError if it was never set, or is cast."""
        if not (self._ready or self.is_initialised):
            raise StateError(f"the step size of {self.name!r} was never initialised: {self.fix}")
        step_size = self.step_size
        if step_size.dtype not in _STORED:
            raise StateError(CAST.format(what="step size", name=self.name, dtype=step_size.dtype))
        return step_size

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "initialised" in state_dict:
            self._read_buffers()


class LearnedWeight(LearnedStepSize):
    """State shared by the quantizers of weights, per tensor, channel or group.

    Attributes:
        kept: rounded weights that ``qat.kept_weights`` keeps for several micro-batches; None keeps none.
        stored_dtype: what a sharded weight is stored in, and has to arrive in; None where nothing shards it.
    """

    kept: dict | None = None
    stored_dtype: torch.dtype | None = None

    fix = "prepare the model with its weights in memory (not on the meta device), or load a trained checkpoint"

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight in the weight's dtype."""
        rounding = self.rounding(weight)
        return weight if rounding is None else rounding(weight)

    def rounding(self, weight: Tensor) -> Rounding | None:
        """Return what ``forward`` does to the weight; None if it passes through."""
        if not self.enabled:
            return None
        step_size = self.trained_step_size()
        if self.stored_dtype not in (None, weight.dtype):
            raise StateError(CAST.format(what="weight", name=self.name, dtype=weight.dtype))
        return Rounding(self.spec, step_size, self.grad_scale(weight), self.zero_points(), kept=self.kept)

    def zero_points(self) -> Tensor | None:
        """Return the zero points, in the shape of the step size; None where they are 0."""
        return None

    def grad_scale(self, weight: Tensor) -> float:
        """Return what LSQ multiplies the gradient of the step sizes by."""
        return gradient_scale(weight.numel() // self.step_size.numel(), self.spec)


class WeightLSQ(LearnedWeight):
    """Fake-quantizes a weight; its step size waits for data if its init reads any."""

    def __init__(self, spec: QuantSpec, weight: Tensor, name: str, init: Init = Init.lsq) -> None:
        spec = replace(spec, signed=True)
        super().__init__(spec, scale_shape(weight.shape, spec), name, init, weight.device)
        if init.reads_data:
            self.fix = f"init={init.value} reads data: run qat.calibrate(model, batches) (the training command does it)"
        elif not weight.is_meta:
            self.set_step_size(weight_step_size(weight, spec, init))

    @property
    def waits_for_data(self) -> bool:
        """Whether ``qat.calibrate`` is to set it, by an init that reads data."""
        return self.init.reads_data and not self.is_initialised

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return the integers that ``forward`` uses."""
        return quantize_tensor(weight, self.scale(), self.spec)


def never_reached(names: list[str]) -> StateError:
    """Return the error of layers that no batch of a calibration ran."""
    was, it = ("was", "it") if len(names) == 1 else ("were", "them")
    return StateError(
        f"{some_of(list(map(repr, names)), 20)} {was} never reached during calibration: use batches that run {it}, and "
        f"call the layer, as F.linear(x, layer.weight) does not; or give {it} a rule with weight and activation null"
    )


def features(x: Tensor) -> int:
    """Return LSQ's N for an activation: its elements without the batch axis."""
    return x.numel() // x.shape[0] if x.dim() > 1 and x.numel() else max(1, x.numel())


class LearnedActivation(LearnedStepSize):
    """State shared by the quantizers of activations, which are per tensor; signed or unsigned as given or as found.

    Attributes:
        observer: takes what passes, during calibration; None outside it.
        signed: buffer, 1 or 0; saved.
    """

    fix = "run qat.calibrate(model, batches) (the training command does it), or load a trained checkpoint"

    def __init__(self, spec: QuantSpec, device: torch.device, name: str, init: Init = Init.lsq) -> None:
        super().__init__(spec, (1, 1), name, init, device)
        self.observer: ActivationStatistics | None = None
        self.register_buffer("signed", self.initialised.new_full((), float(spec.signed is not False)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the fake-quantized activation in its own dtype, or observe it during calibration."""
        rounding = self.rounding(x)
        return x if rounding is None else rounding(x)

    def rounding(self, x: Tensor) -> Rounding | None:
        """Return what ``forward`` does to x; None if x passes through, observed during calibration."""
        raise NotImplementedError

    def passes(self, x: Tensor) -> bool:
        """Return whether x passes through: observed during calibration, or before a delayed start."""
        if self.observer is not None:
            self.observer.update(x)
            return True
        if self.enabled:
            self.require_initialised()
        return not self.enabled

    def zero_point(self) -> Tensor | None:
        """Return the code of 0, int8 (1, 1); None where that is 0."""
        return None

    def observed(self, statistics: ActivationStatistics) -> tuple[float, float, float]:
        """Return (mean magnitude, -minimum, maximum), the last two at least 0.

        Raises:
            StateError: nothing was observed, or NaN or infinity was.
        """
        total, count = statistics.sums.tolist()
        negative, positive = statistics.extremes.tolist()
        if count == 0:
            raise never_reached([self.name])
        if not all(map(math.isfinite, (total, negative, positive))):
            raise StateError(f"{self.name!r} saw NaN or infinity during calibration: check the data and the model")
        return total / count, negative, positive

    def initialise(self, statistics: ActivationStatistics) -> None:
        """Set signedness (where not given) and step size from calibration statistics.

        Raises:
            StateError: nothing was observed, or NaN or infinity was.
        """
        mean, negative, positive = self.observed(statistics)
        self._set_signed(negative > 0 if self.spec.signed is None else self.spec.signed)
        step_size = minmax_step_size(self.step_size.new_tensor(max(negative, positive)), self.spec)
        if self.init is Init.lsq:
            step_size = lsq_step_size(self.step_size.new_tensor(mean), self.spec)
        elif self.init is Init.mse:
            step_size = statistics.least_error_step_size(step_size, self.spec)
        self.set_step_size(step_size)

    def start(self, scale: Tensor, zero_point: None, signed: bool) -> None:
        """Start from a stored scale, as an artifact holds it, and on a grid with an offset from a zero point."""
        self._set_signed(signed)
        self.set_step_size(scale)

    def _set_signed(self, signed: bool) -> None:
        self.signed.fill_(signed)
        self.spec = replace(self.spec, signed=signed)

    def _read_buffers(self) -> None:
        super()._read_buffers()
        if self._ready:
            self._set_signed(bool(self.signed))


class ActivationLSQ(LearnedActivation):
    """Fake-quantizes an activation; its step size is learned."""

    def rounding(self, x: Tensor) -> Rounding | None:
        """Return what ``forward`` does to x; None if x passes through, observed during calibration."""
        if self.passes(x):
            return None
        return Rounding(self.spec, self.step_size, gradient_scale(features(x), self.spec))
