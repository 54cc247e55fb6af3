"""A proxy on 127.0.0.1 in front of a server, which does one chosen thing wrong at the n-th request.

    with fault_proxy.serve(server.endpoint) as proxy:
        url = server.at(proxy.address).url("prefix", timeout=1)
        ...                                 # counts: proxy.requests
        proxy.plan(Fault.STALL, 3)          # counts from 1 again; the third request stalls, the others pass
        proxy.plan(Fault.ERROR_500, 3, times=2)

The request keeps its own `Host`, which signatures cover, so the server has to accept any. What is sent on is sent
whole; the answer is read whole before the first byte of it goes back, and the connection ends after it.
"""

from __future__ import annotations

import enum
import http.client
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length"})


class Fault(enum.Enum):
    """What goes wrong with a request or its answer."""

    CUT_BEFORE = "the connection is cut, the server never sees the request"
    CUT_AFTER = "the server does what it is asked, the connection is cut before the answer"
    ERROR_500 = "500 Internal Server Error"
    ERROR_503 = "503 Service Unavailable"
    ERROR_429 = "429 Too Many Requests"
    STALL_BEFORE = "nothing comes, the server never sees the request"
    STALL_AFTER = "the server does what it is asked, no answer comes"
    WRONG_BYTES = "a byte of the answer's body is another"
    TRUNCATED = "the answer's body ends in the middle, its length says more"
    SHORT_LENGTH = "the answer's length says less than the body has, the rest is lost"
    LONG_LENGTH = "the answer's length says more than the body has"
    NO_LENGTH = "the answer has no length and ends in the middle of its body"


_STATUS = {Fault.ERROR_500: 500, Fault.ERROR_503: 503, Fault.ERROR_429: 429}
_SENT_ON = frozenset(Fault) - frozenset(_STATUS) - {Fault.CUT_BEFORE, Fault.STALL_BEFORE}


@dataclass
class Proxy:
    """The proxy as a test sees it; `seen` are the requests since the last plan, as `METHOD path`.

    `wrong` is what WRONG_BYTES puts in the place of what; None for another byte in the middle.
    """

    upstream: tuple[str, int]
    address: str = ""
    stall_seconds: float = 3.0
    wrong: tuple[bytes, bytes] | None = None
    seen: list[str] = field(default_factory=list)
    faulted: list[str] = field(default_factory=list)
    _fault: Fault | None = None
    _at: range = range(0)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: threading.Event = field(default_factory=threading.Event)

    @property
    def requests(self) -> int:
        """How many requests came since the last plan."""
        return len(self.seen)

    def plan(self, fault: Fault | None, at: int = 1, times: int = 1) -> None:
        """Count from 1 again and do it to the request of that number and those after it; None lets all pass."""
        with self._lock:
            self.seen, self.faulted = [], []
            self._fault, self._at = fault, range(at, at + times)

    def next_fault(self, request: str) -> Fault | None:
        """Count a request and say what to do to it."""
        with self._lock:
            self.seen.append(request)
            if len(self.seen) not in self._at:
                return None
            self.faulted.append(request)
            return self._fault


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def handle_expect_100(self) -> bool:
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()
        return True

    def relay(self) -> None:
        self.close_connection = True
        body = self._body()
        fault = self.proxy.next_fault(f"{self.command} {self.path}")
        if fault in _STATUS:
            self._send(_STATUS[fault], {"Content-Type": "text/plain"}, b"")
        elif fault is Fault.STALL_BEFORE:
            self.proxy._done.wait(self.proxy.stall_seconds)
        if fault is None or fault in _SENT_ON:
            self._answer(fault, *self._sent_on(body))
        elif fault not in _STATUS:
            self._cut()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = relay

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _sent_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.proxy.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP and name.lower() != "expect":
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, fault: Fault | None, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        if fault is Fault.STALL_AFTER:
            self.proxy._done.wait(self.proxy.stall_seconds)
        if fault in (Fault.CUT_AFTER, Fault.STALL_AFTER):
            self._cut()
            return
        said = next((int(value) for name, value in headers if name.lower() == "content-length"), len(body))
        plain = {name: value for name, value in headers if name.lower() not in _HOP}
        if fault is None or self.command == "HEAD":
            self._send(status, plain | ({"Content-Length": str(said)} if status != 204 else {}), body)
        else:
            self._spoil(fault, status, plain, body)

    def _spoil(self, fault: Fault, status: int, headers: dict[str, str], body: bytes) -> None:
        half = len(body) // 2
        if fault is Fault.WRONG_BYTES:
            wrong = body[:half] + bytes(byte ^ 1 for byte in body[half : half + 1]) + body[half + 1 :]
            wrong = wrong if self.proxy.wrong is None else body.replace(*self.proxy.wrong)
            self._send(status, headers | {"Content-Length": str(len(body))}, wrong)
        elif fault is Fault.TRUNCATED:
            self._send(status, headers | {"Content-Length": str(len(body))}, body[:half])
        elif fault is Fault.SHORT_LENGTH:
            self._send(status, headers | {"Content-Length": str(half)}, body[:half])
        elif fault is Fault.LONG_LENGTH:
            self._send(status, headers | {"Content-Length": str(len(body) + 7)}, body)
        else:
            self._send(status, headers, body[:half])

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status >= 400 and not body and "Content-Length" not in headers:
            self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        with suppress(OSError):  # the client may have gone
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

    def _cut(self) -> None:
        """Reset the connection: an end would look like one that the server made in good order."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def shutdown_request(self, request: socket.socket) -> None:
        """Close without the usual goodbye, so that a cut connection is reset."""
        self.close_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet about clients that go away."""


@contextmanager
def serve(endpoint: str) -> Iterator[Proxy]:
    """Relay to `http://host:port` until the block ends; `proxy.address` is where to."""
    parts = urlsplit(endpoint)
    assert parts.hostname is not None
    assert parts.port is not None
    proxy = Proxy((parts.hostname, parts.port))
    with _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy})) as server:
        proxy.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy._done.set()
            server.shutdown()
            thread.join()
