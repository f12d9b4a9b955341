"""Shards against the folder that they were packed from."""

from __future__ import annotations

import collections
import io
import json
import multiprocessing
import shutil
import tarfile

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from effnet_quant.card import InputSpec
from effnet_quant.data.backends import open_loader
from effnet_quant.data.data_argument import open_sources
from effnet_quant.data.folders import FolderSource
from effnet_quant.data.shards import ShardSource, pack, write_index
from effnet_quant.data.streaming import ShardLoader
from effnet_quant.data.transforms import evaluation_transform, training_transform
from effnet_quant.errors import UserError

pytest.importorskip("webdataset", reason="needs the extra 'webdataset'")

EVALUATION = evaluation_transform(InputSpec(32, 40))
TRAINING = training_transform(InputSpec(32, 40))


@pytest.fixture(scope="module")
def shards(photo_folder, tmp_path_factory):
    """train/ and val/ of the 16 photos in shards of 4; not to be changed."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        assert list(pack(FolderSource(photo_folder), root / split, 5, seed=1)) == list(range(1, 17))
    return root


def pictures(loader, epoch=0, first=0):
    """Each image as its bytes, with its label."""
    batches = loader.epoch(epoch, first)
    return [
        (image.numpy().tobytes(), int(label))
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    ]


def test_packed_images_are_the_folders(shards, photo_folder):
    source = FolderSource(photo_folder)
    expected = collections.Counter(pictures(open_loader("pytorch", source, EVALUATION, 4, torch.device("cpu"))))
    train, val = open_sources(str(shards))
    assert (len(train), train.classes, len(val)) == (16, ["left", "right"], 16)
    assert train.counts == [4, 4, 4, 4]
    for workers in (0, 2):
        loader = open_loader("pytorch", val, EVALUATION, 3, torch.device("cpu"), workers=workers)
        assert len(loader) == 6
        assert collections.Counter(pictures(loader)) == expected


@pytest.mark.parametrize("workers", [0, 3])
def test_an_epoch_has_each_image_once_in_an_order_of_its_own(shards, workers):
    loader = ShardLoader(ShardSource(str(shards / "train")), EVALUATION, 5, shuffle=True, seed=3, workers=workers)
    assert len(loader) == 3
    first, second = pictures(loader, 0), pictures(loader, 1)
    assert len(set(first)) == len(first) == 15
    assert first != second
    assert pictures(loader, 0) == first
    assert pictures(loader, 1, 2) == second[10:]


@pytest.fixture(scope="module")
def unequal(photo_folder, tmp_path_factory):
    """The 16 photos in shards of 9, 6 and 1; not to be changed."""
    root = tmp_path_factory.mktemp("unequal")
    source = FolderSource(photo_folder)
    list(pack(source, root, 16, seed=1))
    with tarfile.open(root / "000000.tar") as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    sizes = [9, 6, 1]
    for number, size in enumerate(sizes):
        with tarfile.open(root / f"{number}.tar", "w") as tar:
            for member, content in members[: 2 * size]:  # an image and its label each
                tar.addfile(member, io.BytesIO(content))
        del members[: 2 * size]
    shards = [{"file": f"{number}.tar", "images": size} for number, size in enumerate(sizes)]
    (root / "index.json").write_text(json.dumps({"classes": source.classes, "shards": shards}))
    return ShardSource(str(root))


def test_processes_share_an_epoch_whatever_the_sizes_of_the_shards(unequal):
    for ranks, batches in ((2, 4), (4, 2)):
        loaders = [
            ShardLoader(unequal, EVALUATION, 2, shuffle=True, seed=3, rank=rank, ranks=ranks) for rank in range(ranks)
        ]
        assert [len(loader) for loader in loaders] == [batches] * ranks
        parts = [pictures(loader) for loader in loaders]
        assert [len(part) for part in parts] == [2 * batches] * ranks
        assert len({picture for part in parts for picture in part}) == 16
    parts = [pictures(ShardLoader(unequal, EVALUATION, 4, rank=rank, ranks=3)) for rank in range(3)]
    assert [len(part) for part in parts] == [6, 5, 5]
    assert len({picture for part in parts for picture in part}) == 16
    with pytest.raises(UserError, match="16 training images are too few for 17 processes"):
        ShardLoader(unequal, EVALUATION, 4, shuffle=True, ranks=17)


def test_chosen_images_are_read_from_the_first_of_each_processs_share(unequal, photo_folder):
    everything = pictures(ShardLoader(unequal, EVALUATION, 16))
    chosen = torch.arange(6) * 16 // 6  # as calibration spreads them
    for share, first in zip(chosen.tensor_split(2), (0, 8), strict=True):
        loader = ShardLoader(unequal, EVALUATION, 2, indices=share)
        assert len(loader) == 2
        assert pictures(loader) == everything[first : first + 3]


def test_workers_stay_and_share_evaluation_too(unequal):
    whole = collections.Counter(pictures(ShardLoader(unequal, EVALUATION, 16)))
    loader = ShardLoader(unequal, EVALUATION, 3, workers=2)
    processes = []
    for epoch in range(3):
        assert len(pictures(loader, epoch)) == 16 if epoch else collections.Counter(pictures(loader)) == whole
        processes.append({process.pid for process in multiprocessing.active_children()})
    assert len(processes[0]) == 2
    assert processes[0] == processes[1] == processes[2]
    training = ShardLoader(unequal, TRAINING, 5, shuffle=True, workers=2)
    whole = pictures(training, 3)
    next(training.epoch(1))  # left early
    assert pictures(training, 3, 1) == whole[5:]


def test_a_batch_without_readable_images_is_filled(unequal, tmp_path, capfd):
    broken = [f"{number:08d}" for number in range(7)]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in broken:
            for extension, content in (("jpg", b""), ("cls", b"0")):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    shutil.copy(unequal.urls[1], tmp_path / "1.tar")
    shards = [{"file": "0.tar", "images": 7}, {"file": "1.tar", "images": 6}]
    (tmp_path / "index.json").write_text(json.dumps({"classes": unequal.classes, "shards": shards}))
    source = ShardSource(str(tmp_path))
    for batch_size in (1, 3):
        loader = ShardLoader(source, EVALUATION, batch_size, shuffle=True, max_bad_images=7)
        batches = list(loader.epoch())
        assert [len(images) for images, _ in batches] == [batch_size] * (13 // batch_size)
    assert sorted(loader.bad_images.sentences) == list(range(7))
    (tmp_path / "1.tar").write_bytes((tmp_path / "0.tar").read_bytes())
    with pytest.raises(UserError, match="no image that can be read"):
        list(ShardLoader(source, EVALUATION, 3, shuffle=True, max_bad_images=13).epoch())
    (tmp_path / "index.json").write_text(
        json.dumps({"classes": unequal.classes, "shards": [{"file": "0.tar", "images": 9}]})
    )
    with pytest.raises(UserError, match=r"0\.tar holds 2 images less than its index says"):
        list(ShardLoader(ShardSource(str(tmp_path)), EVALUATION, 3, max_bad_images=13).epoch())


def test_patterns_choose_shards_and_urls_are_opened_by_fsspec(shards):
    source = ShardSource(f"{shards}/train/{{000001..000002}}.tar")
    assert (len(source.urls), len(source)) == (2, 8)
    with pytest.raises(UserError, match=r"000004\.tar is not in"):
        ShardSource(f"{shards}/train/{{000001..000007}}.tar")
    train, val = open_sources(f"{shards}/train/{{000000..000003}}.tar::{shards}/val/000000.tar")
    assert (len(train), len(val)) == (16, 4)
    memory = fsspec.filesystem("memory")
    for split in ("train", "val"):
        memory.put(f"{shards / split}/", f"/set/{split}/", recursive=True)
    chained = "simplecache::memory://set/train/{000000..000003}.tar::simplecache::memory://set/val/000001.tar"
    for data, images in (("memory://set", 16), (chained, 4)):
        train, val = open_sources(data)
        assert (len(train), len(val)) == (16, images)
        assert torch.equal(train.read(9), ShardSource(str(shards / "train")).read(9))


def test_labels_follow_the_classes_of_the_training_data(shards):
    plain, moved = ShardSource(str(shards / "val")), ShardSource(str(shards / "val"), ["right", "x", "left"])
    assert [{0: 2, 1: 0}[label] for label in plain.labels.tolist()] == moved.labels.tolist()
    with pytest.raises(UserError, match="classes that the training data lacks: right"):
        ShardSource(str(shards / "val"), ["left"])


def test_shards_of_others_get_an_index(shards, tmp_path):
    for number in range(2):
        shutil.copy(shards / f"train/00000{number}.tar", tmp_path)
    pattern = f"{tmp_path}/{{000000..000001}}.tar"
    with pytest.raises(UserError, match="--index makes it"):
        ShardSource(pattern)
    assert write_index(pattern).images == {f"00000{n}.tar": 4 for n in range(2)}
    assert len(ShardSource(pattern)) == 8


def test_indices_of_two_sets_in_one_place_are_one_file(shards, tmp_path):
    for split in ("train", "val"):
        for number in range(2):
            shutil.copy(shards / split / f"00000{number}.tar", tmp_path / f"{split}-{number}.tar")
    for location in (str(tmp_path), "memory://both"):
        if "://" in location:
            (tmp_path / "index.json").unlink()
            fsspec.filesystem("memory").put(f"{tmp_path}/", "/both/", recursive=True)
        for split in ("train", "val"):
            write_index(f"{location}/{split}-{{0..1}}.tar")
        train, val = open_sources(f"{location}/train-{{0..1}}.tar::{location}/val-{{0..1}}.tar")
        assert (len(train), len(val)) == (8, 8)
        assert train.classes == ["0", "1"]


class ReadOnly(LocalFileSystem):
    """Files that can't be written, as over HTTP."""

    protocol = "readonly"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("readonly://"))

    def _open(self, path, mode="rb", **options):
        if mode != "rb":
            raise NotImplementedError
        return super()._open(path, mode, **options)


def test_an_index_that_cant_be_written_beside_its_shards_is_kept(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fsspec.register_implementation("readonly", ReadOnly, clobber=True)
    shutil.copy(shards / "train/000000.tar", tmp_path)
    write_index(f"readonly://{tmp_path}/000000.tar")
    assert not (tmp_path / "index.json").exists()
    assert len(ShardSource(f"readonly://{tmp_path}/000000.tar")) == 4


def test_packing_leaves_out_what_cant_be_read(photo_folder, tmp_path, capfd):
    folder = tmp_path / "data/c"
    folder.mkdir(parents=True)
    shutil.copy(photo_folder / "left/0.jpg", folder)
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    assert list(pack(FolderSource(tmp_path / "data"), tmp_path / "shards")) == [1]
    assert "self.jpg can't be read" in capfd.readouterr().err
    assert len(ShardSource(str(tmp_path / "shards"))) == 1


def test_broken_images_and_shards_are_named(shards, tmp_path):
    shutil.copytree(shards / "val", tmp_path / "val")
    with tarfile.open(tmp_path / "val/000002.tar", "w") as tar:
        for name, content in (("a.jpg", b"text"), ("a.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index = json.loads((tmp_path / "val/index.json").read_text())
    index["shards"][2]["images"] = 1
    (tmp_path / "val/index.json").write_text(json.dumps(index))
    source = ShardSource(str(tmp_path / "val"))
    for workers in (0, 1):
        loader = ShardLoader(source, EVALUATION, 4, workers=workers, max_bad_images=1)
        assert len(pictures(loader)) == 12
        with pytest.raises(UserError, match=r"000002\.tar:a\.jpg is not an image or is damaged"):
            pictures(ShardLoader(source, EVALUATION, 4, workers=workers))
    (tmp_path / "val/000001.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(UserError, match=r"000001\.tar can't be read"):
        pictures(ShardLoader(source, EVALUATION, 4, workers=1, max_bad_images=1))


def test_dali_says_that_it_reads_no_shards(shards):
    source = ShardSource(str(shards / "val"))
    with pytest.raises(UserError, match="reads no shards"):
        open_loader("dali-cpu", source, EVALUATION, 4, torch.device("cpu"))
