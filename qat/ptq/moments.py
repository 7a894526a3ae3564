"""What a layer's inputs are reduced to: their second moments, and checks that they can be quantized with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CalibrationError


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's input as rows of the matrix product that it is: (convolution groups, T, K) float32.

    A linear layer (..., K) has one group; a convolution has a row for each output position, and K = C/groups * kernel.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).float()
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x.float(), layer._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(x, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)  # (B, C * kernel, positions)
    return columns.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def rows_of(layer: nn.Module) -> tuple:
    """Return what else than the input decides ``input_rows``: a 3x3 and a 1x1 convolution cut the same image apart."""
    if isinstance(layer, nn.Linear):
        return ()
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode


class Moments:
    """The mean of x x^T over all inputs of a layer, in float32.

    Attributes:
        hessian: (convolution groups, K, K), a sum until ``finish``.
        difference: the same of (x_unquantized - x) x^T; None where it is not wanted.
        magnitude: (convolution groups, K), the mean of |x|.
        count: rows so far.
    """

    def __init__(self) -> None:
        self.hessian: Tensor | None = None
        self.difference: Tensor | None = None
        self.magnitude: Tensor | None = None
        self.count = 0

    def update(self, layer: nn.Module, x: Tensor, unquantized: Tensor | None = None) -> None:
        """Add a batch of inputs, with what they would be in the unquantized model where that is wanted."""
        rows = input_rows(layer, x)
        if not rows.shape[1]:
            return
        if self.hessian is None:
            self.hessian = rows.new_zeros(rows.shape[0], rows.shape[2], rows.shape[2])
            self.magnitude = rows.new_zeros(rows.shape[0], rows.shape[2])
            self.difference = None if unquantized is None else torch.zeros_like(self.hessian)
        self.hessian.baddbmm_(rows.mT, rows)
        self.magnitude += rows.abs().sum(1)
        if unquantized is not None:
            self.difference.baddbmm_((input_rows(layer, unquantized) - rows).mT, rows)
        self.count += rows.shape[1]

    def finish(self, name: str) -> Moments:
        """Turn sums into means.

        Raises:
            CalibrationError: no input at all, NaN or infinity, or nothing but one input again and again.
        """
        if not self.count:
            raise CalibrationError(
                f"no calibration batch reached {name!r}: give batches that run it, or skip it by a rule"
            )
        for sums in (self.hessian, self.magnitude, self.difference):
            if sums is not None:
                sums /= self.count
        # A difference that is finite where the inputs are can only come from a broken unquantized model.
        if not all(sums is None or sums.isfinite().all() for sums in (self.hessian, self.difference)):
            raise CalibrationError(f"{name!r} saw NaN or infinity in calibration: check the data and the model")
        if self.hessian.shape[-1] > 1 and _is_one_direction(self.hessian):
            raise CalibrationError(
                f"all {self.count} calibration inputs of {name!r} are multiples of one vector: give varied data"
            )
        return self

    def require_rows(self, name: str) -> None:
        """Raise CalibrationError where there were fewer rows than a row is long: the Hessian is then singular."""
        inputs = self.hessian.shape[-1]
        if self.count < inputs:
            raise CalibrationError(
                f"{self.count} calibration rows reached {name!r}, which has {inputs} inputs: give at least "
                f"{inputs}, better several times as many (callbacks.calibration.batches, or longer batches)"
            )


def _is_one_direction(hessian: Tensor) -> bool:
    """Whether correlations of inputs that are not always 0 are all 1 or -1, to float32's precision of them."""
    for moments in hessian:
        live = moments.diagonal() > 0
        if live.sum() < 2:
            continue
        scale = moments.diagonal()[live].rsqrt()
        if (moments[live][:, live] * scale[:, None] * scale).abs().amin() < 1 - 1e-5:
            return False
    return True
