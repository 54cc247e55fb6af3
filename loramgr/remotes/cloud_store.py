"""A key store in an object store: S3, Google Cloud Storage, Azure Blob Storage.

A file that fits into one request is stored on the condition that its key is absent. A larger one goes in parts, whose
end has no condition: its key names its bytes, so two clients store the same.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from loramgr.errors import ConflictError, IncompatibleError, IntegrityError, NotFoundError, UncheckedError
from loramgr.remotes.cloud_client import CloudClients, connect
from loramgr.remotes.cloud_errors import (
    errors,
    is_placeless,
    is_refused,
    is_transient,
    is_unpartial,
    is_unreadable,
    is_unsupported,
    worded,
)
from loramgr.remotes.keys import HIDDEN, check_key, folder_of
from loramgr.remotes.protocol import Capabilities, StoredKey
from loramgr.remotes.retrying import attempts, try_again
from loramgr.remotes.urls import RemoteUrl

if TYPE_CHECKING:
    from obstore import GetResult, ObjectMeta, PutMode, PutResult

__all__ = ["CloudStore"]

_ONE_REQUEST = 8 << 20
_PART = 8 << 20
_MOST_PARTS = 9000  # S3 takes 10,000
_PARTS_AT_ONCE = 4
_LARGE_AT_ONCE = 2  # files that go in parts: with 8 MiB for each of the others, a push of any files stays small
_PIECE = 1 << 18
_PAGE = 1000
_PROBES = ".probe"
_WRONG = {"s3": '"00000000000000000000000000000000"', "az": '"0x0"', "gs": "1"}
Result = TypeVar("Result")


class CloudStore:
    """The keys below the prefix of a bucket or container."""

    def __init__(self, url: RemoteUrl) -> None:
        self._url = url
        self._clients: CloudClients = connect(url)
        self._capabilities: Capabilities | None = None
        self._probing = threading.Lock()
        self._large = threading.BoundedSemaphore(_LARGE_AT_ONCE)

    @property
    def url(self) -> str:
        """The address, which has no secrets."""
        return str(self._url)

    def capabilities(self) -> Capabilities:
        """Find out, once, whether the store refuses to make a key that is there and to replace one in another state."""
        with self._probing:
            if self._capabilities is None:
                self._capabilities = Capabilities(compare_and_swap=self._probe(f"{_PROBES}/{uuid.uuid4().hex}"))
            return self._capabilities

    def head(self, key: str) -> StoredKey | None:
        """Return what the store tells of a key."""
        check_key(key)
        try:
            return self._stored(self._asked(lambda: self._clients.single.head(key)))
        except FileNotFoundError:
            return None

    def get(self, key: str, offset: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a key from an offset on; what breaks off is asked for again from where it did.

        UncheckedError when it breaks off again and again; whoever has what came before can go on from there.
        """
        check_key(key)
        position = offset
        for last in attempts():
            begun = False
            try:
                end, stream = self._opened(key, position)
                begun = True
                for piece in stream:
                    position += len(piece)
                    yield piece
            except errors() as error:
                if last or not (begun or is_unreadable(error)):
                    raise worded(self.url, error) from None
            else:
                if position == end:
                    return
        raise UncheckedError(f"{self.url}: {key} ends at {position} of {end} bytes", "try again later")

    def put_if_absent(self, key: str, source: Path | bytes) -> bool:
        """Store a key that is not there, a large file as a stream in parts; False when it is there."""
        check_key(key)
        size, data = _read_small(source)
        if data is None:
            return self._put_in_parts(key, source, size)
        try:
            try_again(lambda: self._put(key, data, "create"), is_transient)
        except errors() as error:
            if is_refused(error):
                return False
            raise worded(self.url, error) from None
        return True

    def put_if_match(self, key: str, data: bytes, token: str | None) -> str:
        """Replace a key in the state that the token names.

        A request whose answer was lost may have won: then the key has the data, and that counts as won.
        """
        check_key(key)
        if not self.capabilities().compare_and_swap:
            raise IncompatibleError(f"{self.url}: the store has no conditional writes")
        mode: PutMode = "create" if token is None else self._state(token)
        tried: list[PutMode] = []

        def put() -> str:
            tried.append(mode)
            return self._put(key, data, mode)

        try:
            return try_again(put, is_transient) or self._require(key).token
        except errors() as error:
            if not is_refused(error):
                raise worded(self.url, error) from None
        there = self.head(key) if len(tried) > 1 else None
        if there is not None and there.size == len(data) and b"".join(self.get(key)) == data:
            return there.token
        raise ConflictError(f"{self.url}: somebody else has changed {key}", "run the command again")

    def list(self, prefix: str) -> Iterator[StoredKey]:
        """Yield the keys that begin with a prefix, page by page; Google's have no tokens there.

        IntegrityError where the store twice lists what lies elsewhere.
        """
        seen: set[str] = set()
        for last in attempts():
            try:
                for found in self._listed(prefix):
                    if found.key not in seen:
                        seen.add(found.key)
                        yield found
            except errors() as error:
                if last or not is_unreadable(error):
                    raise worded(self.url, error) from None
            else:
                return

    def _listed(self, prefix: str) -> Iterator[StoredKey]:
        """Yield the keys, and those of a second listing where the first has one that lies elsewhere."""
        folder = folder_of(prefix)
        for _ in range(2):
            misplaced = None
            for page in self._clients.patient.list(folder or None, chunk_size=_PAGE):
                for found in page:
                    if folder and not found["path"].startswith(f"{folder}/"):
                        misplaced = found["path"]
                    elif found["path"].startswith(prefix) and not found["path"].startswith(HIDDEN):
                        yield self._stored(found)
            if misplaced is None:
                return
        raise IntegrityError(f"{self.url}: lists {misplaced!r} as a key in {folder}")

    def delete(self, key: str) -> None:
        """Delete a key; one that is not there is no error."""
        self._delete(check_key(key))

    def _delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._asked(lambda: self._clients.single.delete(key))

    def _probe(self, key: str) -> bool:
        self._asked(lambda: self._clients.single.put(key, b"probe", use_multipart=False))
        try:
            return self._swaps(key)
        finally:
            self._delete(key)

    def _swaps(self, key: str) -> bool:
        """Say whether a creation of what is there is refused, and a replacement that expects another state."""
        modes: tuple[PutMode, ...] = ("create", self._state(_WRONG[self._url.kind]))
        for mode in modes:
            try:
                try_again(partial(self._put, key, b"again", mode), is_transient)
            except errors() as error:
                if is_refused(error):
                    continue
                if is_unsupported(error):
                    return False
                raise worded(self.url, error) from None
            return False
        return True

    def _opened(self, key: str, offset: int) -> tuple[int, Iterator[bytes]]:
        """Return how long the key is, and the stream of its bytes from the offset on."""
        if offset:
            size = self._require(key).size
            if offset >= size:
                return offset, iter(())
        try:
            found, skipped = self._requested(key, offset)
        except FileNotFoundError as error:
            if is_placeless(error):
                raise
            raise NotFoundError(f"{self.url}: there is no {key}") from None
        pieces = map(bytes, found.stream(min_chunk_size=_PIECE))
        return found.meta["size"], _without_beginning(pieces, skipped)

    def _requested(self, key: str, offset: int) -> tuple[GetResult, int]:
        """Return the answer to a request for a key, and how many bytes it has before the offset."""
        get = self._clients.patient.get
        if not offset:
            return get(key), 0
        try:
            return get(key, options={"range": {"offset": offset}}), 0
        except errors() as error:
            if not is_unpartial(error):
                raise
        return get(key), offset

    def _put(self, key: str, data: bytes, mode: PutMode) -> str:
        return self._token(self._clients.single.put(key, data, mode=mode, use_multipart=False))

    def _put_in_parts(self, key: str, source: Path | bytes, size: int) -> bool:
        if self.head(key) is not None:
            return False
        part = max(_PART, -(-size // _MOST_PARTS))
        put = partial(self._clients.patient.put, use_multipart=True, chunk_size=part, max_concurrency=_PARTS_AT_ONCE)
        for last in attempts():
            try:
                with self._large:
                    put(key, source)
            except errors() as error:
                found = self.head(key)
                complete = found is not None and found.size == size  # only the answer to the last request was lost
                if not complete and (last or not is_unreadable(error)):
                    raise worded(self.url, error) from None
                if not complete:
                    continue
            return True
        raise AssertionError("the last attempt neither returned nor raised")

    def _asked(self, call: Callable[[], Result]) -> Result:
        """Return what the store answers; FileNotFoundError for a key that is not there, else our own errors."""
        try:
            return try_again(call, is_transient)
        except FileNotFoundError as error:
            if is_placeless(error):
                raise worded(self.url, error) from None
            raise
        except errors() as error:
            raise worded(self.url, error) from None

    def _require(self, key: str) -> StoredKey:
        found = self.head(key)
        if found is None:
            raise NotFoundError(f"{self.url}: there is no {key}")
        return found

    def _stored(self, found: ObjectMeta) -> StoredKey:
        return StoredKey(found["path"], found["size"], self._token(found), found["last_modified"])

    def _token(self, found: ObjectMeta | PutResult) -> str:
        if self._url.kind == "gs":
            return found["version"] or ""
        tag = found["e_tag"] or ""
        return tag if not tag or tag.endswith('"') else f'"{tag}"'  # some lists leave the quotes out

    def _state(self, token: str) -> PutMode:
        return {"version": token} if self._url.kind == "gs" else {"e_tag": token}


def _read_small(source: Path | bytes) -> tuple[int, bytes | None]:
    """Return the size of what is to be stored, and its bytes where they fit into one request."""
    if isinstance(source, bytes):
        return len(source), source if len(source) <= _ONE_REQUEST else None
    try:
        size = source.stat().st_size
        return size, source.read_bytes() if size <= _ONE_REQUEST else None
    except OSError as error:
        raise UncheckedError(f"{source} cannot be read: {error.strerror}") from error


def _without_beginning(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Yield the pieces without their first bytes, for a store that sends all of them whatever is asked for."""
    for piece in pieces:
        if rest := piece[count:]:
            yield rest
        count = max(0, count - len(piece))
