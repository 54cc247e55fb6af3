"""A small hub on 127.0.0.1: the routes that `huggingface_hub` calls to look at a repository and download files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories as name → file → bytes; `refusals` answers a repository with status and error code instead."""

    repositories: dict[str, dict[str, bytes]]
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0]).strip("/")
        parts = path.removeprefix("api/models/").split("/")
        repository = "/".join(parts[:2])
        if repository in self.hub.refusals:
            self._refuse(*self.hub.refusals[repository])
        elif repository not in self.hub.repositories:
            self._refuse(404, "RepoNotFound")
        elif len(parts) > 3 and parts[3] not in ("main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif path.startswith("api/models/"):
            self._send(json.dumps(self._listing(repository, parts[2:3] == ["tree"])).encode(), "application/json")
        else:
            self._download(repository, "/".join(parts[4:]))

    def _listing(self, repository: str, tree: bool) -> object:
        files = self.hub.repositories[repository]
        if tree:
            return [
                {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
                for name, data in files.items()
            ]
        return {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files], "private": False}

    def _download(self, repository: str, name: str) -> None:
        data = self.hub.repositories[repository].get(name)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        if self.command == "GET":
            self.hub.downloads.append(name)
        self._send(data, "application/octet-stream")

    def _send(self, data: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve the repositories until the block ends; `hub.url` is the endpoint."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
