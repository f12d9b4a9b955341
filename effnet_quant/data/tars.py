"""ImageNet's published tar files, read without unpacking."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from effnet_quant.data.decoding import Bytes
from effnet_quant.data.sources import EncodedSource, NameTable
from effnet_quant.errors import UserError
from effnet_quant.files import cache_folder, replace_file

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
# the first has one WordNet id per line, in the order of the validation images; the second is Kaggle's table of image and id
VAL_LABELS = ("imagenet_2012_validation_synset_labels.txt", "LOC_val_solution.csv")


class ImageNetSource(EncodedSource):
    """ILSVRC2012 from its two tar files, without unpacking them.

    The first opening reads a file's table of contents and keeps it in ``cache_folder()``. For the training images this
    takes a few minutes.

    Args:
        root: the folder with the tar files and, for validation, one of ``VAL_LABELS``.
        split: "train" or "val".
        classes: the WordNet ids that labels refer to; by default those of the split, sorted.

    Raises:
        UserError: a file is missing or is no tar file, or labels are missing.
    """

    def __init__(self, root: Path, split: str, classes: list[str] | None = None) -> None:
        self._tar = root / (TRAIN_TAR if split == "train" else VAL_TAR)
        names, self._offsets, self._sizes = _contents(self._tar, nested=split == "train")
        if split == "train":
            ids = [name.partition("/")[0] for name in names]
        else:
            by_name = _validation_labels(root, sorted(names))
            if missing := [name for name in names if name not in by_name]:
                raise UserError(f"{missing[0]} of {self._tar} has no label in {root}; complete the file of labels.")
            ids = [by_name[name] for name in names]
        self.classes = sorted(set(ids)) if classes is None else classes
        numbers = {name: number for number, name in enumerate(self.classes)}
        if unknown := sorted(set(ids) - set(numbers)):
            raise UserError(f"{self._tar} has classes that the training data lacks: {', '.join(unknown[:5])}.")
        self._names = NameTable(names)
        self.labels = torch.tensor([numbers[name] for name in ids])

    def name(self, index: int) -> str:
        """The tar file, and the image in it."""
        return f"{self._tar}:{self._names[index]}"

    def load(self, index: int) -> Bytes:
        """The image's bytes."""
        return np.fromfile(self._tar, np.uint8, count=int(self._sizes[index]), offset=int(self._offsets[index]))


def _contents(tar: Path, *, nested: bool) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, offsets and sizes of the images in a tar file; if ``nested``, in its inner tars, named ``<tar>/<image>``."""
    try:
        status = os.stat(tar)
    except OSError as error:
        raise UserError(f"{tar} can't be read ({error.strerror}); ImageNet's two tar files belong there.") from error
    key = f"{tar.resolve()} {status.st_size} {status.st_mtime_ns} {nested}"
    cached = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    try:
        with np.load(cached) as known:
            return str(known["names"]).split("\n"), known["offsets"], known["sizes"]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        print(f"warning: {cached} is damaged; {tar} is read again.", file=sys.stderr)
    names: list[str] = []
    places: list[tuple[int, int]] = []
    try:
        with open(tar, "rb") as file, tarfile.open(fileobj=file, mode="r:") as outer:
            for member in outer:
                if not member.isfile():
                    continue
                if not nested:
                    names.append(os.path.basename(member.name))
                    places.append((member.offset_data, member.size))
                    continue
                file.seek(member.offset_data)
                with tarfile.open(fileobj=file, mode="r:") as inner:
                    for image in filter(tarfile.TarInfo.isfile, inner):
                        names.append(f"{os.path.basename(member.name).removesuffix('.tar')}/{image.name}")
                        places.append((image.offset_data, image.size))
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{tar} is not a whole tar file ({error}); download it again.") from error
    if not names:
        raise UserError(f"there are no images in {tar}; download it again.")
    offsets, sizes = np.array(places, dtype=np.int64).T
    table = io.BytesIO()
    np.savez(table, names=np.array("\n".join(names)), offsets=offsets, sizes=sizes)
    replace_file(cached, table.getvalue())
    return names, offsets, sizes


def _validation_labels(root: Path, names: list[str]) -> dict[str, str]:
    """From the name of a validation image to its WordNet id."""
    for labels in map(root.joinpath, VAL_LABELS):
        if not labels.exists():
            continue
        with open(labels, encoding="utf-8", newline="") as lines:
            try:
                if labels.suffix == ".csv":
                    rows = csv.DictReader(lines)
                    return {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in rows}
                return dict(zip(names, lines.read().split(), strict=False))
            except (KeyError, IndexError, AttributeError, ValueError) as error:
                raise UserError(
                    f"{labels} is no list of labels as {' or '.join(VAL_LABELS)} is; put that file there."
                ) from error
    raise UserError(f"{root} has no labels of the validation images; put {' or '.join(VAL_LABELS)} there.")
