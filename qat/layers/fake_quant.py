"""What fake-quant layers share: a weight is loaded with the step sizes that fit it, or not at all."""

from __future__ import annotations

from torch import Tensor

from ..errors import StateError
from ..quantizers import LearnedStepSize, OfInput, OfWeight


class FakeQuant:
    """A layer whose weight, and input where asked for, pass through quantizers.

    Attributes:
        weight_quantizer: None leaves the weight alone.
        activation_quantizer: None leaves the input alone.
    """

    weight_quantizer: OfWeight | None
    activation_quantizer: OfInput | None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        """Refuse a plain model's weight, which ``strict=False`` would let in beside the step sizes of another."""
        for kind in ("weight_quantizer", "activation_quantizer"):
            quantizer = self._modules.get(kind)
            if (
                isinstance(quantizer, LearnedStepSize)
                and quantizer.is_initialised
                and f"{prefix}weight" in state_dict
                and f"{prefix}{kind}.step_size" not in state_dict
            ):
                raise StateError(
                    f"{quantizer.name!r} has step sizes that fit the weight and the inputs it had, and this state dict "
                    "holds a weight without any: load it into the plain model, before qat.prepare"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
