"""A small Google Cloud Storage on 127.0.0.1: the part of its XML API that obstore's client calls, and no more.

It stands in for emulators, none of which works with that client: one gives no ETag, another refuses the uploads. What
it does is what the XML API's reference says of: objects (GET with Range, HEAD, PUT, DELETE), the precondition
`x-goog-if-generation-match`, lists by `list-type=2` in pages, and multipart uploads. Every write gets a new generation
under one lock, so of two writers with the same precondition one is refused with 412.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000


class Object(NamedTuple):
    data: bytes
    generation: int
    etag: str
    modified: float


@dataclass
class Storage:
    """Buckets as name → key → object; `token` is the one bearer token that is let in."""

    buckets: dict[str, dict[str, Object]]
    token: str
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    count: Iterator[int] = field(default_factory=lambda: itertools.count(1 << 50))


class _Handler(BaseHTTPRequestHandler):
    storage: Storage
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: the second would wait for the receipt of the first

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        if self.headers.get("Authorization") != f"Bearer {self.storage.token}":
            self._refuse(401, "AuthenticationRequired")
        elif bucket not in self.storage.buckets:
            self._refuse(404, "NoSuchBucket")
        elif not key:
            self._list(self.storage.buckets[bucket], query)
        elif "uploads" in query or "uploadId" in query:
            self._multipart(bucket, key, query, body)
        else:
            getattr(self, f"_{self.command.lower()}")(self.storage.buckets[bucket], key, body)

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = handle_request

    def _get(self, objects: dict[str, Object], key: str, _: bytes) -> None:
        found = objects.get(key)
        if found is None:
            self._refuse(404, "NoSuchKey")
            return
        size = len(found.data)
        start, end = 0, size
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, size) if last else size
            if start >= size:
                self._refuse(416, "InvalidRange")
                return
        headers = {"ETag": found.etag, "x-goog-generation": str(found.generation)}
        headers["Last-Modified"] = formatdate(found.modified, usegmt=True)
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._answer(206 if wanted else 200, found.data[start:end], headers)

    _head = _get

    def _put(self, objects: dict[str, Object], key: str, body: bytes) -> None:
        with self.storage.lock:
            expected = self.headers.get("x-goog-if-generation-match")
            there = objects.get(key)
            if expected is not None and int(expected) != (there.generation if there else 0):
                self._refuse(412, "PreconditionFailed")
                return
            made = objects[key] = self._made(body)
        self._answer(200, b"", {"ETag": made.etag, "x-goog-generation": str(made.generation)})

    def _delete(self, objects: dict[str, Object], key: str, _: bytes) -> None:
        with self.storage.lock:
            gone = objects.pop(key, None)
        if gone is None:
            self._refuse(404, "NoSuchKey")
        else:
            self._answer(204, b"", {})

    def _multipart(self, bucket: str, key: str, query: dict[str, str], body: bytes) -> None:
        uploads = self.storage.uploads
        if "uploads" in query:
            upload = f"upload-{next(self.storage.count)}"
            uploads[upload] = {}
            self._answer_xml("InitiateMultipartUploadResult", f"<Bucket>{bucket}</Bucket><UploadId>{upload}</UploadId>")
        elif query["uploadId"] not in uploads:
            self._refuse(404, "NoSuchUpload")
        elif self.command == "PUT":
            uploads[query["uploadId"]][int(query["partNumber"])] = body
            self._answer(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        elif self.command == "DELETE":
            del uploads[query["uploadId"]]
            self._answer(204, b"", {})
        else:
            parts = uploads.pop(query["uploadId"])
            with self.storage.lock:
                made = self._made(b"".join(parts[number] for number in sorted(parts)))
                self.storage.buckets[bucket][key] = made
            self._answer_xml(
                "CompleteMultipartUploadResult",
                f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><ETag>{escape(made.etag)}</ETag>",
                {"x-goog-generation": str(made.generation)},
            )

    def _list(self, objects: dict[str, Object], query: dict[str, str]) -> None:
        after = query.get("continuation-token") or query.get("start-after") or ""
        keys = sorted(key for key in list(objects) if key.startswith(query.get("prefix", "")) and key > after)
        page = keys[: min(PAGE, int(query.get("max-keys", PAGE)))]
        cut = len(keys) > len(page)
        contents = "".join(self._listed(key, objects[key]) for key in page)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if cut else ""
        self._answer_xml("ListBucketResult", f"<IsTruncated>{str(cut).lower()}</IsTruncated>{token}{contents}")

    def _listed(self, key: str, found: Object) -> str:
        modified = datetime.fromtimestamp(found.modified, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return (
            f"<Contents><Key>{escape(key)}</Key><Size>{len(found.data)}</Size><LastModified>{modified}</LastModified>"
            f"<ETag>{escape(found.etag)}</ETag><Generation>{found.generation}</Generation></Contents>"
        )

    def _made(self, data: bytes) -> Object:
        return Object(data, next(self.storage.count), f'"{hashlib.md5(data).hexdigest()}"', time.time())

    def _answer_xml(self, root: str, content: str, headers: dict[str, str] | None = None) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?><{root}>{content}</{root}>'
        self._answer(200, text.encode(), {"Content-Type": "application/xml"} | (headers or {}))

    def _refuse(self, status: int, code: str) -> None:
        content = f"<Error><Code>{code}</Code><Message>{quote(self.path)}</Message></Error>"
        self._answer(status, content.encode(), {"Content-Type": "application/xml"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def serve(buckets: set[str], token: str) -> Iterator[str]:
    """Serve empty buckets until the block ends; gives the endpoint."""
    storage = Storage({bucket: {} for bucket in buckets}, token)
    with _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"storage": storage})) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
