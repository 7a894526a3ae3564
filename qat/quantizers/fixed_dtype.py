"""A module whose floating-point state keeps its dtype when the model is moved or cast."""

from collections.abc import Callable

from torch import Tensor, nn


class FixedDtype(nn.Module):
    """``model.bfloat16()`` and Lightning's bf16-true move this module but never round what it holds."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(keeping_dtype(fn), recurse)


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what moves a tensor as ``fn`` does, and leaves its dtype as it is."""

    def moved(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return new if new.dtype == tensor.dtype else tensor.to(new.device)

    return moved
