"""Downloads published files into torch.hub's cache, each once."""

from __future__ import annotations

import hashlib
import http.client
import re
import socket
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import torch
from tqdm import tqdm

from effnet_quant.errors import UserError
from effnet_quant.files import check_writable, create_folder, replace_file

TIMEOUT_SECONDS = 30
_SECONDS_TO_REACH = 3.0
_TIMMS_HOST = "huggingface.co"
_CHUNK = 1 << 20
# PyTorch's convention: name-<first digits of the SHA-256>.ext. Fewer than eight digits are no hash but a date or version.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")


def fetch(url: str) -> Path:
    """The file at ``url``, from the cache or downloaded to it.

    The cache is the folder that torch.hub uses: ``$TORCH_HOME/hub/checkpoints``, by default
    ``$XDG_CACHE_HOME/torch/hub/checkpoints`` or ``~/.cache/torch/hub/checkpoints``. A file appears there whole or not at
    all. Its SHA-256 lies beside it and is checked before each use.

    Raises:
        UserError: the server can't be reached or refuses, or the file has another length or hash than promised.
    """
    folder = _folder()
    path = folder / Path(urllib.parse.urlparse(url).path).name
    if path.is_file():
        if _intact(path):
            return path
        print(f"{path} is damaged; downloading it again", file=sys.stderr)
    create_folder(folder, "TORCH_HOME")
    check_writable(path)
    content = _download(url, path)
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(_promised_hash(path.name)):
        raise UserError(
            f"{url} sent a file with the SHA-256 {digest[:16]}…, which is not the one in its name; try again later."
        )
    replace_file(path, content)
    replace_file(_digest_file(path), f"{digest}  {path.name}\n".encode())
    return path


def within_reach(place: str) -> bool:
    """Whether it is worth trying to get published weights: they are in the cache, or their server answers within seconds.

    Behind a proxy the answer is True, because only a download tells.

    Args:
        place: a URL, or in words where timm has the weights.
    """
    parsed = urllib.parse.urlparse(place)
    if (_folder() / Path(parsed.path).name).is_file() or urllib.request.getproxies():
        return True
    try:
        socket.create_connection((parsed.hostname or _TIMMS_HOST, 443), _SECONDS_TO_REACH).close()
    except OSError:
        return False
    return True


def _folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _download(url: str, path: Path) -> bytes:
    """The whole body, kept in memory, so that an interruption leaves no partial file."""
    way_out = "try again, or get the file elsewhere and give it with --pretrained-from-file"
    content = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            length = response.headers.get("Content-Length")
            expected = int(length) if length and length.isdigit() else None
            print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
            bar = tqdm(total=expected, unit="B", unit_scale=True, mininterval=0.5 if sys.stderr.isatty() else 10)
            with bar:
                while chunk := response.read(_CHUNK):
                    content += chunk
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        raise UserError(f"can't download {url}: the server answers {error.code} {error.reason}; {way_out}.") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"can't download {url}: {getattr(reason, 'strerror', None) or reason}; {way_out}.") from error
    if expected is not None and len(content) != expected:
        raise UserError(f"the download of {url} ended after {len(content):,} of {expected:,} bytes; {way_out}.")
    return bytes(content)


def _intact(path: Path) -> bool:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    beside = _digest_file(path)
    recorded = beside.read_text(encoding="utf-8").split()[:1] if beside.is_file() else []
    return digest.hexdigest().startswith(recorded[0] if recorded else _promised_hash(path.name))


def _promised_hash(name: str) -> str:
    found = _HASH_IN_NAME.search(name)
    return found.group(1) if found else ""


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
