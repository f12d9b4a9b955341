"""image_parts: all images of folders and tars, in parts that are read one after another."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effnet_quant.data.decoding import Bytes
from effnet_quant.data.folders import EXTENSIONS, image_files
from effnet_quant.errors import UserError
from effnet_quant.files import is_special, possible_path

FILES_IN_A_PART = 1024
_LARGEST = 2**28  # bytes of an image file


@dataclass(frozen=True)
class Part:
    """Images that are read together.

    Attributes:
        images: their names: paths below the source, and in a tar the names of its members.
        folder: where files lie; None for a tar.
        tar: the tar file; None for files. Its name is in front of its images' names in ``reads``.
    """

    images: tuple[str, ...]
    folder: Path | None = None
    tar: Path | None = None

    def reads(self) -> Iterator[tuple[str, Bytes | OSError]]:
        """The name and the bytes of each image, or why they can't be read.

        Raises:
            UserError: the tar can't be read.
        """
        if self.folder is not None:
            for name in self.images:
                yield name, _bytes_of(self.folder / name)
            return
        assert self.tar is not None
        wanted = set(self.images)
        with _opened(self.tar) as archive:
            for member in archive:
                if member.name in wanted and member.isfile():
                    wanted.remove(member.name)
                    yield f"{self.tar.name}/{member.name}", _member(archive, member)


def image_parts(source: str | Path) -> list[Part]:
    """The parts of a folder, with the folders in it, of a tar, or of a folder of tars, as WebDataset's shards are.

    Each image is in one part. The same files give the same parts in the same order.

    Raises:
        UserError: there is no such source, it holds no images, or a tar is damaged.
    """
    root = possible_path(source)
    if root.is_file() and root.suffix == ".tar":
        parts = [_of_tar(root)]
    elif root.is_dir():
        files = sorted(os.path.relpath(path, root) for path in image_files(str(root)))
        groups = (files[start : start + FILES_IN_A_PART] for start in range(0, len(files), FILES_IN_A_PART))
        parts = [Part(tuple(group), folder=root) for group in groups]
        parts += [_of_tar(path) for path in sorted(root.rglob("*.tar")) if path.is_file()]
    elif root.is_file():
        raise UserError(
            f"{source} is neither a folder nor a .tar file; effnet-quant classify --image answers for single pictures."
        )
    else:
        raise UserError(f"there are no images at {source}; give a folder of images or of tars, or a .tar file.")
    parts = [part for part in parts if part.images]
    if not parts:
        raise UserError(f"{source} holds no images; give a folder of images or of tars, or a .tar file.")
    return parts


def _of_tar(path: Path) -> Part:
    with _opened(path) as archive:
        names = [member.name for member in archive if member.isfile() and _is_image(member.name)]
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two images of one name ({_first_twice(names)}); pack it again.")
    return Part(tuple(names), tar=path)


def _first_twice(names: list[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


class _opened:
    """A tar, whose errors become sentences."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> tarfile.TarFile:
        try:
            self._archive = tarfile.open(self._path, "r:")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{self._path} is no tar file or is damaged ({error}); get it again.") from error
        return self._archive

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._archive.close()
        if isinstance(error, (tarfile.TarError, OSError, EOFError)):
            raise UserError(f"{self._path} is no tar file or is damaged ({error}); get it again.") from error


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _bytes_of(path: Path) -> Bytes | OSError:
    try:
        if is_special(path):
            return OSError(0, "it is a pipe or a device")
        if path.stat().st_size > _LARGEST:
            return OSError(0, "it is too large for an image")
        return np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        return error


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Bytes | OSError:
    if member.size > _LARGEST:
        return OSError(0, "it is too large for an image")
    file = archive.extractfile(member)
    assert file is not None
    return np.frombuffer(file.read(), dtype=np.uint8)
