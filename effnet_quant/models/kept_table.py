"""The rows of ``effnet-quant models``, kept between runs. This file loads no library, so that kept rows come at once."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effnet_quant.errors import UserError
from effnet_quant.files import cache_folder, replace_file

FILENAME = "models.json"
_CELLS = 5  # of a row


@dataclass
class Table:
    """What earlier runs found.

    Attributes:
        names: names of models by the pattern that they match.
        rows: the cells of a model's row by its name.
    """

    names: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)


@contextmanager
def kept_table() -> Iterator[Table]:
    """The table of earlier runs. What the block adds is kept, also if it ends early.

    The file is in ``cache_folder``. It counts only for the versions of timm, torchvision and this package's ``models`` that
    wrote it. A damaged file is written anew. Without a folder to write to, nothing is kept.
    """
    versions = _versions()
    path: Path | None = None
    table = Table()
    with suppress(UserError):
        path = cache_folder() / FILENAME
        table = _read(path, versions)
    before = len(table.names), len(table.rows)
    try:
        yield table
    finally:
        if path is not None and before != (len(table.names), len(table.rows)):
            content = json.dumps({"versions": versions, "names": table.names, "rows": table.rows}, indent=1)
            with suppress(UserError):
                replace_file(path, content.encode())


def _versions() -> dict[str, str]:
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    versions = {"models": sources.hexdigest()}
    for package in ("timm", "torchvision"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _read(path: Path, versions: dict[str, str]) -> Table:
    """The file's table; an empty one if the file is missing, damaged or of other versions."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["versions"] != versions:
            return Table()
        table = Table(content["names"], content["rows"])
        right = all(map(_are_texts, table.names.values()))
        right = right and all(_are_texts(row) and len(row) == _CELLS for row in table.rows.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Table()
    return table if right else Table()


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)
