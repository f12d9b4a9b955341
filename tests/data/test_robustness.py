"""Files that are broken, strange or hostile, through worker processes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from effnet_quant.card import InputSpec
from effnet_quant.data import decoding
from effnet_quant.data.decoding import MAX_PIXELS, Box, DecodeError, EncodedImage, decode
from effnet_quant.data.folders import FolderSource
from effnet_quant.data.inspection import look
from effnet_quant.data.loaders import Loader
from effnet_quant.data.sources import EncodedSource, read_image
from effnet_quant.data.transforms import evaluation_transform, training_transform
from effnet_quant.data.workers import explained_deaths, in_workers
from effnet_quant.errors import UserError

EVALUATION = evaluation_transform(InputSpec(32, 40))


def test_every_kind_of_image_decodes_as_pillow_has_it(odd_images):
    for path in sorted((odd_images / "c").iterdir()):
        if path.name == "deep.png":
            continue  # Pillow clips it; see test_16_bit_grey_keeps_its_levels
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(read_image(path).numpy(), expected), path.name
        encoded = EncodedImage(np.fromfile(path, dtype=np.uint8))
        assert (encoded.height, encoded.width) == expected.shape[1:], path.name


def test_every_kind_of_image_goes_through_training(odd_images):
    loader = Loader(FolderSource(odd_images), training_transform(InputSpec(32, 40)), 5, shuffle=True, workers=2)
    assert [tuple(images.shape) for images, _ in loader.epoch()] == [(5, 3, 32, 32)] * 2


def checksum_of_regions(folder):
    """Of the whole images, after comparing parts of them with regions that were decoded alone."""
    checksum = 0
    for path in sorted(folder.rglob("*.jpg")):
        data = np.fromfile(path, dtype=np.uint8)
        whole = decode(data)
        checksum = zlib.crc32(whole.contiguous().numpy().data, checksum)
        for top, height in ((0, 1), (0, 40), (7, 90), (33, 64), (100, whole.shape[1] - 100)):
            region = EncodedImage(data).region(Box(top, 5, height, 60), 1000)
            assert torch.equal(region, whole[:, top : top + height, 5:65]), path
        assert np.array_equal(data, np.fromfile(path, dtype=np.uint8))
    return checksum


class _ByTorchvision(Dataset):
    """The checksum of a folder, from a worker that has no simplejpeg."""

    def __init__(self, folder):
        self._folder = folder

    def __len__(self):
        return 1

    def __getitem__(self, place):
        decoding.simplejpeg = None
        return checksum_of_regions(self._folder)


def test_rows_below_the_crop_are_not_needed_and_both_decoders_agree(photo_folder, capfd):
    (checksum,) = in_workers(_ByTorchvision(photo_folder), 1)
    assert capfd.readouterr().err == ""
    assert checksum == checksum_of_regions(photo_folder)


def _encoded(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return np.frombuffer(bytearray(file.getvalue()), dtype=np.uint8)


@pytest.mark.parametrize(
    "coding", [{"progressive": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 3, "progressive": True}]
)
def test_progressive_images_and_those_with_restarts_are_left_early_too(photo_folder, monkeypatch, coding):
    pytest.importorskip("simplejpeg")
    monkeypatch.setattr(decoding, "_decode_with_pillow", None)
    with Image.open(photo_folder / "left/0.jpg") as image:
        data = _encoded(image, quality=90, **coding)
    whole = simplejpeg_pixels(data)
    for top, height in ((0, 1), (7, 90), (100, whole.shape[1] - 100)):
        region = EncodedImage(data).region(Box(top, 5, height, 60), 1000)
        assert np.array_equal(region.numpy(), whole[:, top : top + height, 5:65])


def simplejpeg_pixels(data):
    import simplejpeg

    return simplejpeg.decode_jpeg(data, "RGB").transpose(2, 0, 1)


def with_damaged_scan(data, seed=0):
    """A JPEG with 200 of its coded pixels' bytes overwritten; none is 0xff, which would start a marker."""
    data = data.copy()
    middle = len(data) // 2
    data[middle : middle + 200] = np.random.default_rng(seed).integers(0, 255, 200)
    return data


def test_a_damaged_scan_is_told_from_one_with_padding(photo_folder, tmp_path):
    pytest.importorskip("simplejpeg")
    photos = [path for path in sorted(photo_folder.rglob("*.jpg")) if path.name != "3.jpg"]  # those are progressive
    refused = 0
    for path in photos:
        damaged = with_damaged_scan(np.fromfile(path, dtype=np.uint8))
        Image.open(io.BytesIO(damaged.tobytes())).load()  # Pillow shows what there is
        try:
            decode(damaged)
        except DecodeError:
            refused += 1
    assert refused >= len(photos) * 2 // 3  # in some the decoder finds its way back by chance, and no one can tell
    data = np.fromfile(photos[0], dtype=np.uint8)
    padded = np.concatenate([data[:-2], np.zeros(40, dtype=np.uint8), data[-2:]])
    assert torch.equal(decode(padded), decode(data))


XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("progressive", [False, True])
def test_orientation_in_adobes_metadata_is_applied(photo_folder, progressive):
    with Image.open(photo_folder / "left/0.jpg") as image:
        data = _encoded(image, progressive=progressive, xmp=XMP.encode())
    with Image.open(io.BytesIO(data.tobytes())) as stored:
        expected = np.rot90(np.asarray(stored), -1).transpose(2, 0, 1)  # TIFF 6.0: row 0 is the right-hand side
    encoded = EncodedImage(data)
    assert (encoded.height, encoded.width) == expected.shape[1:]
    assert np.array_equal(encoded.region(Box(0, 3, 70, 50), 1000).numpy(), expected[:, :70, 3:53])


@pytest.mark.parametrize(("size", "shrink"), [(20, 8), (50, 4), (99, 2), (100, 2), (101, 1)])
def test_reduced_scale_shows_the_same_region(tmp_path, size, shrink):
    y, x = np.mgrid[0:400, 0:400]
    pixels = np.stack([x // 2, y // 2, (x + y) // 4], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "ramp.jpg", quality=95)
    image = EncodedImage(np.fromfile(tmp_path / "ramp.jpg", dtype=np.uint8))
    region = image.region(Box(96, 160, 200, 208), size)
    assert region.shape == (3, 200 // shrink, 208 // shrink)
    expected = pixels[96:296, 160:368].reshape(200 // shrink, shrink, 208 // shrink, shrink, 3).mean((1, 3))
    assert np.abs(region.permute(1, 2, 0).numpy() - expected).mean() < 1


@pytest.fixture
def spoiled(photo_folder, tmp_path):
    """Eight files: 0, 1, 3 and 7 are photos."""
    photos = sorted(photo_folder.rglob("*.jpg"))
    (tmp_path / "c").mkdir()
    for number in range(8):
        data = photos[number].read_bytes()
        data = {2: data[: len(data) // 2], 4: b"", 5: b"\xff\xd8\xff\xe0text", 6: data[:40]}.get(number, data)
        (tmp_path / "c" / f"{number}.jpg").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_left_out_of_evaluation_and_told_once(spoiled, capfd, workers):
    loader = Loader(FolderSource(spoiled), EVALUATION, 3, workers=workers, max_bad_images=4)
    for _ in range(2):
        assert [len(images) for images, _ in loader.epoch()] == [2, 1, 1]
    assert sorted(loader.bad_images.sentences) == [2, 4, 5, 6]
    told = capfd.readouterr().err
    assert all(told.count(f"/c/{number}.jpg is not an image or is damaged") == 1 for number in (2, 4, 5, 6))
    assert "the file is empty" in told


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_replaced_in_training(spoiled, workers):
    transform = training_transform(InputSpec(32, 40))
    loader = Loader(FolderSource(spoiled), transform, 8, shuffle=True, workers=workers, max_bad_images=4)
    ((images, labels),) = loader.epoch()
    assert (len(images), len(labels)) == (8, 8)
    assert torch.equal(images[0], images[4])


def test_too_many_broken_images_end_the_epoch(spoiled):
    with pytest.raises(UserError, match="one more than --max-bad-images 3"):
        list(Loader(FolderSource(spoiled), EVALUATION, 3, workers=1, max_bad_images=3).epoch())


def test_decompression_bomb_is_refused(tmp_path):
    side = 20_000
    assert side * side > MAX_PIXELS
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match=r"bomb\.png is not an image or is damaged .*pixels"):
        read_image(tmp_path / "bomb.png")
    header = bytearray(_small_jpeg(tmp_path))
    frame = header.index(b"\xff\xc0") + 5
    header[frame : frame + 4] = b"\xff\xff\xff\xff"  # 65535 x 65535, says the header
    (tmp_path / "bomb.jpg").write_bytes(header)
    with pytest.raises(UserError, match=r"bomb\.jpg .*65535 x 65535 pixels are more than"):
        read_image(tmp_path / "bomb.jpg")


def _small_jpeg(folder):
    Image.new("RGB", (16, 16)).save(folder / "small.jpg")
    return (folder / "small.jpg").read_bytes()


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1), (20_000, 300)])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_tiny_images_and_strips(tmp_path, shape, kind):
    path = tmp_path / f"strip.{kind}"
    Image.new("RGB", shape, (9, 80, 200)).save(path)
    for transform in (EVALUATION, training_transform(InputSpec(32, 40))):
        image = transform(EncodedImage(np.fromfile(path, dtype=np.uint8)))
        assert image.shape == (3, 32, 32)
        assert (image - torch.tensor([9.0, 80, 200])[:, None, None]).abs().max() <= 3


def test_link_loops_and_unreadable_files_are_reported(photo_folder, tmp_path, capfd):
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes((photo_folder / "left/0.jpg").read_bytes())
    (folder / "again").symlink_to(folder)
    (folder / "elsewhere").symlink_to(photo_folder / "right")
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    source = FolderSource(tmp_path)
    assert "again is a link to a folder that holds it" in capfd.readouterr().err
    assert len(source) == 1 + 8 + 1
    loader = Loader(source, EVALUATION, 4, workers=1, max_bad_images=1)
    assert sum(len(images) for images, _ in loader.epoch()) == 9
    assert "self.jpg can't be read" in capfd.readouterr().err


def test_links_among_the_classes_and_pipes_are_left_out(photo_folder, tmp_path, capfd):
    (tmp_path / "c").mkdir()
    (tmp_path / "c/photo.jpg").write_bytes((photo_folder / "left/0.jpg").read_bytes())
    os.mkfifo(tmp_path / "c/pipe.jpg")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "c/up").symlink_to(tmp_path)
    (tmp_path / "d").symlink_to(photo_folder / "right")
    source = FolderSource(tmp_path)
    assert source.classes == ["c", "d"]
    assert len(source) == 1 + 8
    told = capfd.readouterr().err
    for sentence in (
        "/self can't be read",
        "/again is a link to a folder that",
        "/up is a link to",
        "pipe.jpg is no reg",
    ):
        assert told.count(sentence) == 1


class Deadly(EncodedSource):
    """A source whose third image ends the process that reads it, as a crash of a decoder would."""

    def __init__(self, folder):
        self._folder = FolderSource(folder)
        self.classes, self.labels = self._folder.classes, self._folder.labels

    def name(self, index):
        return self._folder.name(index)

    def load(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._folder.load(index)


DEATH = r"a data worker died while it was reading .*/left/2\.jpg"


def test_a_worker_that_dies_says_which_file_it_was_at(photo_folder):
    loader = Loader(Deadly(photo_folder), EVALUATION, 2, workers=2)
    with pytest.raises(UserError, match=DEATH):
        list(loader.epoch())
    with pytest.raises(UserError, match=DEATH):
        list(look(Deadly(photo_folder), decode=True, workers=1))


def test_so_does_one_that_dies_while_the_main_process_computes(photo_folder):
    batches = Loader(Deadly(photo_folder), EVALUATION, 1, workers=1, prefetch=3).epoch()
    with pytest.raises(UserError, match=DEATH), explained_deaths():
        next(batches)
        for _ in range(200):  # the worker dies in the middle of this
            time.sleep(0.1)


def test_errors_of_the_program_itself_stay_as_they_are(photo_folder):
    with pytest.raises(RuntimeError, match="mine"), explained_deaths():
        raise RuntimeError("mine")

    def failing(image):
        raise ValueError("a mistake in a transform")

    with pytest.raises(RuntimeError, match=r"left/0\.jpg can't be transformed: ValueError\('a mistake"):
        next(Loader(FolderSource(photo_folder), failing, 1).epoch())


def test_too_little_memory_for_an_image_leaves_it_out(photo_folder, capfd):
    def hungry(image):
        if image.height * image.width > 60_000:
            raise MemoryError
        return EVALUATION(image)

    loader = Loader(FolderSource(photo_folder), hungry, 4, workers=1, max_bad_images=16)
    sizes = [Image.open(path).size for path in photo_folder.rglob("*.jpg")]
    small = sum(width * height <= 60_000 for width, height in sizes)
    assert 0 < small < 16
    assert sum(len(images) for images, _ in loader.epoch()) == small
    assert "can't be read (there is not enough memory for it)" in capfd.readouterr().err


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_batch_without_readable_images_takes_the_next_one(spoiled, batch_size):
    transform = training_transform(InputSpec(32, 40))
    source = FolderSource(spoiled)
    loader = Loader(source, transform, batch_size, shuffle=True, workers=1, max_bad_images=4)
    for epoch in range(3):
        assert [len(images) for images, _ in loader.epoch(epoch)] == [batch_size] * (8 // batch_size)
    assert sorted(loader.bad_images.sentences) == [2, 4, 5, 6]


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="no known range"):
        read_image(tmp_path / "float.tif")


def test_bytes_of_any_kind_never_crash_the_decoder(photo_folder):
    data = np.fromfile(photo_folder / "left/1.jpg", dtype=np.uint8)
    generator = np.random.default_rng(0)
    for _ in range(60):
        broken = data.copy()
        places = generator.integers(2, min(len(data), 700), 6)
        broken[places] = generator.integers(0, 256, 6)
        with contextlib.suppress(DecodeError):
            assert decode(broken).dtype == torch.uint8
