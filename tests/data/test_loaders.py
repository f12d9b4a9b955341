"""Batches: which images, in which order, and what depends on what."""

from __future__ import annotations

import multiprocessing
import os
from itertools import islice
from pathlib import Path

import pytest
import torch
from torchvision.io import encode_jpeg

from effnet_quant.card import InputSpec
from effnet_quant.data.folders import FolderSource
from effnet_quant.data.loaders import Loader
from effnet_quant.data.sources import EncodedSource, NameTable
from effnet_quant.data.transforms import evaluation_transform, training_transform
from effnet_quant.errors import UserError


class Numbers:
    """Images whose pixels, and labels, are their index."""

    in_memory = False
    augmentable = True

    def __init__(self, count):
        self.labels = torch.arange(count)
        self.classes = [str(index) for index in range(count)]

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        return torch.full((3, 2, 2), index, dtype=torch.uint8)

    def name(self, index):
        return f"number {index}"


class Broken(Numbers):
    """Numbers, of which the fifth can't be read."""

    def read(self, index):
        if index == 5:
            raise UserError("file five is damaged; remove it.")
        return super().read(index)


def unchanged(image):
    return image


def labels_of(loader, epoch=0, first_batch=0):
    return [labels.tolist() for _, labels in loader.epoch(epoch, first_batch)]


def flat(batches):
    return [label for batch in batches for label in batch]


def test_evaluation_gives_every_image_once_in_order_with_a_small_last_batch():
    loader = Loader(Numbers(11), unchanged, 4)
    assert labels_of(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert (len(loader), loader.num_images) == (3, 11)


def test_images_and_labels_belong_together():
    for images, labels in Loader(Numbers(11), unchanged, 4, shuffle=True).epoch():
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert images.shape == (4, 3, 2, 2)
        assert images[:, 0, 0, 0].tolist() == labels.tolist()


def test_training_drops_the_last_incomplete_batch():
    loader = Loader(Numbers(11), unchanged, 4, shuffle=True)
    batches = labels_of(loader)
    assert len(loader) == 2
    assert [len(batch) for batch in batches] == [4, 4]
    assert len(set(flat(batches))) == 8


def test_training_keeps_an_incomplete_batch_that_is_the_only_one():
    loader = Loader(Numbers(3), unchanged, 4, shuffle=True)
    assert len(loader) == 1
    assert sorted(flat(labels_of(loader))) == [0, 1, 2]


def test_order_depends_on_seed_and_epoch_alone():
    first = Loader(Numbers(40), unchanged, 4, shuffle=True, seed=3)
    order = flat(labels_of(first, epoch=1))
    torch.manual_seed(1234)
    assert flat(labels_of(Loader(Numbers(40), unchanged, 10, shuffle=True, seed=3), epoch=1)) == order
    assert flat(labels_of(first, epoch=1)) == order
    assert flat(labels_of(first, epoch=2)) != order
    assert flat(labels_of(Loader(Numbers(40), unchanged, 4, shuffle=True, seed=4), epoch=1)) != order


def test_an_epoch_can_start_at_any_batch():
    loader = Loader(Numbers(22), unchanged, 4, shuffle=True, seed=3)
    whole = labels_of(loader, epoch=5)
    assert [labels_of(loader, 5, first) for first in range(6)] == [whole[first:] for first in range(6)]


def test_chosen_indices_come_in_their_order():
    loader = Loader(Numbers(22), unchanged, 2, indices=torch.tensor([20, 3, 7]))
    assert labels_of(loader) == [[20, 3], [7]]
    assert loader.num_images == 3


def test_workers_change_nothing(image_folder):
    source = FolderSource(image_folder / "train")
    transform = training_transform(InputSpec(16, 16), "autoaugment")
    alone, pair = (
        list(Loader(source, transform, 4, shuffle=True, seed=9, workers=workers).epoch(2)) for workers in (0, 2)
    )
    assert len(alone) == len(pair) == 4
    for (images, labels), (images_of_pair, labels_of_pair) in zip(alone, pair, strict=True):
        assert torch.equal(images, images_of_pair)
        assert torch.equal(labels, labels_of_pair)


def test_more_workers_than_cores_are_the_users_choice(image_folder, recwarn):
    workers = len(os.sched_getaffinity(0)) + 1
    loader = Loader(FolderSource(image_folder / "train"), evaluation_transform(InputSpec(8, 8)), 18, workers=workers)
    assert len(next(loader.epoch())[1]) == 18
    assert not recwarn.list


def test_random_transforms_do_not_depend_on_where_the_epoch_starts(image_folder):
    source = FolderSource(image_folder / "train")
    loader = Loader(source, training_transform(InputSpec(16, 16)), 4, shuffle=True, seed=9)
    whole, rest = list(loader.epoch(0)), list(loader.epoch(0, 2))
    assert torch.equal(whole[2][0], rest[0][0])
    assert torch.equal(whole[3][0], rest[1][0])


def test_random_transforms_differ_between_epochs_and_seeds(image_folder):
    source = FolderSource(image_folder / "train")
    transform = training_transform(InputSpec(16, 16))

    def brightness(seed, epoch):  # of each image after its crop, whatever the order of the images
        ((images, _),) = Loader(source, transform, 18, shuffle=True, seed=seed).epoch(epoch)
        return images.float().mean((1, 2, 3)).sort().values

    assert torch.equal(brightness(0, 0), brightness(0, 0))
    assert not torch.equal(brightness(0, 0), brightness(0, 1))
    assert not torch.equal(brightness(0, 0), brightness(1, 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_programs_own_random_state_is_left_alone(image_folder, workers):
    loader = Loader(
        FolderSource(image_folder / "val"), training_transform(InputSpec(16, 16)), 6, shuffle=True, workers=workers
    )
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert len(list(loader.epoch())) == 3
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_raised_with_its_sentence(workers):
    loader = Loader(Broken(8), unchanged, 4, workers=workers)
    with pytest.raises(UserError, match=r"^file five is damaged; remove it\.$"):
        list(loader.epoch())


def test_sources_in_memory_use_no_workers():
    read_here = []

    class InMemory(Numbers):
        in_memory = True

        def read(self, index):
            read_here.append(index)  # another process would append to its own list
            return super().read(index)

    assert labels_of(Loader(InMemory(6), unchanged, 4, workers=3)) == [[0, 1, 2, 3], [4, 5]]
    assert read_here == list(range(6))


def test_evaluation_transform_makes_one_size_of_all(image_folder):
    batches = list(Loader(FolderSource(image_folder / "val"), evaluation_transform(InputSpec(16, 20)), 7).epoch())
    assert [tuple(images.shape) for images, _ in batches] == [(7, 3, 16, 16), (7, 3, 16, 16), (4, 3, 16, 16)]


def test_workers_write_to_the_same_memory_in_turns_and_batches_stay_as_they_were():
    sizes = [images.flatten(1) for images, _ in Loader(Numbers(11), unchanged, 4, workers=1, prefetch=1).epoch()]
    assert torch.cat(sizes).tolist() == [[index] * 12 for index in range(11)]
    loader = Loader(Numbers(64), unchanged, 4, shuffle=True, workers=1, prefetch=2)
    for epoch in range(2):
        batches = list(loader.epoch(epoch))  # 16, more than a worker has blocks
        assert all(images[:, 0, 0, 0].tolist() == labels.tolist() for images, labels in batches)
        assert not any(images.is_shared() for images, _ in batches)


class Names(EncodedSource):
    """ImageNet's number of file names, all of which lead to one small image."""

    def __init__(self, count):
        self.classes = ["one"]
        self.labels = torch.zeros(count, dtype=torch.int64)
        self._names = NameTable(f"train/n01440764/n01440764_{index}.JPEG" for index in range(count))
        self._data = encode_jpeg(torch.zeros(3, 32, 32, dtype=torch.uint8)).numpy()

    def name(self, index):
        return self._names[index]

    def load(self, index):
        assert self.name(index).endswith(f"_{index}.JPEG")
        return self._data.copy()


def private_memory(process):
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_workers_do_not_grow_over_20_epochs_of_imagenets_size():
    loader = Loader(Names(1_300_000), training_transform(InputSpec(32, 32)), 32, shuffle=True, workers=2)
    sizes = []
    for epoch in range(20):
        assert len(list(islice(loader.epoch(epoch), 60))) == 60
        sizes.append(sum(map(private_memory, multiprocessing.active_children())))
    assert sizes[-1] - sizes[1] < 20  # MB; a list of the names would be copied by and by, at 130 MB in each
