"""WeightCodebook: fake-quantizes a weight to the levels of a codebook, times the largest magnitude of each block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import codebook
from ..double_quantization import dynamic_map, nest
from ..errors import LayerError, StateError
from ..numerics import QuantizedTensor, scale_shape
from ..spec import Codebook, Init, QuantSpec
from .fixed_dtype import FixedDtype
from .kmeans import kmeans_levels, normal_levels


class WeightCodebook(FixedDtype):
    """Fake-quantizes a weight per tensor, channel or group; it has nothing to learn of its own.

    The levels of a custom codebook start at the k-means of the weight's values; ``set_levels`` replaces them. With an
    init that reads data it waits for ``qat.calibrate``, which moves the weight so that its codes are the method's.

    Attributes:
        levels: float32 (1, L) of a named codebook; (rows, L) of a custom one, which are saved.
        scale_levels: float32 (256,), saved, where the scales are quantized too; else None.
        initialised: float32 (), saved, 0 until calibrated; None where nothing waits for data.
        enabled: False passes tensors through, for a delayed start.
        name: the layer's, for messages.
    """

    def __init__(self, spec: QuantSpec, weight: Tensor, name: str, init: Init = Init.minmax) -> None:
        super().__init__()
        self.spec, self.name, self.enabled, self.init = replace(spec, signed=True), name, True, init
        waits = torch.zeros((), dtype=torch.float32, device=weight.device) if init.reads_data else None
        self.register_buffer("initialised", waits)
        self.shape = scale_shape(weight.shape, spec)
        own = codebook.stored_shape(weight.shape, spec)
        device = torch.device("cpu") if weight.is_meta else weight.device  # no checkpoint would fill a named one's
        unset = None if own is None else torch.zeros(own, dtype=torch.float32, device=weight.device)
        levels = codebook.named_levels(spec, device) if unset is None else unset
        self.register_buffer("levels", levels, persistent=own is not None)
        double = spec.codebook is Codebook.nf4_double
        self.register_buffer("scale_levels", dynamic_map(device) if double else None)
        self._ready = own is None and not init.reads_data  # the buffers' word, without a device synchronisation
        if own is not None and not weight.is_meta:
            scale = codebook.block_scale(weight, self.shape)
            values = codebook.ratio(weight, scale)
            squares = scale.double().square()[..., None].expand(values.shape)  # an error of 1 is one of the scale
            start = normal_levels(spec.bits).to(device)
            self.set_levels(kmeans_levels(values.reshape(own[0], -1), squares.reshape(own[0], -1), start))
            self._ready = not init.reads_data

    @torch.no_grad()
    def set_levels(self, levels: Tensor) -> None:
        """Take the levels of a custom codebook: (rows, L), or (L,) for all rows, ascending, in units of the scale.

        Raises:
            LayerError: they do not fit.
        """
        try:
            self.levels.copy_(codebook.check_levels(levels, tuple(self.levels.shape)))
        except LayerError as error:
            raise LayerError(f"{self.name!r}: {error}") from None
        self._ready = True

    @property
    def waits_for_data(self) -> bool:
        """Whether ``qat.calibrate`` is to set the weight."""
        return self.init.reads_data and not self._ready

    def calibrated(self) -> None:
        """Take the weight as it is now for the one that data have set."""
        self.initialised.fill_(1)
        self._ready = True

    def require_initialised(self) -> None:
        """Raise StateError if a custom codebook never got its levels, or the weight waits for data."""
        if self.waits_for_data:
            raise StateError(
                f"the weight of {self.name!r} was never set: init={self.init.value} reads data: run "
                "qat.calibrate(model, batches) (the training command does it), or load a trained checkpoint"
            )
        if not self._ready:
            raise StateError(
                f"the codebook of {self.name!r} was never set: prepare the model with its weights in memory (not on "
                "the meta device), load a trained checkpoint, or call set_levels on the layer's weight_quantizer"
            )

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight in the weight's dtype; its gradient passes straight through."""
        if not self.enabled:
            return weight
        self.require_initialised()
        return codebook.fake_quantize(weight, self.shape, self.levels, self.scale_levels)

    def quantize(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes that ``forward`` uses, with their scales and levels.

        Raises:
            LayerError: the weight holds NaN or infinity.
            StateError: the levels were never set.
        """
        self.require_initialised()
        if not weight.isfinite().all():
            raise LayerError("the weight or its scale holds NaN or infinity")
        scale = codebook.block_scale(weight, self.shape)
        codes = codebook.quantize(weight.detach(), scale, self.levels)
        nested = None
        if self.scale_levels is not None:
            nested = nest(scale, self.scale_levels.clone())
            scale = nested.values()
        return QuantizedTensor(codes, scale, self.spec, None, self.levels.clone(), nested)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.spec.codebook is not Codebook.custom:
            self.levels = codebook.named_levels(self.spec, self.levels.device)  # which to_empty would leave undefined
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.init.reads_data:
            if prefix + "initialised" in state_dict:
                self._ready = not self.initialised.is_meta and bool(self.initialised)
        elif self.spec.codebook is Codebook.custom and prefix + "levels" in state_dict and not self.levels.is_meta:
            self._ready = bool(self.levels[0, 0] < self.levels[0, 1])  # zeros were never set
