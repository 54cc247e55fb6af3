"""A proxy on 127.0.0.1 that counts the bytes of large answers and can hold one of them back in the middle.

with gate_proxy.serve(server.endpoint) as gate:
    gate.hold_after = 20 << 20          # the next large answer stops there, and `gate.held` is set
    ...
    gate.hold_after = None
    ...                                 # gate.answers: of each large answer the Range asked for, and the bytes sent
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

LARGE = 1 << 20
_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "expect"})


@dataclass
class Gate:
    """The proxy as a test sees it."""

    upstream: tuple[str, int]
    address: str = ""
    hold_after: int | None = None
    held: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    answers: list[tuple[str | None, int]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    gate: Gate
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def relay(self) -> None:
        self.close_connection = True
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        upstream = http.client.HTTPConnection(*self.gate.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            with suppress(OSError):  # the client may have gone
                self._send(answer)
        finally:
            upstream.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay

    def _send(self, answer: http.client.HTTPResponse) -> None:
        sent, large = 0, self.command == "GET" and int(answer.getheader("Content-Length") or 0) > LARGE
        try:
            while piece := answer.read(1 << 16):
                self.wfile.write(piece)
                sent += len(piece)
                if large and self.gate.hold_after is not None and sent >= self.gate.hold_after:
                    self.wfile.flush()
                    self.gate.held.set()
                    self.gate.done.wait(60)
                    return
        finally:
            if large:
                self.gate.answers.append((self.headers.get("Range"), sent))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet about clients that go away."""


@contextmanager
def serve(endpoint: str) -> Iterator[Gate]:
    """Relay to `http://host:port` until the block ends; `gate.address` is where to."""
    parts = urlsplit(endpoint)
    assert parts.hostname is not None
    assert parts.port is not None
    gate = Gate((parts.hostname, parts.port))
    with _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"gate": gate})) as server:
        gate.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield gate
        finally:
            gate.done.set()
            server.shutdown()
            thread.join()
