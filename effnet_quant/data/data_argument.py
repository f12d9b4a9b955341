"""From a DATA argument to its sources of images."""

from __future__ import annotations

from pathlib import Path

from effnet_quant.data.arrays import (
    CIFAR,
    SYNTHETIC,
    SYNTHETIC_IMAGES,
    CifarSource,
    DigitsSource,
    SyntheticSource,
)
from effnet_quant.data.folders import FolderSource, class_folders, image_files
from effnet_quant.data.shards import is_shards, open_shards
from effnet_quant.data.sources import ImageSource
from effnet_quant.data.tars import TRAIN_TAR, VAL_TAR, ImageNetSource
from effnet_quant.errors import UserError
from effnet_quant.files import possible_path

DIGITS = "digits"
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def open_sources(data: str, classes: list[str] | None = None) -> tuple[ImageSource, ImageSource]:
    """Open the training and the validation images that ``data`` names; docs/data.md lists the possible names.

    Labels are indices into ``classes``, or into the data's own classes if it is None.

    Raises:
        UserError: there is no such data, it holds no images, or the training images lack a class of the validation images.
    """
    train = _open(data, "train", classes)
    return train, _open(data, "val", train.classes)


def open_training(data: str) -> ImageSource:
    """Open the training images alone.

    Raises:
        UserError: as ``open_sources``.
    """
    return _open(data, "train", None)


def fills_cache(data: str) -> bool:
    """Whether the first opening of ``data`` writes to the cache, so that one process must open it before the others."""
    return data in CIFAR or (_is_folder(data) and any((Path(data) / tar).is_file() for tar in (TRAIN_TAR, VAL_TAR)))


def is_undivided(data: str) -> bool:
    """Whether ``data`` is a folder of class folders, without train/ and val/. ``share_of`` then divides each class.

    Raises:
        UserError: its folders have names of splits, and not those two.
    """
    if not _is_folder(data) or is_shards(data):
        return False
    root = Path(data)
    own = (TRAIN_TAR, VAL_TAR, "train", "val", *CIFAR.values())
    if any((root / name).exists() for name in own):
        return False
    found = class_folders(root)
    if found and all(name.lower() in _SPLIT_NAMES for name in found):
        raise UserError(f"{data} holds {', '.join(found)}, which are no classes; name its folders train and val.")
    return any(next(image_files(str(root / name)), None) for name in found)


def is_split(data: str, split: str) -> bool:
    """Whether ``data`` is a local folder that holds ``split`` as images, shards or ImageNet's tar file."""
    tar = TRAIN_TAR if split == "train" else VAL_TAR
    return _is_folder(data) and ((Path(data) / split).is_dir() or (Path(data) / tar).is_file())


def open_validation(data: str, classes: list[str] | None = None) -> ImageSource:
    """Open the validation images alone. Labels are indices into ``classes``, or into the data's own classes if it is None.

    Raises:
        UserError: as ``open_sources``.
    """
    train = Path(data) / "train"
    if classes is None and _is_folder(data) and train.is_dir() and not is_shards(data):
        classes = class_folders(train)  # those of a folder without train/ are the same in both of its shares
    return _open(data, "val", classes)


def _is_folder(data: str) -> bool:
    return "://" not in data and not data.endswith(".tar") and possible_path(data).is_dir()


def _open(data: str, split: str, classes: list[str] | None) -> ImageSource:
    if not data:
        raise UserError("DATA is empty; give a folder with a folder of each class, or with train/ and val/.")
    if data == DIGITS:
        return DigitsSource(split)
    if data == SYNTHETIC:
        return SyntheticSource(SYNTHETIC_IMAGES, 1000, 224)
    if data in CIFAR:
        return CifarSource(data, split)
    if is_shards(data):
        return open_shards(data, split, classes)
    root = Path(data)
    if not root.is_dir():
        names = ", ".join(f"'{name}'" for name in (DIGITS, *CIFAR, SYNTHETIC))
        raise UserError(
            f"there is no data at {data}; give a folder with a folder of each class, or with train/ and val/, or one of "
            f"{names}."
        )
    for name, folder in CIFAR.items():
        if (root / folder).is_dir():
            return CifarSource(name, split, root)
    if (root / (TRAIN_TAR if split == "train" else VAL_TAR)).exists():
        return ImageNetSource(root, split, classes)
    if is_undivided(data):
        return FolderSource(root, classes, split)
    return FolderSource(root / split, classes)
