"""What is asked of a Hugging Face hub, over the session, token, proxies and certificates of `huggingface_hub`.

Every request has a timeout and is repeated when it fails in passing, what has arrived of a file is not fetched again,
and no answer is read beyond its bound.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from threading import Lock
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from loramgr import __version__
from loramgr.errors import IncompatibleError, IntegrityError, NotFoundError, UncheckedError, UsageError
from loramgr.remotes.hub_errors import client_errors, is_passing, wait_asked, worded
from loramgr.remotes.hub_session import bound_sessions, bound_xet, bounded_session

__all__ = ["MAIN", "HubClient", "check_repository"]

MAIN = "main"
_ATTEMPTS = 5
_JSON_LIMIT = 64 << 20
_PAGES = 10_000
_PIECE = 1 << 18
_NEXT = re.compile(r'<([^<>\s]+)>\s*;\s*rel="?next"?')
_OLDEST = (1, 0)
_NAMED: dict[str, Any] = {"library_name": "loramgr", "library_version": __version__}

Result = TypeVar("Result")


class _Bars:
    """The client's bars, which count files of a single request and are no measure of a push."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._hides = False

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Hide them for the duration of the block, unless HF_HUB_DISABLE_PROGRESS_BARS says what to do."""
        self._enter(1)
        try:
            yield
        finally:
            self._enter(-1)

    def _enter(self, step: int) -> None:
        from huggingface_hub import constants

        utils = _library()
        with self._lock:
            if not self._inside:
                unsaid = constants.HF_HUB_DISABLE_PROGRESS_BARS is None
                self._hides = unsaid and not utils.are_progress_bars_disabled()
                if self._hides:
                    utils.disable_progress_bars()
            self._inside += step
            if not self._inside and self._hides:
                utils.enable_progress_bars()


_BARS = _Bars()


class HubClient:
    """The hub that HF_ENDPOINT names; a URL cannot name another, which would be given the token.

    Raises IncompatibleError for a `huggingface_hub` before 1.0, and every method UncheckedError for a hub that cannot
    be reached, refuses the token or is not to be asked (HF_HUB_OFFLINE), naming the repository.
    """

    def __init__(self) -> None:
        import huggingface_hub
        from huggingface_hub import constants

        version = huggingface_hub.__version__
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST:
            raise IncompatibleError(
                f"pushing to and pulling from a hub needs huggingface-hub 1.0, here is {version}",
                "pip install --upgrade huggingface-hub",
            )
        self.endpoint = constants.ENDPOINT.rstrip("/")
        self._api = huggingface_hub.HfApi(endpoint=self.endpoint, **_NAMED)
        self._patience = constants.HF_HUB_DOWNLOAD_TIMEOUT
        bound_sessions()
        for name in ("huggingface_hub.utils._http", "huggingface_hub._commit_api"):
            logging.getLogger(name).addFilter(_without_queries)

    def get_json(self, where: str, path: str, **query: Any) -> Any:
        """Return what the hub answers; NotFoundError where there is no such repository, revision or file."""
        return self.calling(where, lambda: self._fetch_json(self._address(path, query))[0])

    def get_pages(self, where: str, path: str, **query: Any) -> Iterator[Any]:
        """Yield the items of an answer that comes in pages, none of them from another host."""
        address = self._address(path, query)
        for _ in range(_PAGES):
            items, link = self.calling(where, partial(self._fetch_json, address))
            if not isinstance(items, list):
                raise IntegrityError(f"{where}: the hub's answer is no list")
            yield from items
            following = _NEXT.search(link)
            if following is None:
                return
            address = following[1]
            if urlsplit(address)[:2] != urlsplit(self.endpoint)[:2]:
                raise IntegrityError(f"{where}: the hub's next page would be on another host")
        raise IntegrityError(f"{where}: the hub's answer does not end")

    def read(self, repository: str, commit: str, path: str, limit: int) -> bytes:
        """Return a whole file, not hashed; IntegrityError for one of more bytes than the limit."""
        data = bytearray()
        for piece in self.stream(repository, commit, path):
            data += piece
            if len(data) > limit:
                raise IntegrityError(f"{repository}: {path} is larger than {limit} bytes")
        return bytes(data)

    def stream(self, repository: str, commit: str, path: str, offset: int = 0) -> Iterator[bytes]:
        """Yield a file from an offset on, not hashed; a cut transfer goes on where it was.

        Raises NotFoundError where the commit has no such file.
        """
        address = f"{self.endpoint}/{repository}/resolve/{commit}/{quote(path)}"
        where = f"{repository}: {path}"
        position, failures = offset, 0
        while True:
            with worded(where):
                try:
                    for piece in self._pieces(address, position):
                        position, failures = position + len(piece), 0
                        yield piece
                    return
                except client_errors() as error:
                    failures += 1
                    if _is_beyond(error) and position:
                        return
                    if failures == _ATTEMPTS or not is_passing(error):
                        raise
                    _rest(failures, error)

    def create(self, repository: str, *, private: bool | None) -> None:
        """Make a repository where there is none; `private` None leaves that to the account's settings."""
        call = self._api.create_repo
        self.calling(repository, lambda: call(repository, private=private, exist_ok=True, repo_type="model"))

    def delete(self, repository: str) -> None:
        """Delete a repository with all its history; one that is gone is no error."""
        self.calling(repository, lambda: self._api.delete_repo(repository, repo_type="model", missing_ok=True))

    def move(self, repository: str, target: str) -> None:
        """Give a repository another name; the hub leads from the old one to it."""
        self.calling(repository, lambda: self._api.move_repo(repository, target, repo_type="model"))

    def tag(self, repository: str, tag: str, commit: str) -> None:
        """Tag a commit; a tag of that name that is there stays as it is."""
        call = self._api.create_tag
        self.calling(repository, lambda: call(repository, tag=tag, revision=commit, exist_ok=True))

    def untag(self, repository: str, tag: str) -> None:
        """Take a tag away."""
        self.calling(repository, lambda: self._api.delete_tag(repository, tag=tag))

    def upload(self, repository: str, operation: Any) -> None:
        """Bring the content of a large file, streamed; a small one comes with the commit."""
        with worded(repository), _BARS.hidden():  # the client itself repeats what fails of it
            bounded_session()
            self._api.preupload_lfs_files(repository, [operation], revision=MAIN, free_memory=False)

    def commit(self, repository: str, operations: Sequence[Any], title: str, parent: str) -> str:
        """Ask once for a commit on top of `parent` and return it; what the client raises comes as it is."""
        bounded_session()
        call = self._api.create_commit
        with _BARS.hidden():
            return call(repository, operations, commit_message=title, revision=MAIN, parent_commit=parent).oid

    def has_xet(self, repository: str) -> bool:
        """Say whether the client and the hub both speak Xet (without which a client that does cannot upload)."""
        from huggingface_hub import constants

        if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
            return False
        try:
            self.get_json(repository, f"api/models/{repository}/xet-write-token/{MAIN}")
        except (NotFoundError, UncheckedError, IntegrityError):
            return False
        bound_xet()
        return True

    def calling(self, where: str, call: Callable[[], Result]) -> Result:
        """Make a call, again when it fails in passing, and tell in words when it fails."""
        with worded(where):
            for attempt in range(1, _ATTEMPTS):
                try:
                    bounded_session()
                    return call()
                except client_errors() as error:
                    if not is_passing(error):
                        raise
                    _rest(attempt, error)
            return call()

    def _address(self, path: str, query: Mapping[str, Any]) -> str:
        told = urlencode({name: value for name, value in query.items() if value is not None})
        return f"{self.endpoint}/{path}" + (f"?{told}" if told else "")

    def _fetch_json(self, address: str) -> tuple[Any, str]:
        """Return an answer as JSON, and the header that leads to the next page."""
        data = bytearray()
        with self._response(address, {}) as response:
            link = str(response.headers.get("Link", ""))
            for piece in response.iter_raw(_PIECE):
                data += piece
                if len(data) > _JSON_LIMIT:
                    raise IntegrityError(f"{urlsplit(address).path}: the answer is larger than {_JSON_LIMIT} bytes")
        try:
            return json.loads(bytes(data)), link
        except (ValueError, RecursionError):
            raise IntegrityError(f"{urlsplit(address).path}: the hub's answer is not JSON") from None

    def _pieces(self, address: str, offset: int) -> Iterator[bytes]:
        with self._response(address, {"Range": f"bytes={offset}-"} if offset else {}) as response:
            skipped = 0 if response.status_code == 206 else offset
            if response.status_code == 206:
                _check_range(response.headers.get("Content-Range"), offset)
            for piece in response.iter_raw(_PIECE):
                kept = piece[skipped:]
                skipped -= len(piece) - len(kept)
                if kept:
                    yield kept

    @contextmanager
    def _response(self, address: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """Open an answer; a redirect to another host is followed without the token, as the HTTP library does."""
        told = _library().build_hf_headers(headers={"Accept-Encoding": "identity", **headers}, **_NAMED)
        session = bounded_session()
        with session.stream("GET", address, headers=told, timeout=self._patience, follow_redirects=True) as response:
            if response.status_code >= 400:
                _library().hf_raise_for_status(response)
            yield response


def check_repository(repository: str) -> str:
    """Return the name of a repository; UsageError for one that no hub would take."""
    from huggingface_hub.errors import HFValidationError

    try:
        _library().validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(
            f"{repository} cannot be the name of a repository: {error}", "loramgr rename NAME NEW, and push that"
        ) from None
    return repository


def _library() -> Any:
    """Return the parts of the client that its package gives to libraries, whose types it does not export."""
    return import_module("huggingface_hub.utils")


def _check_range(told: str | None, offset: int) -> None:
    if not (told or "").strip().startswith(f"bytes {offset}-"):
        raise IntegrityError("the hub answered with another part of the file than was asked for")


def _is_beyond(error: Exception) -> bool:
    """Say whether a file ends where the request would go on: nothing is left of it."""
    return getattr(getattr(error, "response", None), "status_code", None) == 416


def _rest(attempt: int, error: Exception) -> None:
    time.sleep(max(wait_asked(error), 0.1 * 2**attempt))


def _without_queries(record: logging.LogRecord) -> bool:
    """Take out of the client's warnings what follows `?` in addresses, which signs them, and what is no warning."""
    record.msg, record.args = re.sub(r"\?[^\s'\"]*", "?…", record.getMessage()), ()
    return "binary IO buffer" not in record.msg
