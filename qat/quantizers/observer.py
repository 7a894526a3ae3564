"""What calibration remembers of an activation's batches, for its quantizer to start from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ranks import max_over_ranks_, sum_over_ranks_
from ..spec import QuantSpec
from .least_error import best_step_size, squared_errors

SAMPLE = 2**16  # values that a batch leaves for the search of the least error


class ActivationStatistics:
    """Running sums over calibration batches: (sum of magnitudes, count), and the extremes, in float64.

    Args:
        device: where the batches are.
        keep_sample: also keep some values of each batch, evenly spaced.
    """

    def __init__(self, device: torch.device, keep_sample: bool = False) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.extremes = torch.zeros(2, dtype=torch.float64, device=device)  # of -x and x; 0 is always representable
        self.keep_sample, self.sample = keep_sample, [torch.zeros(0, dtype=torch.float32, device=device)]

    def update(self, x: Tensor) -> None:
        """Add a batch; an empty one, such as an expert that got no token, counts nothing."""
        if not x.numel():
            return
        x = x.detach()
        self.sums += torch.stack([x.abs().sum(dtype=torch.float64), self.sums.new_tensor(x.numel())])
        self.extremes = self.extremes.maximum(torch.stack([-x.min().double(), x.max().double()]))
        if self.keep_sample:
            self.sample.append(x.flatten()[:: -(-x.numel() // SAMPLE)].float())

    def all_reduce(self) -> None:
        """Combine sums and extremes with the other ranks, if there are any; samples stay."""
        sum_over_ranks_(self.sums)
        max_over_ranks_(self.extremes)

    def sampled(self) -> Tensor:
        """Return the samples of this rank, float32."""
        return torch.cat(self.sample)

    def least_error_step_size(self, largest: Tensor, spec: QuantSpec) -> Tensor:
        """Return the step size (1, 1) of least squared error over the samples of all ranks."""
        largest = largest.to(self.sums.device, torch.float32).reshape(1, 1)
        return best_step_size(sum_over_ranks_(squared_errors(self.sampled(), largest, spec)), largest)
