"""index.json, which says what a folder of shards holds: found, checked and written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet_quant.errors import UserError
from effnet_quant.files import cache_folder, replace_file

INDEX = "index.json"  # in the shards' folder: {"classes": [...], "shards": [{"file": ..., "images": ...}, ...]}
LARGEST = 2**26  # bytes
MOST_IMAGES = 2**28  # of one index; their order takes 2 GiB


@dataclass(frozen=True)
class ShardIndex:
    """What the shards of a folder hold.

    Attributes:
        classes: names of the classes, each once; labels in shards count them from 0.
        images: number of images by the shard's file. The files lie in the index's folder or below it.

    Raises:
        ValueError: a value is of a wrong type, a number is negative or too large, or a file would lie elsewhere.
    """

    classes: list[str]
    images: dict[str, int]

    def __post_init__(self) -> None:
        if not isinstance(self.classes, list) or not all(isinstance(name, str) for name in self.classes):
            raise ValueError("its classes are no list of names")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("it names a class twice")
        for file, count in self.images.items():
            if not isinstance(file, str) or not _is_below(file):
                raise ValueError(f"{file!r:.60} is no file in its folder")
            if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST_IMAGES:
                raise ValueError(f"{count!r:.40} is no number of images")
        if sum(self.images.values()) > MOST_IMAGES:
            raise ValueError(f"it counts more than {MOST_IMAGES:,} images")

    def to_json(self) -> dict[str, Any]:
        """Plain values for the file."""
        shards = [{"file": file, "images": count} for file, count in self.images.items()]
        return {"classes": self.classes, "shards": shards}

    @staticmethod
    def from_text(text: str) -> ShardIndex:
        """The index of a file's text.

        Raises:
            ValueError: the text is no index.
        """
        try:
            values = json.loads(text)
            shards = [(shard["file"], shard["images"]) for shard in values["shards"]]
            if len({file for file, _ in shards}) < len(shards):
                raise ValueError("it names a shard twice")
            return ShardIndex(values["classes"], dict(shards))
        except KeyError as error:
            raise ValueError(f"it has no entry {error}") from error
        except (TypeError, RecursionError) as error:
            raise ValueError("it is no index of shards") from error


def read_index(root: str) -> ShardIndex:
    """The index of the shards in the folder or below the URL ``root``.

    Raises:
        UserError: there is none, or it can't be used.
    """
    index = find_index(root)
    if index is None:
        raise UserError(
            f"there is no {join(root, INDEX)}, which says what the shards hold; "
            "effnet-quant data PATTERN --index makes it."
        )
    return index


def find_index(root: str) -> ShardIndex | None:
    """The same; None if there is none.

    Raises:
        UserError: it can't be used.
    """
    import fsspec

    path = join(root, INDEX)
    try:
        if "://" in root and _cached_index(root).exists():
            path = str(_cached_index(root))
        with fsspec.open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError("it is too long for an index")
        return ShardIndex.from_text(content.decode())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{path} can't be read ({error}); check the path, or make the index again.") from error


def write_index_file(root: str, index: ShardIndex) -> None:
    """Write an index beside its shards. If that can't be written to, as over HTTP, it is kept in ``cache_folder()``.

    Raises:
        UserError: it can't be written.
    """
    content = json.dumps(index.to_json(), indent=1).encode()
    if "://" not in root:
        replace_file(Path(root) / INDEX, content)
    elif not _wrote(join(root, INDEX), content):
        replace_file(_cached_index(root), content)


def join(root: str, name: str) -> str:
    """The path or URL of a file in a folder."""
    return f"{root.rstrip('/')}/{name}"


def _is_below(file: str) -> bool:
    """Whether a relative path leads to a place below where it starts, and fsspec takes it for a path."""
    parts = file.replace("\\", "/").split("/")
    return file.isprintable() and "::" not in file and "://" not in file and not {"", ".", ".."} & set(parts)


def _cached_index(root: str) -> Path:
    return cache_folder() / f"shards-{hashlib.sha256(root.encode()).hexdigest()[:24]}.json"


def _wrote(url: str, content: bytes) -> bool:
    """Try to write a file through fsspec; returns whether it worked."""
    import fsspec

    try:
        with fsspec.open(url, "wb") as file:
            file.write(content)
    except Exception:  # each store's library raises its own kinds
        return False
    return True
