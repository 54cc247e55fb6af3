"""A Hugging Face hub on 127.0.0.1, whose large files lie on 127.0.0.2: repositories with commits, tags and LFS.

It speaks the routes that `huggingface_hub` 1.x and 2.x call, takes a commit only where `parentCommit` is the head,
and can be told to fail at any request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

MAIN = "main"
_PART = 1 << 20  # bytes of a part of a multipart upload


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    data: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        content = pointer.encode() if self.is_lfs else self.data
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.data), "pointerSize": len(content)}} if self.is_lfs else {}
        return {"type": "file", "path": path, "oid": oid, "size": len(self.data), **lfs}


@dataclass(frozen=True)
class Commit:
    """A commit with all its files."""

    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """A repository: its history, its one branch, its tags, and who may see it."""

    name: str
    private: bool = False
    gated: bool = False
    history: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], title: str) -> Commit:
        parent = self.history[-1].oid if self.history else None
        told = json.dumps([self.name, parent, title, sorted((path, blob.sha256) for path, blob in files.items())])
        made = Commit(hashlib.sha1(told.encode()).hexdigest(), parent, title, files)
        self.history.append(made)
        return made

    def at(self, revision: str) -> Commit | None:
        oid = self.tags.get(revision, revision)
        if revision == MAIN:
            return self.history[-1]
        return next((commit for commit in self.history if commit.oid == oid), None)


Fault = Callable[[str, str], str | int | None]


@dataclass
class FakeHub:
    """What the server knows and how it behaves.

    `fault` is asked at every request, method and path, and answers None or what goes wrong: a status, "cut" (before
    anything is done), "lost" (it is done, and no answer comes), "stall", "truncate", "flip" and "flip inside" (a byte
    of the body is another), "short" and "long" (the length says less or more than the body has). `requests` are all
    that came, with their headers; `uploads` the digests of large files that were put.
    """

    token: str = "hf_secret_of_the_tests"
    wrong_parent: int = 412
    page: int = 1000
    multipart: int = 8 << 20
    has_xet: bool = False
    redirects: bool = True
    lists_files: bool = True
    fault: Fault | None = None
    stall: float = 5.0
    repositories: dict[str, Repository] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    url: str = ""
    files_url: str = ""

    def create(self, name: str, files: dict[str, bytes] | None = None, **settings: Any) -> Repository:
        """Make a repository as the hub does, with one commit; `files` come with a second one."""
        repository = self.repositories[name] = Repository(name, **settings)
        repository.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        if files:
            self.push(name, files)
        return repository

    def push(self, name: str, files: dict[str, bytes], title: str = "by hand") -> Commit:
        """Commit files by hand, whatever the head is."""
        repository = self.repositories[name]
        blobs = {path: Blob(data, is_large(path, len(data))) for path, data in files.items()}
        self.storage.update({blob.sha256: blob.data for blob in blobs.values() if blob.is_lfs})
        return repository.commit({**repository.history[-1].files, **blobs}, title)


def is_large(path: str, size: int) -> bool:
    """Say whether the hub takes a file by LFS."""
    return size > 10 << 20 or (size > 0 and path.endswith((".safetensors", ".bin", ".model")))


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(code)
        self.status, self.code, self.message = status, code, message or code


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body leave together: apart, each answer waits 40 ms for an acknowledgement

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._handle
        raise AttributeError(name)

    def _handle(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = {key: values[-1] for key, values in parse_qs(query).items()}
        self.body = self._read()
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, dict(self.headers)))
            fault = self.hub.fault(self.command, self.path) if self.hub.fault else None
        self.fault = fault
        if fault == "stall":
            time.sleep(self.hub.stall)
        if fault in ("cut", "stall"):
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._send(fault, b"the server is unwell", {"Retry-After": "0"})
            return
        try:
            with self.hub.lock:
                self._route(path.strip("/"))
        except _Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            body = json.dumps({"error": refusal.message}).encode()
            self._send(refusal.status, body, {name: text for name, text in headers.items() if text})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if self.fault == "lost":
            self.close_connection = True
            return
        if self.fault == "flip" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        if self.fault == "flip inside" and body:
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        length = {"short": len(body) // 2, "long": len(body) + 7}.get(str(self.fault), len(body))
        self.close_connection = self.close_connection or self.fault in ("short", "long")
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            if self.fault == "truncate":
                body, self.close_connection = body[: len(body) // 2], True
            self.wfile.write(body)

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _payload(self) -> Any:
        return json.loads(self.body)

    def _route(self, path: str) -> None:
        for pattern, function in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                function(self, **{name: unquote(text) for name, text in found.groupdict().items() if text is not None})
                return
        raise _Refusal(404, "", f"no route {self.command} {path}")

    # access

    @property
    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _writer(self) -> None:
        if not self._is_known:
            raise _Refusal(401, "", "Invalid username or password.")

    def _repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(self.hub.moved.get(name, name))
        if repository is None or (repository.private and not self._is_known):
            raise _Refusal(404 if self._is_known else 401, "RepoNotFound", "Repository not found")
        return repository

    def _commit(self, name: str, revision: str) -> tuple[Repository, Commit]:
        repository = self._repository(name)
        commit = repository.at(revision)
        if commit is None:
            raise _Refusal(404, "RevisionNotFound", "Invalid rev id")
        return repository, commit

    # repositories

    def whoami(self) -> None:
        self._writer()
        self._json({"name": "tester", "type": "user", "auth": {"type": "access_token"}})

    def create(self) -> None:
        self._writer()
        said = self._payload()
        name = f"{said['organization'] or 'tester'}/{said['name']}"
        if name in self.hub.repositories:
            url = json.dumps({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            self._send(409, url.encode(), {"Content-Type": "application/json"})
            return
        self.hub.create(name, private=said.get("visibility") == "private" or bool(said.get("private")))
        self.hub.moved.pop(name, None)
        self._json({"url": f"{self.hub.url}/{name}"})

    def delete(self) -> None:
        self._writer()
        said = self._payload()
        del self.hub.repositories[self._repository(f"{said['organization']}/{said['name']}").name]
        self._json({})

    def move(self) -> None:
        self._writer()
        said = self._payload()
        repository = self._repository(said["fromRepo"])
        if said["toRepo"] in self.hub.repositories:
            raise _Refusal(409, "", "exists")
        self.hub.repositories[said["toRepo"]] = self.hub.repositories.pop(repository.name)
        self.hub.moved.pop(said["toRepo"], None)
        self.hub.moved[repository.name] = said["toRepo"]
        repository.name = said["toRepo"]
        self._json({})

    def models(self) -> None:
        found = [
            self._listed(repository)
            for name, repository in sorted(self.hub.repositories.items())
            if name.startswith(f"{self.query.get('author')}/") and (self._is_known or not repository.private)
        ]
        self._paged(found)

    def _listed(self, repository: Repository) -> dict[str, Any]:
        tags = re.findall(r"(?m)^- ([\w:./-]+)$", self._card(repository).partition("\n---")[0])
        told = {"id": repository.name, "tags": tags, "private": repository.private}
        files = [{"rfilename": path} for path in repository.history[-1].files]
        return {**told, "siblings": files} if self.query.get("full") and self.hub.lists_files else told

    def _card(self, repository: Repository) -> str:
        card = repository.history[-1].files.get("README.md")
        return "" if card is None else card.data.decode()

    def info(self, name: str, revision: str = MAIN) -> None:
        if name in self.hub.moved:
            self._send(307, b"", {"Location": self.path.replace(name, self.hub.moved[name])})
            return
        repository, commit = self._commit(name, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        told = {"id": repository.name, "modelId": repository.name, "sha": commit.oid, "siblings": siblings}
        self._json({**told, "private": repository.private, "gated": "manual" if repository.gated else False})

    def refs(self, name: str) -> None:
        repository = self._repository(name)
        branch = {"name": MAIN, "ref": f"refs/heads/{MAIN}", "targetCommit": repository.history[-1].oid}
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repository.tags.items()]
        self._json({"branches": [branch], "converts": [], "tags": tags})

    def tag(self, name: str, revision: str) -> None:
        self._writer()
        repository, commit = self._commit(name, revision)
        tag = self._payload()["tag"]
        if tag in repository.tags:
            raise _Refusal(409, "", f"Tag {tag} already exists")
        repository.tags[tag] = commit.oid
        self._json({})

    def untag(self, name: str, tag: str) -> None:
        self._writer()
        if self._repository(name).tags.pop(tag, None) is None:
            raise _Refusal(404, "RevisionNotFound", "no such tag")
        self._json({})

    def commits(self, name: str, revision: str) -> None:
        repository, commit = self._commit(name, revision)
        until = repository.history.index(commit)
        when = "2026-01-01T00:00:00.000Z"
        told = [
            {"id": each.oid, "title": each.title, "message": "", "date": when, "authors": []}
            for each in reversed(repository.history[: until + 1])
        ]
        self._paged(told)

    # files

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        _, commit = self._commit(name, revision)
        start = f"{folder}/" if folder else ""
        found = [blob.entry(path) for path, blob in sorted(commit.files.items()) if path.startswith(start)]
        if folder and not found:
            raise _Refusal(404, "EntryNotFound", "no such folder")
        self._paged(found)

    def _paged(self, items: list[Any]) -> None:
        begin = int(self.query.get("cursor", 0))
        end = begin + self.hub.page
        link = {}
        if end < len(items):
            path, _, query = self.path.partition("?")
            rest = "&".join(part for part in query.split("&") if part and not part.startswith("cursor="))
            link = {"Link": f'<{self.hub.url}{path}?{rest}&cursor={end}>; rel="next"'}
        self._json(items[begin:end], link)

    def paths(self, name: str, revision: str) -> None:
        _, commit = self._commit(name, revision)
        asked = self._payload()["paths"]
        self._json([commit.files[path].entry(path) for path in asked if path in commit.files])

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository, commit = self._commit(name, revision)
        if repository.gated and not self._is_known:
            raise _Refusal(403, "GatedRepo", "Access is restricted")
        blob = commit.files.get(path)
        if blob is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if not blob.is_lfs:
            oid = blob.entry(path)["oid"]
            self._bytes(blob.data, {**headers, "ETag": f'"{oid}"'})
            return
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        if not self.hub.redirects:
            self._bytes(blob.data, {**headers, "ETag": f'"{blob.sha256}"'})
            return
        signed = f"{self.hub.files_url}/storage/{blob.sha256}?Signature=presigned_secret"
        self._send(302, b"", {**headers, "Location": signed})

    def stored(self, oid: str) -> None:
        if oid not in self.hub.storage:
            raise _Refusal(404)
        self._bytes(self.hub.storage[oid], {"ETag": f'"{oid}"'})

    def _bytes(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, data, headers)
            return
        begin, end = int(wanted[1]), int(wanted[2]) + 1 if wanted[2] else len(data)
        if begin >= len(data):
            raise _Refusal(416)
        self._send(206, data[begin:end], {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"})

    # commits

    def validate(self) -> None:
        content = self._payload()["content"]
        if not content.startswith("---\n"):
            self._json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
            return
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        self._writer()
        _, commit = self._commit(name, revision)
        answers = []
        for file in self._payload()["files"]:
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            there = commit.files.get(file["path"])
            oid = {} if there is None else {"oid": there.sha256 if there.is_lfs else there.entry("")["oid"]}
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        self._json({"files": answers})

    def batch(self, name: str) -> None:
        self._writer()
        self._repository(name)
        objects = []
        for asked in self._payload()["objects"]:
            oid, size = asked["oid"], asked["size"]
            told: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.storage:
                verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/verify"}
                upload: dict[str, Any] = {"href": f"{self.hub.files_url}/storage/{oid}?Signature=presigned_secret"}
                if size > self.hub.multipart:
                    numbers = range(1, -(-size // _PART) + 1)
                    parts = {str(n): f"{self.hub.files_url}/part/{oid}/{n}?Signature=presigned_secret" for n in numbers}
                    upload = {
                        "href": f"{self.hub.files_url}/complete/{oid}",
                        "header": {"chunk_size": str(_PART), **parts},
                    }
                told["actions"] = {"upload": upload, "verify": verify}
            objects.append(told)
        self._json({"objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "", "content does not match its name")
        self.hub.storage[oid] = self.body
        self.hub.uploads.append(oid)
        self._send(200)

    def store_part(self, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self.body
        self._send(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in self._payload()["parts"]]
        self.body = b"".join(self.hub.parts.pop((oid, number)) for number in numbers)
        self.store(oid)

    def verify(self, name: str) -> None:
        said = self._payload()
        if len(self.hub.storage.get(said["oid"], b"")) != said["size"]:
            raise _Refusal(404)
        self._json({})

    def commit(self, name: str, revision: str) -> None:
        self._writer()
        repository = self._repository(name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        head = repository.history[-1]
        if revision != MAIN:
            raise _Refusal(404, "RevisionNotFound", "not a branch")
        if header.get("parentCommit") not in (None, head.oid):
            raise _Refusal(self.hub.wrong_parent, "", "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            _apply(self.hub, files, line["key"], line["value"])
        made = repository.commit(files, header["summary"])
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}", "commitOid": made.oid})

    def xet(self, name: str, revision: str) -> None:
        if not self.hub.has_xet:
            raise _Refusal(404, "", "no Xet here")
        self._json(
            {}, {"X-Xet-Cas-Url": "http://127.0.0.1:9", "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": "0"}
        )


def _apply(hub: FakeHub, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"]), False)
    elif key == "lfsFile":
        if value["oid"] not in hub.storage:
            raise _Refusal(400, "", f"the large file {value['oid']} was not uploaded")
        files[path] = Blob(hub.storage[value["oid"]], True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise _Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
    elif key == "deletedFolder":
        for each in [each for each in files if each.startswith(path.rstrip("/") + "/")]:
            del files[each]


_ID = r"(?P<name>[^/]+/[^/]+)"
_REV = r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET api/whoami-v2", _Handler.whoami),
    (r"POST api/repos/create", _Handler.create),
    (r"DELETE api/repos/delete", _Handler.delete),
    (r"POST api/repos/move", _Handler.move),
    (r"POST api/validate-yaml", _Handler.validate),
    (r"GET api/models", _Handler.models),
    (rf"GET api/models/{_ID}", _Handler.info),
    (rf"GET api/models/{_ID}/revision/{_REV}", _Handler.info),
    (rf"GET api/models/{_ID}/refs", _Handler.refs),
    (rf"GET api/models/{_ID}/commits/{_REV}", _Handler.commits),
    (rf"GET api/models/{_ID}/tree/{_REV}(/(?P<folder>.+))?", _Handler.tree),
    (rf"GET api/models/{_ID}/xet-(write|read)-token/{_REV}", _Handler.xet),
    (rf"POST api/models/{_ID}/paths-info/{_REV}", _Handler.paths),
    (rf"POST api/models/{_ID}/preupload/{_REV}", _Handler.preupload),
    (rf"POST api/models/{_ID}/commit/{_REV}", _Handler.commit),
    (rf"POST api/models/{_ID}/tag/{_REV}", _Handler.tag),
    (rf"DELETE api/models/{_ID}/tag/(?P<tag>[^/]+)", _Handler.untag),
    (r"POST (?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    (r"POST (?P<name>[^/]+/[^/]+)\.git/info/lfs/verify", _Handler.verify),
    (rf"(GET|HEAD) {_ID}/resolve/{_REV}/(?P<path>.+)", _Handler.resolve),
    (r"(GET|HEAD) storage/(?P<oid>[0-9a-f]{64})", _Handler.stored),
    (r"PUT storage/(?P<oid>[0-9a-f]{64})", _Handler.store),
    (r"PUT part/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)", _Handler.store_part),
    (r"POST complete/(?P<oid>[0-9a-f]{64})", _Handler.complete),
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up: tests cut connections on purpose."""


@contextmanager
def serve_hub(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve until the block ends; `hub.url` is the endpoint, `hub.files_url` where large files lie."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with _Server(("127.0.0.1", 0), handler) as server, _Server(("127.0.0.2", 0), handler) as files:
        servers = (server, files)
        threads = [threading.Thread(target=each.serve_forever, kwargs={"poll_interval": 0.02}) for each in servers]
        for thread in threads:
            thread.start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        hub.files_url = f"http://127.0.0.2:{files.server_address[1]}"
        try:
            yield hub
        finally:
            for each in servers:
                each.shutdown()
            for thread in threads:
                thread.join()
