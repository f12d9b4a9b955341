"""DALI's CPU backend against the PyTorch backend, on real JPEGs and on broken files."""

from __future__ import annotations

import json
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_quant.card import InputSpec
from effnet_quant.data.arrays import DigitsSource
from effnet_quant.data.choices import AUGMENTATIONS
from effnet_quant.data.dali import DaliLoader
from effnet_quant.data.folders import FolderSource
from effnet_quant.data.loaders import Loader
from effnet_quant.data.transforms import evaluation_transform, training_transform
from effnet_quant.errors import UserError

pytest.importorskip("nvidia.dali", reason="needs the extra 'dali'")

CPU = torch.device("cpu")


def difference(first, second):
    """Mean absolute difference of two lists of batches, in levels of 255."""
    totals = [(a.int() - b.int()).abs().float().mean().item() for (a, _), (b, _) in zip(first, second, strict=True)]
    return sum(totals) / len(totals)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_agrees_with_the_pytorch_backend(photo_folder, interpolation):
    source = FolderSource(photo_folder)
    transform = evaluation_transform(InputSpec(96, 128, interpolation))
    ours = list(DaliLoader(source, transform, 4, CPU).epoch())
    reference = list(Loader(source, transform, 4).epoch())
    assert [labels.tolist() for _, labels in ours] == [labels.tolist() for _, labels in reference]
    assert all(images.dtype == torch.uint8 and images.shape[1:] == (3, 96, 96) for images, _ in ours)
    assert difference(ours, reference) <= 1.5


SAMPLES = Path(__file__).resolve().parents[3] / "shared/data/imagenet-samples.tar"


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLES.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("make", [evaluation_transform, training_transform])
def test_photographs_agree_with_the_pytorch_backend(tmp_path, make):
    with tarfile.open(SAMPLES) as archive:
        archive.extractall(tmp_path, filter="data")
    source = FolderSource(tmp_path / "val")
    options = {"shuffle": make is training_transform, "seed": 2}
    ours = list(DaliLoader(source, make(InputSpec(224, 256)), 50, CPU, **options).epoch())
    reference = list(Loader(source, make(InputSpec(224, 256)), 50, **options).epoch())
    assert difference(ours, reference) <= 1.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", [evaluation_transform, training_transform])
def test_the_gpus_images_agree_with_the_pytorch_backend(photo_folder, make):
    source = FolderSource(photo_folder)
    ours = list(DaliLoader(source, make(InputSpec(96, 128)), 4, torch.device("cuda", 0)).epoch())
    assert all(images.is_cuda for images, _ in ours)
    on_cpu = [(images.cpu(), labels) for images, labels in ours]
    assert difference(on_cpu, list(Loader(source, make(InputSpec(96, 128)), 4).epoch())) <= 1.5


def test_training_agrees_with_the_pytorch_backend(photo_folder):
    source = FolderSource(photo_folder)
    transform = training_transform(InputSpec(96, 128))
    ours, reference = (
        DaliLoader(source, transform, 4, CPU, shuffle=True, seed=3),
        Loader(source, transform, 4, shuffle=True, seed=3),
    )
    for epoch in (0, 1):
        first, second = list(ours.epoch(epoch)), list(reference.epoch(epoch))
        assert [labels.tolist() for _, labels in first] == [labels.tolist() for _, labels in second]
        assert difference(first, second) <= 1.5


def test_an_epoch_can_be_left_and_can_start_at_any_batch(photo_folder):
    loader = DaliLoader(FolderSource(photo_folder), training_transform(InputSpec(32, 32)), 2, CPU, shuffle=True)
    whole = list(loader.epoch(5))
    next(loader.epoch(2))
    rest = list(loader.epoch(5, 2))
    assert len(rest) == len(whole) - 2
    for (images, labels), (images_of_whole, labels_of_whole) in zip(rest, whole[2:], strict=True):
        assert torch.equal(images, images_of_whole)
        assert torch.equal(labels, labels_of_whole)


@pytest.mark.parametrize(("batch_size", "shuffle"), [(100, False), (360, True)])
def test_every_epoch_has_its_batches_when_they_are_counted(batch_size, shuffle):
    source = DigitsSource("val")  # 360 images
    loader = DaliLoader(source, evaluation_transform(InputSpec(8, 8)), batch_size, CPU, shuffle=shuffle)
    for epoch in range(4):  # the trainer takes so many, and never asks for the end
        batches = list(islice(loader.epoch(epoch), len(loader)))
        reference = list(
            Loader(source, evaluation_transform(InputSpec(8, 8)), batch_size, shuffle=shuffle).epoch(epoch)
        )
        assert [labels.tolist() for _, labels in batches] == [labels.tolist() for _, labels in reference]
        assert difference(batches, reference) == 0


@pytest.mark.parametrize(
    "augmentation",
    [pytest.param(name, marks=[] if name == "randaugment" else pytest.mark.slow) for name in AUGMENTATIONS],
)
def test_policies_change_images_and_keep_their_form(photo_folder, augmentation):
    source = FolderSource(photo_folder)
    plain, augmented = (
        next(DaliLoader(source, training_transform(InputSpec(48, 48), name), 8, CPU, shuffle=True).epoch())
        for name in (None, augmentation)
    )
    assert (augmented[0].shape, augmented[0].dtype) == (plain[0].shape, torch.uint8)
    assert torch.equal(plain[1], augmented[1])
    assert difference([plain], [augmented]) > 2


def test_arrays_go_through_unchanged():
    source = DigitsSource("val")
    ours = list(DaliLoader(source, evaluation_transform(InputSpec(8, 8)), 100, CPU).epoch())
    assert [len(labels) for _, labels in ours] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([images for images, _ in ours]), torch.stack([source.read(i) for i in range(360)]))


def test_kinds_that_dali_reads_otherwise_agree_too(odd_images):
    source = FolderSource(odd_images)
    transform = evaluation_transform(InputSpec(32, 40))
    ours = list(DaliLoader(source, transform, 4, CPU).epoch())
    assert difference(ours, list(Loader(source, transform, 4).epoch())) <= 1.5


@pytest.fixture
def spoiled(photo_folder, tmp_path):
    """Eight photos, of which one is cut in half, one empty, and one of another kind of file."""
    photos = sorted(photo_folder.rglob("*.jpg"))[:8]
    (tmp_path / "c").mkdir()
    for number, photo in enumerate(photos):
        data = photo.read_bytes()
        (tmp_path / "c" / f"{number}.jpg").write_bytes(
            {2: data[: len(data) // 2], 4: b"", 5: b"text"}.get(number, data)
        )
    return tmp_path


def test_broken_images_are_left_out_of_evaluation(spoiled, capfd):
    source = FolderSource(spoiled)
    loader = DaliLoader(source, evaluation_transform(InputSpec(32, 40)), 4, CPU, max_bad_images=3)
    for _ in range(2):
        assert [len(images) for images, _ in loader.epoch()] == [3, 2]
    assert sorted(loader.bad_images.sentences) == [2, 4, 5]
    assert "2.jpg is not an image or is damaged" in capfd.readouterr().err


def test_broken_images_are_replaced_in_training(spoiled):
    source = FolderSource(spoiled)
    loader = DaliLoader(source, training_transform(InputSpec(32, 40)), 8, CPU, shuffle=True, max_bad_images=3)
    assert [len(images) for images, _ in loader.epoch()] == [8]


def test_a_batch_without_readable_images_repeats_the_last_one(spoiled):
    source = FolderSource(spoiled)
    loader = DaliLoader(source, training_transform(InputSpec(32, 40)), 1, CPU, shuffle=True, max_bad_images=3)
    first = next(epoch for epoch in range(99) if loader.names(epoch, 0)[0].endswith(("0.jpg", "1.jpg", "3.jpg")))
    assert [len(images) for images, _ in loader.epoch(first)] == [1] * 8
    assert sorted(loader.bad_images.sentences) == [2, 4, 5]


def test_what_dali_refuses_and_we_read_is_handed_over_as_pixels_once(photo_folder):
    loader = DaliLoader(FolderSource(photo_folder), evaluation_transform(InputSpec(32, 40)), 8, CPU)
    whole = list(loader.epoch())
    batches = loader.epoch()
    next(batches)
    refusal = RuntimeError("this is no JPEG to me")
    loader._recover(refusal)
    assert difference([next(batches)], whole[1:]) <= 1.5
    batches = loader.epoch()
    next(batches)
    loader._recover(refusal)
    loader._in_flight.extend(loader._prepared)
    with pytest.raises(RuntimeError, match="no JPEG to me"):
        loader._recover(refusal)


def test_too_many_broken_images_stop_the_epoch(spoiled):
    source = FolderSource(spoiled)
    with pytest.raises(UserError, match="--max-bad-images 2"):
        list(DaliLoader(source, evaluation_transform(InputSpec(32, 40)), 4, CPU, max_bad_images=2).epoch())
    with pytest.raises(UserError, match=r"\.jpg is not an image or is damaged"):
        list(DaliLoader(source, evaluation_transform(InputSpec(32, 40)), 4, CPU).epoch())


def test_an_image_of_one_pixel_and_a_strip(tmp_path):
    (tmp_path / "c").mkdir()
    Image.new("RGB", (1, 1), (9, 80, 200)).save(tmp_path / "c/0.png")
    Image.fromarray(np.full((1, 20_000, 3), 77, dtype=np.uint8)).save(tmp_path / "c/1.jpg")
    ((images, _),) = DaliLoader(FolderSource(tmp_path), evaluation_transform(InputSpec(16, 16)), 2, CPU).epoch()
    assert images[0, :, 5, 5].tolist() == [9, 80, 200]
    assert (images[1] - 77.0).abs().max() <= 1


@pytest.mark.slow
def test_main_trains_and_validates_each_epoch(run_script, image_folder, tmp_path):
    arguments = "--arch cifar-resnet20 --num-classes 3 --image-size 32 -b 6 -j 1 --epochs 3 --use-ema 0.9 --seed 1"
    result = run_script(
        "main.py", image_folder, *arguments.split(), "--data-backend", "dali-cpu", "--workspace", tmp_path
    )
    assert result.code == 0, result.err
    epochs = [json.loads(line)["data"] for line in (tmp_path / "experiment_raport.json").read_text().splitlines()]
    assert len(epochs) == 3
    for metrics in epochs:  # over no image at all each of these would be 0
        assert min(metrics[name] for name in ("train.loss", "val.loss", "val_ema.loss")) > 0
        assert metrics["val.loss"] != metrics["val_ema.loss"]
