"""``effnet-quant data`` as a user runs it."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def tool(run_script):
    """Runs the tool: (*arguments) -> (status, standard output, standard error)."""

    def run(*arguments):
        result = run_script("effnet_quant/__main__.py", "data", *arguments)
        return result.code, result.out, result.err

    return run


@pytest.fixture
def data(photo_folder, tmp_path):
    """train/ and val/ of the photos; one of train's and one of val's are broken."""
    for split in ("train", "val"):
        shutil.copytree(photo_folder, tmp_path / "data" / split)
    (tmp_path / "data/train/left/2.jpg").write_bytes(b"")
    half = (photo_folder / "right/5.jpg").read_bytes()[:3000]
    (tmp_path / "data/val/right/5.jpg").write_bytes(half)
    return tmp_path / "data"


def test_counts_and_headers(tool, data):
    status, out, _ = tool(data, "-j", 1)
    assert out.startswith("train: 16 images, 2 classes\n  images a class: 8 to 8, median 8\n  left 8, right 8\n")
    assert "/train/left/2.jpg is not an image or is damaged (the file is empty)" in out
    assert "val/right/5.jpg" not in out  # its header is whole
    assert status == 1


def test_check_decodes_everything(tool, data):
    status, out, _ = tool(data, "--check", "-j", 2)
    assert "/val/right/5.jpg is not an image or is damaged" in out
    assert out.count("broken: 1 of 16") == 2
    assert status == 1


def test_shards_hold_what_was_packed(tool, photo_folder, tmp_path):
    pytest.importorskip("webdataset", reason="needs the extra 'webdataset'")
    for split in ("train", "val"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / split).symlink_to(photo_folder)
    status, out, err = tool(tmp_path / "data", "--pack", tmp_path / "shards", "--images-per-shard", 6, "-j", 0)
    assert (status, err) == (0, "")
    status, out, _ = tool(tmp_path / "shards", "--check", "-j", 1)
    assert out.startswith("train: 16 images, 2 classes\n")
    assert out.count("broken: 0 of 16") == out.count("  left 8, right 8\n") == 2
    assert status == 0


def test_one_split_is_enough(tool, photo_folder, tmp_path):
    (tmp_path / "val").symlink_to(photo_folder)
    status, out, _ = tool(tmp_path, "-j", 0)
    assert out.startswith("val: 16 images, 2 classes\n")
    assert "train" not in out.replace(str(tmp_path), "")
    assert status == 0


def test_mistakes_are_one_sentence(tool, tmp_path):
    status, out, err = tool(tmp_path / "nothing")
    assert (status, out) == (2, "")
    assert err.startswith("error: there is no data at ")
    assert tool("digits", "--pack", tmp_path)[2].startswith("error: --pack takes image files")
