"""Checks paths, and writes files atomically.

After a crash, a full disk or a signal there is the old file or the new one, never a part.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

from effnet_quant.errors import UserError

_LONGEST_NAME = 255  # bytes, as in all common file systems


def possible_path(path: str | Path) -> Path:
    """The path of something that may exist.

    Raises:
        UserError: no file can have this name: it is too long, has a NUL character or half a character.
    """
    try:
        longest = max(map(len, os.fsencode(path).split(b"/")))
        os.lstat(path)
    except ValueError as error:
        raise UserError(
            f"{path} can't be the name of a file: it has a character that none has; choose another."
        ) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # as a whole
            longest = _LONGEST_NAME + 1
    if longest > _LONGEST_NAME:
        raise UserError(f"{str(path)[:60]}… is too long for the name of a file; choose a shorter one.")
    return Path(path)


def existing_file(path: str | Path) -> Path:
    """The path of a file that exists.

    Raises:
        UserError: there is none, or it is a folder.
    """
    path = possible_path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it.")
    if not path.is_file():
        raise UserError(f"there is no file {path}; check the path.")
    return path


def create_folder(folder: Path, setting: str) -> Path:
    """Create a folder and its parents, unless they exist. Returns the folder.

    Raises:
        UserError: it can't be created. The message names ``setting``, the option or variable that chooses another place.
    """
    possible_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't create {folder}: {error.strerror}; choose another place with {setting}.") from error
    return folder


def cache_folder() -> Path:
    """The folder for downloads, indices and plans: ``$XDG_CACHE_HOME/effnet-quant``, by default in ``~/.cache``.

    Raises:
        UserError: the folder can't be created.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return create_folder(caches / "effnet-quant", "XDG_CACHE_HOME")


def check_writable(path: Path) -> None:
    """Check whether ``replace_file`` can write ``path``. Call it before long work.

    Raises:
        UserError: the folder is missing or not writable, ``path`` is a folder, a pipe or a device, or no file can have this
            name.
    """
    if possible_path(path).is_dir():
        raise UserError(f"can't write {path}: it is a folder; name a file in it.")
    if is_special(path):  # root could rename a file over /dev/null
        raise UserError(f"can't write {path}: it is a pipe or a device; name a file.")
    if not path.parent.is_dir():
        raise UserError(f"can't write {path}: there is no folder {path.parent}; create it first.")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"can't write {path}: no permission to write in {path.parent}; choose another place.")


def is_special(path: str | Path) -> bool:
    """Whether ``path`` is a pipe, a socket or a device: opening or reading it may wait forever."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def cant_write(path: Path, error: OSError) -> UserError:
    """A UserError that says why ``path`` could not be written."""
    return UserError(f"can't write {path}: {_reason(error, path)}.")


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` to a temporary file beside ``path``, fsync it and rename it over ``path``.

    Raises:
        UserError: the folder is missing or not writable, ``path`` is no regular file, or the disk is full. ``path`` then
            stays as it was.
    """
    check_writable(path)
    temporary: str | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:200]}.", delete=False) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise cant_write(path, error) from error
    finally:
        if temporary is not None and os.path.exists(temporary):  # not renamed: an error, or Ctrl-C
            os.unlink(temporary)


def _reason(error: OSError, path: Path) -> str:
    if error.errno == errno.ENOENT:
        return f"there is no folder {path.parent}; create it first"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space or choose another place"
    return f"{error.strerror or error}; choose another place"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
