"""A Hugging Face hub of one process: the endpoints that downloads and commits use, over HTTP on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0" * 39 + "1"


class HubServer:
    """Serves ``repositories["org/name"][filename]``, a file's bytes. ``requests`` has lines such as "HEAD /org/name"."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.private: dict[str, bool] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, code, content=b"", **headers):
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def do_HEAD(self):
                hub.requests.append(f"{self.command} {self.path}")
                parts = self.path.strip("/").split("/")
                if parts == [""]:
                    return self.answer(200)
                repository, filename = "/".join(parts[:2]), "/".join(parts[4:])
                if parts[2:4] not in (["resolve", "main"], ["resolve", COMMIT]):
                    return self.answer(404, X_Error_Code="RevisionNotFound")
                if repository not in hub.repositories:
                    return self.answer(401, X_Error_Code="RepoNotFound")
                content = hub.repositories[repository].get(filename)
                if content is None:
                    return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                digest = hashlib.sha256(content).hexdigest()
                return self.answer(200, content, ETag=f'"{digest}"', X_Repo_Commit=COMMIT)

            do_GET = do_HEAD

            def do_POST(self):
                hub.requests.append(f"{self.command} {self.path}")
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                parts = self.path.strip("/").split("/")
                if self.headers.get("Authorization") != "Bearer secret":
                    return self.answer(401)
                if parts == ["api", "repos", "create"]:
                    said = json.loads(body)
                    name = f"{said['organization']}/{said['name']}"
                    new = name not in hub.repositories
                    hub.repositories.setdefault(name, {})
                    hub.private.setdefault(name, said.get("private") or said.get("visibility") == "private")
                    answer = {"url": f"{hub.url}/{name}"}
                    return self.json(answer, 200 if new else 409)
                if parts == ["api", "validate-yaml"]:
                    return self.json({"errors": [], "warnings": []})
                name = "/".join(parts[2:4])
                if parts[4] == "preupload":
                    files = json.loads(body)["files"]
                    modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                    return self.json({"files": modes})
                assert parts[4] == "commit"
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.repositories[name][line["value"]["path"]] = content
                return self.json({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

            def json(self, content, code=200):
                self.answer(code, json.dumps(content).encode(), Content_Type="application/json")

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
