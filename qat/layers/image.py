"""The gradient of an image's step size without that of the image, for a network's first convolution.

A step size is told one number of the gradient of x, grad_scale * sum(slopes * gradient of x), where a slope is what its
element counts (``Rounding.slopes``). That gradient is linear in the output's, so that the number is

    grad_scale * sum(gradient of the output * convolution of the slopes)

and the gradient of x is never made. Both are convolutions of as many products, but one that writes few channels is
slow, on GPUs and on CPUs.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend

if TYPE_CHECKING:
    from ..quantizers.rounding import Rounding
    from .product import Convolution

CHANNELS = 8  # of 16 bits, that tensor cores take at once


def takes(x: Tensor, convolution: Convolution | None) -> bool:
    """Return whether ``gradients`` is for x, if x needs no gradient: an image whose channels fit twice into eight.

    With more channels, and for a linear map, the gradient of x takes no longer. Kernels count step sizes in 31 bits,
    and of an empty image there are none.
    """
    is_image = convolution is not None and convolution.groups == 1 and 2 * x.shape[1] <= CHANNELS
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
    one = 2.0**-rounding.grid.bits  # makes slopes at most 1, so that their convolution stays in fp16's range
    factor, like = rounding.grad_scale / one, rounding.step_size
    slopes = rounding._replace(grad_scale=one).slopes(x, wanted)
    sums = [None if slope is None else _sum(slope, weight, convolution, grad) * factor for slope in slopes]
    return [total if total is None else total.to(like.dtype).reshape(like.shape) for total in sums]


def _sum(slope: Tensor, weight: Tensor, convolution: Convolution, grad: Tensor) -> Tensor:
    """Return sum(grad * convolution of the slopes), in float32 (or float64).

    16 bits are too few for a slope: what they cut off is more channels of the same convolution.
    """
    x = slope.to(grad.dtype)
    if grad.dtype.itemsize == 2:
        room = [0, 0] * len(convolution.stride) + [0, CHANNELS - 2 * x.shape[1]]
        x = F.pad(torch.cat((x, (slope - x).to(x.dtype)), 1), room)
        weight = F.pad(torch.cat((weight, weight), 1), room)
    stride, padding, dilation, groups = convolution
    y = torch.convolution(x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)
    if backend.fused(y):
        return _kernels().inner_product(y, grad)
    dtype = torch.promote_types(y.dtype, torch.float32)
    sums = ((of_y.to(dtype) * of_grad).sum() for of_y, of_grad in zip(y, grad, strict=True))  # each fits into a cache
    return sum(sums, start=y.new_zeros((), dtype=dtype))


@cache
def _kernels() -> ModuleType:
    from qat.kernels import inner_product  # loads Triton

    return inner_product
