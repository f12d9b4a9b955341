"""Downloads from a real server on this machine: whole, cut short, damaged, refused, unreachable."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from effnet_quant import UserError
from effnet_quant.models.download import fetch

CONTENT = bytes(range(256)) * 20_000  # 5 MB
DIGEST = hashlib.sha256(CONTENT).hexdigest()
WHOLE, HASHED, WRONG_HASH = "whole.pth", f"net-{DIGEST[:8]}.pth", "net-00000000.pth"


@dataclass
class Server:
    """Serves CONTENT under any name; "short…" promises more than it sends, "gone…" is answered with 404."""

    url: str
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/")
            running.requests.append(name)
            if name.startswith("gone"):
                self.send_error(404)
                return
            self.send_response(200)
            if not name.startswith("unsized"):
                self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[: len(CONTENT) // 2] if name.startswith("short") else CONTENT)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        running = Server(f"http://127.0.0.1:{listening.server_port}")
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield running
        listening.shutdown()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that torch.hub keeps downloads in, empty."""
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "torch" / "hub" / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("name", [WHOLE, HASHED, "unsized.pth"])
def test_a_file_is_downloaded_once(server: Server, cache: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = fetch(f"{server.url}/{name}")
    assert path == cache / name
    assert path.read_bytes() == CONTENT
    assert (cache / f"{name}.sha256").read_text() == f"{DIGEST}  {name}\n"  # what sha256sum -c reads
    assert f"downloading {server.url}/{name} to {path}" in capfd.readouterr().err
    assert fetch(f"{server.url}/{name}") == path
    assert server.requests == [name]
    assert capfd.readouterr().err == ""
    assert names(cache) == sorted([name, f"{name}.sha256"])


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_file_damaged_in_the_cache_is_downloaded_again(server: Server, cache: Path, damage: str) -> None:
    path = fetch(f"{server.url}/{WHOLE}")
    path.write_bytes(CONTENT[:-1] if damage == "cut" else b"x" + CONTENT[1:])
    assert fetch(f"{server.url}/{WHOLE}").read_bytes() == CONTENT
    assert server.requests == [WHOLE, WHOLE]


def test_a_file_that_torch_hub_downloaded_is_used_and_checked(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    torch.hub.download_url_to_file(f"{server.url}/{HASHED}", str(cache / HASHED), DIGEST[:8], progress=False)
    fetch(f"{server.url}/{HASHED}")
    assert server.requests == [HASHED]
    (cache / HASHED).write_bytes(b"half")
    assert fetch(f"{server.url}/{HASHED}").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("short.pth", r"ended after 2,560,000 of 5,120,000 bytes; try again.*--pretrained-from-file"),
        ("gone.pth", r"the server answers 404 Not Found.*--pretrained-from-file"),
        (WRONG_HASH, rf"SHA-256 {DIGEST[:16]}…, which is not the one in its name"),
    ],
)
def test_a_bad_download_gets_one_sentence_and_leaves_nothing(server: Server, cache: Path, name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        fetch(f"{server.url}/{name}")
    assert names(cache) == []


def test_an_unreachable_server_gets_one_sentence(cache: Path) -> None:
    with pytest.raises(
        UserError, match=r"can't download http://127\.0\.0\.1:9/w\.pth: .*refused.*--pretrained-from-file"
    ):
        fetch("http://127.0.0.1:9/w.pth")
    assert names(cache) == []


def test_an_interruption_leaves_nothing_and_the_old_file_as_it_was(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(f"{server.url}/{WHOLE}")
    path.write_bytes(b"damaged")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("effnet_quant.models.download.tqdm.update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{server.url}/{WHOLE}")
    assert path.read_bytes() == b"damaged"
    assert names(cache) == [WHOLE, f"{WHOLE}.sha256"]


def test_a_cache_that_cannot_be_written_gets_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"can't create .*choose another place with TORCH_HOME"):
        fetch("http://127.0.0.1:9/w.pth")
