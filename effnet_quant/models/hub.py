"""Gets single files of the Hugging Face hub. None of them is executed or unpickled here."""

from __future__ import annotations

import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from effnet_quant.errors import UserError
from effnet_quant.terminal import printable

TIMEOUT_SECONDS = 10
_LONGEST_JSON = 2**20  # characters; a timm model's config.json has a few hundred
_REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
_REVISION = re.compile(r"[\w-][\w./-]{0,95}")


def hub() -> ModuleType:
    """The package huggingface_hub.

    Raises:
        UserError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError(
            "the Hugging Face hub needs huggingface_hub; install it with: pip install 'effnet-quant[hub]'."
        ) from error
    return huggingface_hub


def endpoint() -> str:
    """The address of the hub: ``$HF_ENDPOINT``, by default https://huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def split(name: str) -> tuple[str, str | None]:
    """Repository and revision of "ORG/NAME" or "ORG/NAME@REVISION".

    Raises:
        UserError: it is neither.
    """
    repository, at, revision = name.partition("@")
    if not _REPOSITORY.fullmatch(repository) or (at and not _REVISION.fullmatch(revision)) or ".." in name:
        raise UserError(f"'{printable(name)}' is no repository of a hub; it is ORG/NAME, or ORG/NAME@REVISION.")
    return repository, revision or None


def fetch_from_hub(name: str, filename: str) -> Path | None:
    """A file of a repository, from the hub's cache or downloaded to it; None if the repository has no such file.

    If the hub can't be reached, the file that was downloaded last is used.

    Args:
        name: ORG/NAME or ORG/NAME@REVISION.
        filename: of the file.

    Raises:
        UserError: there is no such repository or revision, it can't be read, or the hub can't be reached and the file was
            never downloaded.
    """
    package = hub()
    errors = package.errors
    repository, revision = split(name)
    online = is_reachable()
    with quiet():
        try:
            return Path(
                package.hf_hub_download(
                    repository,
                    filename,
                    revision=revision,
                    local_files_only=not online,
                    endpoint=endpoint(),
                )
            )
        except errors.LocalEntryNotFoundError as error:
            raise UserError(
                f"{name} can't be downloaded: {endpoint()} can't be reached; try again, or get the files elsewhere and give "
                "them with --pretrained-from-file."
            ) from error
        except errors.EntryNotFoundError:
            return None
        except errors.RepositoryNotFoundError as error:  # and GatedRepoError
            raise UserError(
                f"{endpoint()} has no repository {repository} that you may read; check the name, or log in: hf auth login."
            ) from error
        except Exception as error:  # the package raises its own, and those of its HTTP library
            raise failed(name, error) from error


def failed(name: str, error: Exception) -> UserError:
    """A UserError with the first line of an error of the hub."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return UserError(f"{name} at {endpoint()}: {printable(reason)}; try again later.")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a small JSON file from the hub.

    Raises:
        UserError: it is larger, or no mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LONGEST_JSON + 1)
        content = json.loads(text) if len(text) <= _LONGEST_JSON else None
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} from the hub holds no settings of a model; check the repository.")
    return content


def is_reachable() -> bool:
    """Whether the hub answers. One question here saves a minute of huggingface_hub's retries, file by file."""
    if hub().constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint(), method="HEAD"), timeout=TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError:  # also an answer
        return True
    except (OSError, ValueError):
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Silence huggingface_hub's warnings, such as a line for each retry, in a ``with`` block."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
