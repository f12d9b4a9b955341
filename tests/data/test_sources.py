"""Folders, digits, and what files decode to."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from effnet_quant.data.arrays import DigitsSource, SyntheticSource
from effnet_quant.data.data_argument import open_sources
from effnet_quant.data.data_argument import open_validation as open_val
from effnet_quant.data.folders import FolderSource
from effnet_quant.data.sources import read_image
from effnet_quant.errors import UserError

COLOURS = np.random.default_rng(7).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def save_solid(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 3), (value,) * 3).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two splits whose images are grey levels that say which file they are."""
    for value, name in enumerate(["b/2.png", "b/10.png", "a/x/deep.PNG", "a/1.png", "c/z.bmp"]):
        save_solid(tmp_path / "train" / name, 10 * value)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    save_solid(tmp_path / "val/c/0.png", 77)
    return tmp_path


def test_folder_is_sorted_by_class_and_path_and_other_files_are_ignored(folder):
    source = FolderSource(folder / "train")
    assert source.classes == ["a", "b", "c"]
    assert source.labels.tolist() == [0, 0, 1, 1, 2]
    assert source.labels.dtype == torch.int64
    # a/1.png, a/x/deep.PNG, b/10.png, b/2.png, c/z.bmp
    assert [source.read(index)[0, 0, 0].item() for index in range(len(source))] == [30, 20, 10, 0, 40]


def test_labels_of_val_refer_to_the_classes_of_train(folder):
    train, val = open_sources(str(folder))
    assert val.classes == train.classes == ["a", "b", "c"]
    assert val.labels.tolist() == [2]
    assert open_val(str(folder)).labels.tolist() == [2]


def test_validation_alone_needs_no_train(folder):
    save_solid(folder / "only/val/dog/0.png", 5)
    source = open_val(str(folder / "only"))
    assert (source.classes, source.labels.tolist()) == (["dog"], [0])


def test_class_that_train_lacks_is_named(folder):
    save_solid(folder / "val/zebra/0.png", 1)
    with pytest.raises(UserError, match="zebra"):
        open_sources(str(folder))


def test_missing_split_is_named(folder):
    with pytest.raises(UserError, match=r"no folder .*nothing"):
        FolderSource(folder / "nothing")


def test_digits_have_fixed_splits_that_cover_all_images_once():
    train, val = DigitsSource("train"), DigitsSource("val")
    assert (len(train), len(val)) == (1437, 360)
    digits = load_digits()
    everything = np.rint(digits.images * 255 / 16).astype(np.uint8).reshape(1797, -1)
    read = np.stack([source.read(index)[0].numpy().ravel() for source in (train, val) for index in range(len(source))])
    labels = np.concatenate([train.labels.numpy(), val.labels.numpy()])
    expected = sorted((label, row.tobytes()) for label, row in zip(digits.target.tolist(), everything, strict=True))
    assert sorted((label, row.tobytes()) for label, row in zip(labels.tolist(), read, strict=True)) == expected


def test_digits_are_the_same_each_time():
    first, second = DigitsSource("val"), DigitsSource("val")
    # as recorded with numpy 2 when the demo's figures were made: another split would give other figures
    assert first.labels[:12].tolist() == second.labels[:12].tolist() == [0, 8, 8, 9, 8, 3, 7, 5, 0, 6, 6, 3]
    assert all(torch.equal(first.read(index), second.read(index)) for index in range(len(first)))


def test_digits_are_three_equal_channels_of_8_by_8():
    image = DigitsSource("train").read(0)
    assert (image.shape, image.dtype) == ((3, 8, 8), torch.uint8)
    assert torch.equal(image[0], image[2])
    assert image.max() == 255


def test_synthetic_images_have_the_final_size_and_all_classes():
    source = SyntheticSource(1000, 7, 16)
    assert len(source) == 1000
    assert source.read(999).shape == (3, 16, 16)
    assert set(source.labels.tolist()) == set(range(7)) == set(map(int, source.classes))


# The EXIF standard (CIPA DC-008, tag 0x0112): what to do to the stored rows to see the picture upright.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(tmp_path / "turned.png", exif=exif)
    expected = UPRIGHT[orientation](COLOURS).transpose(2, 0, 1)
    assert np.array_equal(read_image(tmp_path / "turned.png").numpy(), expected)


def test_greyscale_becomes_three_equal_channels(tmp_path):
    Image.fromarray(COLOURS[..., 0]).save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png")
    assert image.dtype == torch.uint8
    assert np.array_equal(image.numpy(), np.stack([COLOURS[..., 0]] * 3))


def test_alpha_is_dropped(tmp_path):
    alpha = np.full((4, 6, 1), 90, dtype=np.uint8)
    Image.fromarray(np.concatenate([COLOURS, alpha], axis=2)).save(tmp_path / "alpha.png")
    assert np.array_equal(read_image(tmp_path / "alpha.png").numpy(), COLOURS.transpose(2, 0, 1))


def test_grey_with_alpha_drops_the_alpha(tmp_path):
    Image.fromarray(COLOURS[..., :2], "LA").save(tmp_path / "la.png")
    assert np.array_equal(read_image(tmp_path / "la.png").numpy(), np.stack([COLOURS[..., 0]] * 3))


def test_palette_is_looked_up(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 1, 2, 3])
    image.save(tmp_path / "palette.png")
    expected = np.array([[[255, 0, 0], [0, 255, 0]], [[1, 2, 3], [0, 255, 0]]], dtype=np.uint8)
    assert np.array_equal(read_image(tmp_path / "palette.png").numpy(), expected.transpose(2, 0, 1))


def test_black_and_white_becomes_0_and_255(tmp_path):
    Image.fromarray(COLOURS[..., 0] > 127).save(tmp_path / "bilevel.png")
    assert np.array_equal(read_image(tmp_path / "bilevel.png")[1].numpy(), np.where(COLOURS[..., 0] > 127, 255, 0))


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_16_bit_grey_keeps_its_levels(tmp_path, kind):
    deep = np.arange(0, 65536, 4369, dtype=np.uint16).reshape(4, 4)  # 0x0000, 0x1111 … 0xffff
    Image.fromarray(deep).save(tmp_path / f"deep.{kind}")
    difference = read_image(tmp_path / f"deep.{kind}")[0].numpy().astype(int) - deep // 257
    assert np.abs(difference).max() <= 1


def test_jpeg_is_close_to_what_was_saved(tmp_path):
    smooth = np.broadcast_to(np.arange(0, 64, dtype=np.uint8)[:, None, None] * 3, (64, 48, 3))
    Image.fromarray(np.ascontiguousarray(smooth)).save(tmp_path / "photo.jpeg", quality=95)
    image = read_image(tmp_path / "photo.jpeg").numpy().astype(int)
    assert image.shape == (3, 64, 48)
    assert np.abs(image - smooth.transpose(2, 0, 1)).max() <= 4


@pytest.mark.parametrize("kind", ["text", "empty", "truncated jpeg", "truncated png"])
def test_damaged_image_is_named(tmp_path, kind):
    path = tmp_path / "broken.jpg"
    if kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.touch()
    else:
        whole = tmp_path / f"whole.{kind[-3:] if kind.endswith('png') else 'jpg'}"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(UserError, match=r"broken\.jpg is not an image or is damaged"):
        read_image(path)


def test_missing_image_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*nowhere\.png"):
        read_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_cifar_is_read_from_its_authors_files(tmp_path, monkeypatch, name, folder):
    dataset = getattr(datasets, name.upper())
    generator = np.random.default_rng(0)
    (tmp_path / folder).mkdir()

    def write(file, content):
        data = pickle.dumps(content)
        (tmp_path / folder / file).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    key = "labels" if name == "cifar10" else "fine_labels"
    pixels = {}
    for attribute in ("train_list", "test_list"):
        files = []
        for file, _ in getattr(dataset, attribute):
            pixels[file] = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
            files.append([file, write(file, {"data": pixels[file], key: [3, 1, 0, 3]})])
        monkeypatch.setattr(dataset, attribute, files)
    names = dataset.meta["key"]
    md5 = write(dataset.meta["filename"], {names: ["ant", "bee", "cat", "dog"]})
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5})

    train, val = open_sources(str(tmp_path))
    assert train.classes == val.classes == ["ant", "bee", "cat", "dog"]
    assert (len(train), len(val)) == (4 * len(dataset.train_list), 4)
    assert train.labels[:4].tolist() == [3, 1, 0, 3]
    last = pixels[dataset.test_list[0][0]]
    assert np.array_equal(val.read(2).numpy(), last[2].reshape(3, 32, 32))  # rows of red, then green, then blue
