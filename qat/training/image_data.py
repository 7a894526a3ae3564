"""Images as a Lightning data module: uint8 on the training device, augmented and normalised there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from .image_sources import Images, load_images
from .in_memory_data import InMemoryData
from .loader import EpochSampler, Gather, Loader


class ImageExamples:
    """Batches of (normalised images (B, C, H, W) float32, labels (B,)).

    Args:
        images: all of them.
        mean, std: per channel, of pixels scaled to [0, 1].
        crop_padding: augmentation crops a window of the original size from an image padded by so many black pixels.
        flip: augmentation mirrors half of the images.
        cutout: augmentation sets a square of so many pixels a side to the mean (arXiv:1708.04552); 0 for none.
        device: where the data are kept and batches made.
    """

    def __init__(
        self,
        images: Images,
        mean: Sequence[float],
        std: Sequence[float],
        crop_padding: int = 0,
        flip: bool = False,
        cutout: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.size, self.padding, self.flip = images.pixels.shape[-2:], crop_padding, flip
        self.cutout = cutout
        self.pixels = F.pad(images.pixels.to(device), (crop_padding,) * 4)
        self.labels = images.labels.to(device)
        mean, std = (torch.tensor(list(values), device=device).view(1, -1, 1, 1) for values in (mean, std))
        self.scale, self.shift = 1 / (255 * std), -mean / std
        self.channels = torch.arange(images.pixels.shape[1], device=device).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def epoch(self, order: Tensor, generator: torch.Generator | None) -> Gather:
        """Draw the augmentations of a whole epoch at once, and return what gathers a slice of it."""
        rows, columns = (part.to(self.labels.device) for part in self._windows(order, generator))
        hidden = None
        if self.cutout and generator is not None:
            hidden = [part.to(self.labels.device) for part in self._squares(order, generator)]
        order = order.to(self.labels.device)

        def gather(batch: slice) -> tuple[Tensor, Tensor]:
            index = order[batch]
            pixels = self.pixels[
                index.view(-1, 1, 1, 1), self.channels, rows[batch, None, :, None], columns[batch, None, None, :]
            ]
            normalised = torch.addcmul(self.shift, pixels.float(), self.scale)
            if hidden is not None:
                normalised.masked_fill_(hidden[0][batch, None, :, None] & hidden[1][batch, None, None, :], 0)
            return normalised, self.labels[index]

        return gather

    def _windows(self, order: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the pixel rows (N, H) and columns (N, W) that each image of the epoch is read from."""
        height, width = self.size
        top = left = torch.full((len(order), 1), self.padding)
        mirrored = torch.zeros(len(order), 1, dtype=torch.bool)
        if generator is not None:  # drawn for all images, so that no rank's share changes another's
            draws = torch.randint(0, 2 * self.padding + 1, (2, len(self)), generator=generator)
            top, left = draws[0, order][:, None], draws[1, order][:, None]
            if self.flip:
                mirrored = torch.rand(len(self), generator=generator)[order][:, None] < 0.5
        columns = torch.arange(width)
        return top + torch.arange(height), left + torch.where(mirrored, columns.flip(0), columns)

    def _squares(self, order: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Return which rows (N, H) and columns (N, W) of each image lie in its square, which may overlap the border."""
        hidden = []
        for length in self.size:
            first = torch.randint(0, length, (len(self),), generator=generator)[order][:, None] - self.cutout // 2
            position = torch.arange(length)
            hidden.append((first <= position) & (position < first + self.cutout))
        return hidden


class ImageData(InMemoryData):
    """Training and test images.

    Args:
        source: "mnist5k", "digits" or "parquet".
        train, test: for "parquet": a file, or a folder of files.
        batch_size: of a training step, on each device.
        eval_batch_size: of a test step.
        mean, std: per channel, of pixels scaled to [0, 1].
        crop_padding, flip, cutout: augmentations of the training images, as in ImageExamples; 0 and False for none.
        seed: of the order and the augmentations.

    Raises:
        DataError: see ``load_images``; mean and std, or test images, that do not fit the channels; a negative
            crop_padding; a cutout that leaves nothing; fewer images than one batch.
    """

    def __init__(
        self,
        source: str,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        eval_batch_size: int = 500,
        crop_padding: int = 0,
        flip: bool = False,
        cutout: int = 0,
        train: str | None = None,
        test: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        self.mean, self.std, self.crop_padding, self.flip, self.cutout = mean, std, crop_padding, flip, cutout
        self.train_images, self.test_images = load_images(source, train, test)
        channels, *size = self.train_images.pixels.shape[1:]
        if not len(mean) == len(std) == channels:
            raise DataError(f"the images have {channels} channels: data.mean and data.std need as many numbers")
        if (found := self.test_images.pixels.shape[1]) != channels:
            raise DataError(f"the test images have {found} channels, the training images {channels}: make them alike")
        if min(std) <= 0:
            raise DataError(f"data.std={list(std)}: give positive numbers, the spread of pixels from 0 to 1")
        if crop_padding < 0:
            raise DataError(f"data.crop_padding={crop_padding}: give 0 or more")
        if not 0 <= cutout < min(size):
            raise DataError(f"data.cutout={cutout}: the images are {size[0]} x {size[1]}, give 0 to {min(size) - 1}")
        if batch_size > len(self.train_images.labels):
            raise DataError(f"data.batch_size={batch_size} exceeds the {len(self.train_images.labels)} training images")

    def example(self) -> dict:
        """Return shape (without batch), dtype and range of what the model takes."""
        pixels, _ = next(iter(self.test_loader("cpu")))
        return {
            "shape": list(pixels.shape[1:]),
            "dtype": "float32",
            "low": pixels.min().item(),
            "high": pixels.max().item(),
        }

    def train_loader(self, device: torch.device | str, rank: int = 0, world_size: int = 1) -> Loader:
        """Return shuffled and augmented batches on a device."""
        augmentations = (self.crop_padding, self.flip, self.cutout)
        examples = ImageExamples(self.train_images, self.mean, self.std, *augmentations, device)
        return Loader(examples, self.batch_size, EpochSampler(len(examples), self.seed, rank, world_size))

    def test_loader(self, device: torch.device | str) -> Loader:
        """Return the test batches on a device, in order."""
        examples = ImageExamples(self.test_images, self.mean, self.std, device=device)
        return Loader(examples, self.eval_batch_size, EpochSampler(len(examples)))
