"""Pipes, devices, endless input and full disks: one sentence, and nothing waits or is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effnet_quant import create_model
from effnet_quant.data import image_arguments
from effnet_quant.data.folders import FolderSource
from effnet_quant.data.shards import pack
from effnet_quant.errors import UserError
from effnet_quant.files import check_writable, replace_file

REPOSITORY = Path(__file__).parents[2]
NETWORK = ["--arch", "cifar-resnet20", "--num-classes", "10"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained weights."""
    path = tmp_path_factory.mktemp("weights") / "float.pth"
    torch.manual_seed(0)
    torch.save(create_model("cifar-resnet20").state_dict(), path)
    return path


@pytest.fixture
def fifo(tmp_path):
    """A named pipe that nobody writes to."""
    path = tmp_path / "fifo.pth"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("special", ["fifo", "/dev/zero"])
def test_an_image_that_never_ends_is_refused(run_script, weights, fifo, special):
    path = fifo if special == "fifo" else special
    result = run_script("classify.py", *NETWORK, "--pretrained-from-file", weights, "--image", path)
    assert result.code == 2
    assert (
        f"{path} is a pipe or a device, which may never end; give a file, or - and the image by a pipe." in result.err
    )


@pytest.mark.parametrize(
    "command",
    [
        ["main.py", "digits", *NETWORK, "--resume"],
        ["main.py", "digits", *NETWORK, "--pretrained-from-file"],
        ["quant_main.py", "digits", *NETWORK, "--pretrained-from-file"],
        ["classify.py", *NETWORK, "--image", "x.jpg", "--pretrained-from-file"],
        ["model2onnx.py", *NETWORK, "--pretrained-from-file"],
        ["checkpoint2model.py", "--weight-path", "out.pth", "--checkpoint-path"],
        ["launch.py", "--list", "--cfg_file"],
        ["main.py"],
    ],
)
def test_a_pipe_in_a_files_place_is_refused(run_script, fifo, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    result = run_script(*command, fifo)
    assert (result.code, len(result.error_lines)) == (2, 1), result.err


def test_a_pipe_is_no_raport_file(run_script, fifo, tmp_path):
    flags = ["--image-size", 32, "--evaluate", "--workspace", tmp_path, "--raport-file", fifo.name]
    result = run_script("main.py", "digits", *NETWORK, *flags)
    assert result.code == 2
    assert "it is a pipe; choose another with --raport-file" in result.error_lines[0]


def test_standard_input_is_bounded(monkeypatch):
    monkeypatch.setattr(image_arguments, "_LARGEST", 2**20)
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        with pytest.raises(UserError, match="standard input is larger than 1 MiB, so it is no image"):
            image_arguments.read_named("-")


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    before = os.stat("/dev/null")
    for write in (lambda path: replace_file(path, b"x"), check_writable):
        with pytest.raises(UserError, match="can't write /dev/null: it is a pipe or a device; name a file"):
            write(Path("/dev/null"))
    assert os.stat("/dev/null").st_ino == before.st_ino


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["launch.py", "--list"], id="launch"),
        pytest.param(["classify.py", *NETWORK, "--json", "--image", "{image}"], id="classify", marks=pytest.mark.slow),
    ],
)
def test_output_to_a_full_disk_is_a_sentence(weights, image_folder, command):
    flags = ["--pretrained-from-file", str(weights)] if command[0] == "classify.py" else []
    image = image_folder / "val/apple/00.jpg"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, *(word.format(image=image) for word in command), *flags],
            cwd=REPOSITORY,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 2
    assert result.stderr == (
        "error: the output can't be written, because its disk is full; free some space, or send it elsewhere.\n"
    )


IN_A_SMALL_DISK = """
mount -t tmpfs -o size=64k none "$1" || exit 77
mkdir "$1"/old && cp -r "$2"/. "$1"/old
{python} -m effnet_quant data "$3" -j 0 --pack "$1"/{to}
status=$?
find "$1" -type f | sort
exit $status
"""


@pytest.mark.parametrize("to", ["old", pytest.param("new/deep", marks=pytest.mark.slow)])
def test_packing_to_a_full_disk_leaves_what_was_there(write_images, image_folder, tmp_path, to):
    """A disk of 64 KiB, in a mount namespace of its own; ``old`` holds shards already."""
    pytest.importorskip("webdataset", reason="needs the extra 'webdataset'")
    small, disk = tmp_path / "small", tmp_path / "disk"
    disk.mkdir()
    write_images(tmp_path / "one" / "train" / "a", 2)
    for split in ("train", "val"):
        list(pack(FolderSource(tmp_path / "one" / "train"), small / split))
    write_images(tmp_path / "many" / "train" / "a", 60)
    before = sorted(path.relative_to(small) for path in small.rglob("*") if path.is_file())
    script = IN_A_SMALL_DISK.format(python=sys.executable, to=to)
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    result = subprocess.run(
        [*namespace, disk, small, tmp_path / "many"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if result.returncode in (1, 77):
        pytest.skip(f"no mount namespace here: {result.stderr}")
    assert result.returncode == 2, result.stderr
    error = result.stderr.splitlines()[-1]
    assert error == f"error: can't write {disk}/{to}/train: the disk is full; free some space or choose another place."
    assert [Path(line).relative_to(disk / "old") for line in result.stdout.splitlines() if "/disk/" in line] == before


def test_packing_that_is_left_leaves_nothing(image_folder, tmp_path):
    pytest.importorskip("webdataset", reason="needs the extra 'webdataset'")
    packing = pack(FolderSource(image_folder / "train"), tmp_path / "new" / "train", 5)
    assert [next(packing) for _ in range(7)] == list(range(1, 8))
    packing.close()
    assert list(tmp_path.iterdir()) == []
