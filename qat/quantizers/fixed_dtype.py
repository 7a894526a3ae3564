"""A module whose floating-point state keeps its dtype when the model is moved or cast."""

from collections.abc import Callable

from torch import Tensor, nn


class FixedDtype(nn.Module):
    """``model.bfloat16()`` and Lightning's bf16-true move this module but never round what it holds."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
