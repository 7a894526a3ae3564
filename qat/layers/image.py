"""The gradient of an image's step size without that of the image, for a network's first convolution.

A step size is told one number of the gradient of x, grad_scale * sum(slopes * gradient of x), where a slope is what its
element counts (``Rounding.slopes``). That gradient is linear in the output's, so that the number is

    grad_scale * sum(gradient of the output * convolution of the slopes)

and the gradient of x is never made. Both are convolutions of as many products, but one that writes few channels is
slow, on GPUs and on CPUs. A GPU does not write the convolution of the slopes either (``qat.kernels.convolution_sum``).
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import backend

if TYPE_CHECKING:
    from ..quantizers.rounding import Rounding
    from .product import Convolution

CHANNELS = 4  # of an image at most


def takes(x: Tensor, convolution: Convolution | None) -> bool:
    """Return whether ``gradients`` is for x, if x needs no gradient: an image, of one to four channels.

    With more channels, and for a linear map, the gradient of x takes no longer. Kernels count step sizes in 31 bits,
    and of an empty image there are none.
    """
    is_image = convolution is not None and convolution.groups == 1 and x.shape[1] <= CHANNELS
    return is_image and 0 < x.numel() < 2**31


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, rounding: Rounding, convolution: Convolution, wanted: tuple[bool, bool]
) -> list[Tensor | None]:
    """Return the gradients of x's step size and offset, outside autocast; None for one not wanted.

    Args:
        grad: of the output, (B, N, ...).
        x: (B, C, ...), before it is rounded.
        weight: (N, C, ...) as multiplied, in the dtype of ``grad``.
        rounding: of x.
        convolution: without groups.
        wanted: which.
    """
    factor, like = rounding.grad_scale, rounding.step_size
    slopes = rounding._replace(grad_scale=1.0).slopes(x, wanted)
    sums = [None if slope is None else _sum(slope, weight, convolution, grad) * factor for slope in slopes]
    return [total if total is None else total.to(like.dtype).reshape(like.shape) for total in sums]


def _sum(slope: Tensor, weight: Tensor, convolution: Convolution, grad: Tensor) -> Tensor:
    """Return sum(grad * convolution of the slopes), in float32 (or float64), as 16 bits are too few for a slope."""
    stride, padding, dilation, groups = convolution
    if backend.fused(grad) and grad[:, 0].numel() < 2**31:
        return _kernels().convolution_sum(slope, weight, grad, stride, padding, dilation)
    weight, nothing = weight.to(slope.dtype), [0] * len(stride)
    y = torch.convolution(slope, weight, None, stride, padding, dilation, False, nothing, groups)
    sums = ((of_y * of_grad).sum() for of_y, of_grad in zip(y, grad, strict=True))  # each fits into a cache
    return sum(sums, start=y.new_zeros(()))


@cache
def _kernels() -> ModuleType:
    from qat.kernels import convolution_sum  # loads Triton

    return convolution_sum
