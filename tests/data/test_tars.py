"""ImageNet's tar files read in place, against the files that went into them."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch

from effnet_quant.data.data_argument import open_sources
from effnet_quant.data.sources import read_image
from effnet_quant.data.tars import TRAIN_TAR, VAL_TAR, ImageNetSource
from effnet_quant.errors import UserError


@pytest.fixture
def imagenet(photo_folder, tmp_path, monkeypatch):
    """Two classes of eight training images in tars within a tar, and four validation images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / TRAIN_TAR, "w") as outer:
        for wnid, name in (("n01440764", "left"), ("n01443537", "right")):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for photo in sorted((photo_folder / name).iterdir()):
                    archive.add(photo, f"{wnid}_{photo.stem}.JPEG")
            member = tarfile.TarInfo(f"{wnid}.tar")
            member.size = len(inner.getvalue())
            outer.addfile(member, io.BytesIO(inner.getvalue()))
    with tarfile.open(tmp_path / VAL_TAR, "w") as archive:
        folder = tarfile.TarInfo("val")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, photo in enumerate(["left/0", "right/1", "right/2", "left/3"]):
            archive.add(photo_folder / f"{photo}.jpg", f"ILSVRC2012_val_0000000{number + 1}.JPEG")
    (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text("n01440764\nn01443537\nn01443537\nn01440764\n")
    return tmp_path


def test_images_and_labels_are_those_of_the_files(imagenet, photo_folder):
    train, val = open_sources(str(imagenet))
    assert train.classes == val.classes == ["n01440764", "n01443537"]
    assert train.labels.tolist() == [0] * 8 + [1] * 8
    assert val.labels.tolist() == [0, 1, 1, 0]
    for index in (0, 7, 8, 15):
        photo = photo_folder / ("left", "right")[index // 8] / f"{index % 8}.jpg"
        assert torch.equal(train.read(index), read_image(photo))
    assert torch.equal(val.read(2), read_image(photo_folder / "right/2.jpg"))
    assert train.name(9).endswith(f"{TRAIN_TAR}:n01443537/n01443537_1.JPEG")


def test_contents_are_read_once(imagenet, monkeypatch):
    first = ImageNetSource(imagenet, "train")
    monkeypatch.setattr(tarfile, "open", None)
    again = ImageNetSource(imagenet, "train")
    assert np.array_equal(first.load(11), again.load(11))
    assert again.labels.tolist() == first.labels.tolist()


def test_a_damaged_table_of_contents_is_made_again(imagenet, capfd):
    first = ImageNetSource(imagenet, "train")
    (table,) = (imagenet / "cache/effnet-quant").glob("*.npz")
    for damage in (b"", b"PK\x03\x04 but no more", table.read_bytes()[:200]):
        table.write_bytes(damage)
        assert ImageNetSource(imagenet, "train").labels.tolist() == first.labels.tolist()
        assert f"{table} is damaged" in capfd.readouterr().err


def test_kaggles_table_of_labels(imagenet):
    (imagenet / "imagenet_2012_validation_synset_labels.txt").unlink()
    rows = ["ImageId,PredictionString"]
    rows += [f"ILSVRC2012_val_0000000{n},n0144{('3537', '0764')[n % 2]} 1 2 3 4 " for n in (4, 1, 3, 2)]
    (imagenet / "LOC_val_solution.csv").write_text("\n".join(rows))
    assert ImageNetSource(imagenet, "val").labels.tolist() == [0, 1, 0, 1]


def test_what_is_missing_is_named(imagenet):
    with pytest.raises(UserError, match="classes that the training data lacks: n01443537"):
        ImageNetSource(imagenet, "val", ["n01440764"])
    (imagenet / "LOC_val_solution.csv").write_text("image,label\nILSVRC2012_val_00000001,n01440764\n")
    labels = imagenet / "imagenet_2012_validation_synset_labels.txt"
    labels.unlink()
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv is no list of labels"):
        ImageNetSource(imagenet, "val")
    (imagenet / "LOC_val_solution.csv").unlink()
    labels.write_text("n01440764\n")
    with pytest.raises(UserError, match=r"ILSVRC2012_val_00000002\.JPEG .* has no label"):
        ImageNetSource(imagenet, "val")
    labels.unlink()
    with pytest.raises(UserError, match="no labels of the validation images"):
        ImageNetSource(imagenet, "val")
    (imagenet / TRAIN_TAR).write_bytes((imagenet / TRAIN_TAR).read_bytes()[:70_000])
    with pytest.raises(UserError, match="not a whole tar file"):
        ImageNetSource(imagenet, "train")
