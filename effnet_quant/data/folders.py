"""Images in folders, one folder per class."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from effnet_quant.data.decoding import Bytes
from effnet_quant.data.sources import EncodedSource, NameTable
from effnet_quant.errors import UserError
from effnet_quant.terminal import printable

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


class FolderSource(EncodedSource):
    """Images in ``<root>/<class>/``, at any depth below the class, in sorted order.

    Symbolic links are followed. A folder that can't be read is reported on standard error and left out. So is a link that
    leads in a circle, to a folder that contains it.

    Args:
        root: the folder of one split.
        classes: the classes that labels refer to; by default the names of the folders.
        split: "train" or "val" for the share of each class that ``share_of`` chooses; None for all images.

    Raises:
        UserError: the folder is missing or unreadable, holds no images, or has a class that ``classes`` lacks.
    """

    def __init__(self, root: Path, classes: list[str] | None = None, split: str | None = None) -> None:
        found = class_folders(root)
        self.classes = found if classes is None else classes
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise UserError(
                f"{root} has classes that the training data lacks: {', '.join(unknown[:5])}; "
                "add them to train/ or remove them."
            )
        above = _above(root)
        paths: list[str] = []
        labels: list[int] = []
        for name in found:
            files = sorted(image_files(os.path.join(root, name), above))
            if split is not None:
                files = share_of(files, os.path.join(root, ""), split)
            paths += files
            labels += [self.classes.index(name)] * len(files)
        if not paths:
            kinds = ", ".join(sorted(EXTENSIONS))
            raise UserError(f"there are no images in {root}; expected <class>/<image> with one of {kinds}.")
        self._root = os.path.join(root, "")
        self._names = NameTable(path.removeprefix(self._root) for path in paths)
        self.labels = torch.tensor(labels)

    def name(self, index: int) -> str:
        """The image's file."""
        return self._root + self._names[index]

    def load(self, index: int) -> Bytes:
        """The file's bytes."""
        return np.fromfile(self.name(index), dtype=np.uint8)


def share_of(files: list[str], root: str, split: str) -> list[str]:
    """The images of one class that are for training ("train") or for validation ("val"), in the order of ``files``.

    A fifth of them is for validation, rounded, and at least one if there are two. A hash of each name below ``root``
    decides. So the choice is the same on every machine, and few images change sides if some are added.
    """
    held = max(round(len(files) / 5), 1) if len(files) > 1 else 0
    by_hash = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file.removeprefix(root))).digest())
    validation = set(by_hash[:held])
    return [file for file in files if (file in validation) == (split == "val")]


def class_folders(root: Path) -> list[str]:
    """The names of the folders in ``root``, sorted.

    Raises:
        UserError: there is no such folder, or it can't be read.
    """
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}; DATA must hold a folder of each class, or train/<class>/ and val/<class>/."
        )
    try:
        above = _above(root)
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if _is_folder(entry) and not _is_above(entry.path, above))
    except OSError as error:
        raise UserError(f"{root} can't be read ({error.strerror}); check its permissions.") from error


_Folders = frozenset[tuple[int, int]]  # device and inode numbers


def _above(folder: str | Path, above: _Folders = frozenset()) -> _Folders:
    status = os.stat(folder)
    return above | {(status.st_dev, status.st_ino)}


def _is_above(folder: str, above: _Folders) -> bool:
    """Whether a link in ``folder``'s path leads in a circle, to one of ``above``; if so, warns on standard error."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) not in above:
        return False
    print(f"warning: {printable(str(folder))} is a link to a folder that holds it; left out.", file=sys.stderr)
    return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        # a link to itself. If it has an image's name, reading it will report it
        if not _is_image(entry.name):
            print(f"warning: {printable(entry.path)} can't be read ({error.strerror}); left out.", file=sys.stderr)
        return False


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _never_ends(entry: os.DirEntry[str]) -> bool:
    """Whether reading could wait forever: a pipe, a socket or a device. If so, warns on standard error."""
    try:
        mode = entry.stat().st_mode if entry.is_symlink() or not entry.is_file() else stat.S_IFREG
    except OSError:  # reading it will report it
        return False
    if stat.S_ISREG(mode):
        return False
    print(f"warning: {printable(entry.path)} is no regular file; left out.", file=sys.stderr)
    return True


def image_files(folder: str, above: _Folders = frozenset()) -> Iterator[str]:
    """The paths of all images below ``folder``. ``above`` holds the folders that contain it, to find circular links."""
    try:
        if _is_above(folder, above):
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_folder(entry):
                    yield from image_files(entry.path, _above(folder, above))
                elif _is_image(entry.name) and not _never_ends(entry):
                    yield entry.path
    except OSError as error:
        print(f"warning: {printable(str(folder))} can't be read ({error.strerror}); left out.", file=sys.stderr)
