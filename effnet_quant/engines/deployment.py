"""Deployment: deploy.json, which says how an engine's file beside it is run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effnet_quant.engines.runtimes import BACKENDS
from effnet_quant.errors import UserError
from effnet_quant.files import existing_file, replace_file

NAME = "deploy.json"
KIND, VERSION = "effnet-quant deployment", 1
_LARGEST = 2**16  # bytes of a deploy.json, which has a few hundred
_MOST_THREADS = 2**12
_PRECISIONS = ("fp32", "bf16", "fp16", "explicit")  # explicit: TensorRT, which takes them from the file


@dataclass(frozen=True)
class Deployment:
    """The engine that ``deploy`` chose.

    Attributes:
        file: name of the engine's file, in the folder of deploy.json.
        size_bytes: of that file.
        backend: the runtime.
        precision: of operations that the file leaves in floating point.
        threads: CPU threads of one call; None leaves the number to the runtime.

    Raises:
        UserError: a value of a wrong type, or an invalid one.
    """

    file: str
    size_bytes: int
    backend: str
    precision: str
    threads: int | None = None

    def __post_init__(self) -> None:
        plain = isinstance(self.file, str) and not set(self.file) & {"/", "\\", "\0"}
        if not plain or self.file in ("", ".", ".."):
            raise UserError(f"file must be the name of a file in its own folder, not {self.file!r:.80}.")
        if not _is_count(self.size_bytes, 2**63):
            raise UserError(f"size_bytes must be a number of bytes, not {self.size_bytes!r:.80}.")
        if self.backend not in BACKENDS:
            raise UserError(f"backend must be one of {', '.join(BACKENDS)}, not {self.backend!r:.80}.")
        if self.precision not in _PRECISIONS:
            raise UserError(f"precision must be one of {', '.join(_PRECISIONS)}, not {self.precision!r:.80}.")
        if self.threads is not None and not _is_count(self.threads, _MOST_THREADS):
            raise UserError(f"threads must be null or 1 to {_MOST_THREADS}, not {self.threads!r:.80}.")


def write_deployment(deployment: Deployment, folder: Path) -> Path:
    """Write deploy.json to the folder of the engine's file; returns its path.

    Raises:
        UserError: it can't be written.
    """
    path = folder / NAME
    values = {"kind": KIND, "version": VERSION, **asdict(deployment)}
    replace_file(path, (json.dumps(values, indent=1) + "\n").encode())
    return path


def is_deployment(path: str | Path) -> bool:
    """Whether a file is a deploy.json, by its name."""
    return Path(path).suffix == ".json"


def read_deployment(path: str | Path) -> tuple[Deployment, Path]:
    """Read a deploy.json. Returns its values and the path of the engine's file.

    Raises:
        UserError: it is missing, damaged or of another program, or the engine's file is missing or of another size.
    """
    path = existing_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        values = json.loads(content.decode("utf-8")) if len(content) <= _LARGEST else None
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise UserError(f"{path} is no deploy.json of effnet-quant; give the one that effnet-quant deploy wrote.")
    if values.get("version") != VERSION or isinstance(values["version"], bool):
        raise UserError(
            f"{path} has the version {values.get('version')!r:.80}, but this program reads version {VERSION}; update "
            "effnet-quant."
        )
    deployment = _deployment({name: value for name, value in values.items() if name not in ("kind", "version")}, path)
    engine = path.parent / deployment.file
    if not engine.is_file():
        raise UserError(f"{path} names {deployment.file}, which is not beside it; copy the whole folder.")
    if (size := engine.stat().st_size) != deployment.size_bytes:
        raise UserError(
            f"{engine} has {size:,} bytes, but {path.name} says {deployment.size_bytes:,}; copy the whole folder again."
        )
    return deployment, engine


def _deployment(values: dict[str, Any], path: Path) -> Deployment:
    names = set(Deployment.__dataclass_fields__)
    if different := names ^ set(values):
        raise UserError(
            f"{path} can't be used: it must have the entries {', '.join(sorted(names))}; check '{min(different):.80}'."
        )
    try:
        return Deployment(**values)
    except UserError as error:
        raise UserError(f"{path} can't be used: {error}") from error


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
