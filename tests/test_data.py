"""The order of batches and their augmentations depend on (seed, epoch) alone."""

import io
import sys
import types
import zlib

import pytest
import torch

from qat.errors import DataError
from qat.training.image_data import ImageData, ImageExamples
from qat.training.image_sources import Images, read_parquet, split
from qat.training.loader import EpochSampler, Loader
from qat.training.text_data import TextData, TokenWindows, tokenize

DIGITS = {"source": "digits", "mean": [0.3], "std": [0.4], "batch_size": 50, "crop_padding": 1, "flip": True}


def numbered(count: int, size: int = 4) -> Images:
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, size, size)
    return Images(pixels.contiguous(), torch.arange(count))


def batches(loader: Loader, epoch: int) -> list:
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)
    )


def test_order_depends_on_seed_and_epoch_alone():
    def loader(seed: int) -> Loader:
        return ImageData(**DIGITS, seed=seed).train_loader("cpu")

    first = batches(loader(0), 3)
    torch.manual_seed(123)
    again = loader(0)
    batches(again, 0)
    state = torch.get_rng_state()
    assert same(first, batches(again, 3))
    assert torch.equal(state, torch.get_rng_state())
    assert not same(first, batches(again, 4))
    assert not same(first, batches(loader(1), 3))


def test_an_epoch_holds_every_example_once_over_all_ranks():
    seen = []
    for rank in range(3):
        loader = Loader(ImageExamples(numbered(24), [0.0], [1.0]), 4, EpochSampler(24, 7, rank, 3))
        seen += [label for _, labels in batches(loader, 5) for label in labels.tolist()]
    assert sorted(seen) == list(range(24))


def test_ranks_get_the_augmentations_of_one_process():
    def by_label(ranks: int) -> dict:
        found = {}
        for rank in range(ranks):
            examples = ImageExamples(numbered(20), [0.0], [1.0], crop_padding=2, flip=True)
            loader = Loader(examples, 1, EpochSampler(20, 7, rank, ranks))
            found |= {labels.item(): pixels for pixels, labels in batches(loader, 1)}
        return found

    alone, shared = by_label(1), by_label(2)
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[label], shared[label]) for label in alone)


def test_incomplete_batches_are_dropped_in_training_only():
    examples = ImageExamples(numbered(10), [0.0], [1.0])
    assert [len(labels) for _, labels in Loader(examples, 4, EpochSampler(10, 0))] == [4, 4]
    test = Loader(examples, 4, EpochSampler(10))
    assert [len(labels) for _, labels in test] == [4, 4, 2] and len(test) == 3
    assert torch.cat([labels for _, labels in test]).tolist() == list(range(10))


@pytest.mark.parametrize("position", [0, 1, 5, 27, 28])
def test_resumes_in_mid_epoch(position):
    whole = batches(ImageData(**DIGITS).train_loader("cpu"), 2)
    loader = ImageData(**DIGITS).train_loader("cpu")
    assert len(whole) == len(loader) == 28
    loader.sampler.set_epoch(2)
    iterator = iter(loader)
    for _ in range(position):
        next(iterator)
    resumed = ImageData(**DIGITS).train_loader("cpu")
    resumed.load_state_dict(loader.state_dict())
    assert resumed.state_dict() == loader.state_dict()
    if position:
        assert same(whole[position:], batches(resumed, 2))
    assert same(batches(loader, 3), batches(resumed, 3))


def test_crops_and_flips_are_windows_of_the_padded_image():
    image = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    images = Images(image.expand(64, 1, 4, 4).contiguous(), torch.zeros(64, dtype=torch.int64))
    loader = Loader(ImageExamples(images, [0.0], [1 / 255], crop_padding=1, flip=True), 64, EpochSampler(64, 0))
    ((pixels, _),) = batches(loader, 0)
    padded = torch.nn.functional.pad(image[0, 0], (1, 1, 1, 1))
    windows = [padded[y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    windows += [window.flip(1) for window in windows]
    found = {next(i for i, window in enumerate(windows) if torch.equal(window, p[0].round().byte())) for p in pixels}
    assert len(found) > 12


def test_cutout_hides_one_square_of_training_images_only():
    images = Images(torch.full((200, 1, 8, 8), 255, dtype=torch.uint8), torch.zeros(200, dtype=torch.int64))
    examples = ImageExamples(images, [0.5], [0.5], cutout=4)
    ((pixels, _),) = batches(Loader(examples, 200, EpochSampler(200, 0)), 0)
    hidden = pixels[:, 0] == 0
    torch.testing.assert_close(pixels[:, 0], (~hidden).float())
    heights, widths = hidden.any(2).sum(1), hidden.any(1).sum(1)
    assert torch.equal(hidden.sum((1, 2)), heights * widths)  # one rectangle an image
    assert heights.max() == widths.max() == 4 and heights.min() == widths.min() == 2  # cut in half by the border
    assert len({tuple(image.flatten().tolist()) for image in hidden}) > 30
    ((plain, _),) = batches(Loader(examples, 200, EpochSampler(200)), 0)
    assert plain.min() > 0.99


@pytest.mark.parametrize("cutout", [-1, 8])
def test_cutout_that_hides_everything_is_refused(cutout):
    with pytest.raises(DataError, match=rf"data.cutout={cutout}: the images are 8 x 8, give 0 to 7"):
        ImageData(**DIGITS, cutout=cutout)


def test_pixels_are_normalised():
    images = Images(torch.tensor([[0, 255]], dtype=torch.uint8).view(1, 1, 1, 2), torch.zeros(1, dtype=torch.int64))
    ((pixels, _),) = Loader(ImageExamples(images, [0.25], [0.5]), 1, EpochSampler(1))
    torch.testing.assert_close(pixels.flatten(), torch.tensor([-0.5, 1.5]))


def test_split_is_fixed_and_stratified():
    images = Images(torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(100) % 4)
    train, test = split(images, 0.2)
    assert test.labels.bincount().tolist() == [5, 5, 5, 5] and len(train.labels) == 80
    assert sorted(torch.cat([train.pixels, test.pixels]).flatten().tolist()) == list(range(100))
    assert torch.equal(split(images, 0.2)[1].pixels, test.pixels)


def write_parquet(path, **columns) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


def png(value: int) -> dict:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet_in_the_hubs_layout(tmp_path, column):
    write_parquet(tmp_path / "a.parquet", **{column: [png(1), png(2)], "label": [3, 4]})
    write_parquet(tmp_path / "b.parquet", **{column: [png(5)], "label": [6]})
    images = read_parquet(str(tmp_path), "train")
    assert images.pixels.shape == (3, 3, 4, 4)
    assert images.pixels[:, 0, 0, 0].tolist() == [1, 2, 5] and images.labels.tolist() == [3, 4, 6]


def encoded(mode: str, kind: str = "png") -> dict:
    """A 2 x 1 picture of 255 and 0, or of pure red and blue where the mode has colours."""
    image = pytest.importorskip("PIL.Image")
    picture = image.new("RGB", (2, 1), (255, 0, 0))
    picture.putpixel((1, 0), (0, 0, 255))
    grey = image.fromarray(torch.tensor([[255, 0]], dtype=torch.uint8).numpy())
    start = grey if mode in ("L", "LA", "1") else picture
    made = {"P": lambda: start.quantize(2), "I;16": lambda: image.new(mode, (2, 1), 1000)}
    buffer = io.BytesIO()
    made.get(mode, lambda: start.convert(mode))().save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "LA", "1"])
def test_pixels_are_colours_and_no_places_in_a_palette(tmp_path, mode):
    write_parquet(tmp_path / "a.parquet", image=[encoded(mode)], label=[0])
    pixels = read_parquet(str(tmp_path), "train").pixels[0, :, 0]
    assert pixels.tolist() == ([[255, 0], [0, 0], [0, 255]] if mode in ("RGB", "P") else [[255, 0]])


def headed(width: int, length: int) -> dict:
    """A PNG's signature and header, which claims to be so wide and takes so many bytes."""
    head = b"IHDR" + (width.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0]))[:length]
    data = (
        b"\x89PNG\r\n\x1a\n" + length.to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big") + b"\0\0\0\1IDAT"
    )
    return {"bytes": data, "path": None}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": [encoded("I;16")], "label": [0]}, "has pixels of the kind I;16: give 8 bits, grey or RGB"),
        ({"image": [encoded("CMYK", "jpeg")], "label": [0]}, "has pixels of the kind CMYK"),
        (
            {"image": [png(1), {"bytes": png(2)["bytes"][:48], "path": "b.png"}], "label": [0, 0]},
            r"image 1 of .*a.parquet \(b.png\) cannot be decoded: image file is truncated",
        ),
        ({"image": [{"bytes": b"", "path": None}], "label": [0]}, "image 0 of .* cannot be decoded: it is of no kind"),
        ({"image": [headed(4, 9)], "label": [0]}, "cannot be decoded: Truncated IHDR chunk"),
        ({"image": [headed(2**16, 13)], "label": [0]}, "cannot be decoded: Image size"),
        ({"image": [png(1), encoded("L")], "label": [0, 0]}, r"differ in size or channels, .* in image 1 of .*parquet"),
        ({"image": [png(1)], "label": [None]}, "has None in its column 'label'"),
        ({"image": [png(1)], "label": ["cat"]}, "has 'cat' in its column 'label'"),
        ({"image": [png(1)], "label": [-1]}, "has -1 in its column 'label'"),
        ({"image": [png(1)], "label": [0.0]}, "has 0.0 in its column 'label'"),
        ({"image": [png(1), None], "label": [0, 0]}, "has no encoded image in some row of its column 'image'"),
        ({"image": [{"bytes": None, "path": "a.png"}], "label": [0]}, "has no encoded image in some row"),
        ({"image": ["a.png"], "label": [0]}, "has no encoded image in some row"),
        ({"image": [], "label": []}, "holds no image"),
    ],
)
def test_what_is_no_image_or_no_class_is_named(tmp_path, columns, said):
    write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(DataError, match=said):
        read_parquet(str(tmp_path), "train")


def test_missing_data_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.train=PATH"):
        ImageData("parquet", [0], [1], 4)
    with pytest.raises(DataError, match=r"data\.train=/no/such: there is nothing at"):
        ImageData("parquet", [0], [1], 4, train="/no/such", test="/no/such")
    with pytest.raises(DataError, match="no parquet file in"):
        read_parquet(str(tmp_path), "train")
    write_parquet(tmp_path / "a.parquet", pixels=[1], label=[2])
    with pytest.raises(DataError, match=r"a\.parquet has no image column 'img' or 'image': its columns are \['pixels'"):
        read_parquet(str(tmp_path), "train")
    with pytest.raises(DataError, match="did you mean 'digits'"):
        ImageData("digit", [0], [1], 4)
    with pytest.raises(DataError, match="the images have 1 channels"):
        ImageData("digits", [0, 0, 0], [1, 1, 1], 4)
    write_parquet(tmp_path / "rgb.parquet", image=[png(1)], label=[0])
    write_parquet(tmp_path / "grey.parquet", image=[encoded("L")], label=[0])
    with pytest.raises(DataError, match="the test images have 3 channels, the training images 1: make them alike"):
        ImageData("parquet", [0], [1], 1, train=str(tmp_path / "grey.parquet"), test=str(tmp_path / "rgb.parquet"))
    with pytest.raises(DataError, match=r"data\.batch_size=9000 exceeds the 1438"):
        ImageData("digits", [0], [1], 9000)
    with pytest.raises(DataError, match=r"data\.batch_size=0: give 1 or more"):
        ImageData("digits", [0], [1], 0)
    with pytest.raises(DataError, match=r"data\.eval_batch_size=-3: give 1 or more"):
        ImageData("digits", [0], [1], 4, eval_batch_size=-3)
    with pytest.raises(DataError, match="there is no text file"):
        TextData("files", 8, 2, train=str(tmp_path / "no.txt"))
    with pytest.raises(DataError, match="too few"):
        (tmp_path / "short.txt").write_text("a few words")
        TextData("files", 64, 2, train=str(tmp_path / "short.txt"))


def test_windows_are_contiguous_and_targets_are_one_step_later():
    windows = TokenWindows(torch.arange(22), seq_len=5)
    (batch,) = Loader(windows, 8, EpochSampler(len(windows)))
    inputs, targets = batch
    assert torch.equal(inputs, torch.arange(20).view(4, 5))
    assert torch.equal(targets, inputs + 1)


def test_windows_of_a_perplexity_share_no_token():
    windows = TokenWindows(torch.arange(22), seq_len=4, stride=5, limit=3)
    (batch,) = Loader(windows, 8, EpochSampler(len(windows)))
    assert batch[0].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12, 13]]
    assert torch.equal(batch[1], batch[0] + 1)
    assert [len(TokenWindows(torch.arange(n), 4, stride=5)) for n in (0, 4, 5, 9, 10)] == [0, 0, 1, 1, 2]


def test_validation_text_alone(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghijk")
    data = TextData("files", 256, 16, val=str(tmp_path / "a.txt"), val_window=4, val_windows=9)
    (batch,) = data.test_loader("cpu")
    assert [bytes(window.tolist()) for window in batch[1]] == [b"bcd", b"fgh"]
    assert data.example()["high"] == ord("k")
    with pytest.raises(DataError, match=r"no training text: give data.train"):
        data.train_loader("cpu")
    with pytest.raises(DataError, match=r"11 tokens, too few for a window of data.val_window=12"):
        TextData("files", 3, 2, val=str(tmp_path / "a.txt"), val_window=12)
    with pytest.raises(DataError, match=r"needs data.train or data.val"):
        TextData("files", 3, 2)


def test_hugging_face_data_sets(monkeypatch):
    class Rows(dict):
        column_names = property(lambda self: list(self))

    def load_dataset(name, config, split):
        if name == "no/such":
            raise ValueError("not found\nand so on")
        return Rows({"text": [f"{name} {config} {split}", "!"]} if config != "images" else {"image": []})

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = TextData("datasets", 3, 2, train=["a/b:c:train", "d:test"], val="a/b:c:validation")
    assert bytes(data.train_tokens.tolist()) == b"a/b c train\n!\nd None test\n!"
    assert bytes(data.val_tokens.tolist()) == b"a/b c validation\n!"
    for wrong, message in [("no/such:train", "cannot be loaded: not found$"), ("a", "give NAME:SPLIT"),
                           ("a:images:train", "has no column 'text', only image")]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            TextData("datasets", 3, 2, train=wrong)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        TextData("datasets", 3, 2, train="a:train")


def test_text_files_are_split_at_the_end(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 90 + "y" * 10)
    data = TextData("files", 3, 2, train=str(tmp_path / "a.txt"), val_fraction=0.1)
    assert bytes(data.train_tokens.tolist()) == b"x" * 90 and bytes(data.val_tokens.tolist()) == b"y" * 10
    assert tokenize("é", None).tolist() == list("é".encode())


def test_a_text_file_s_mark_is_no_text_and_an_empty_file_is_too_few_tokens(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"ab\r\n" * 20)  # as editors on Windows write it
    data = TextData("files", 3, 2, train=str(tmp_path / "a.txt"), val=str(tmp_path / "a.txt"))
    assert bytes(data.train_tokens.tolist()) == b"ab\n" * 20
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match="the training text has 0 tokens, too few"):
        TextData("files", 3, 2, train=str(tmp_path / "b.txt"))
    with pytest.raises(DataError, match="the validation text has 0 tokens, too few"):
        TextData("files", 3, 2, train=str(tmp_path / "a.txt"), val=str(tmp_path / "b.txt"))


def test_an_example_is_like_what_the_model_takes():
    images = ImageData(**DIGITS)
    example = images.example()
    assert example["shape"] == [1, 8, 8] and example["dtype"] == "float32" and example["low"] < example["high"]
    text = TextData("topics", 32, 4)
    assert text.example()["shape"] == [32] and text.example()["dtype"] == "int64"
