"""Turns what the hub's client raises into errors for the person, without what a signed address or a header reveals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loramgr.errors import ConflictError, LoramgrError, NotFoundError, UncheckedError, UsageError

__all__ = ["MOVED_ON", "client_errors", "is_passing", "status_of", "wait_asked", "worded"]

MOVED_ON = (409, 412)  # what hubs answer to a commit whose parent is not the head
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_LOGIN = "hf auth login"
_AGAIN = "try again when the hub can be reached"
_QUERY = re.compile(r"\?[^\s'\">)]*")
_TOKEN = re.compile(r"\b(?:hf|api)_\w+|Bearer \S+")
_LIMITED = re.compile(r"r=0\s*;\s*t=(\d{1,6})")  # nothing is left, and for how many seconds
_LONGEST_WAIT = 60.0


@contextmanager
def worded(where: str) -> Iterator[None]:
    """Turn errors of the client and its HTTP library into a LoramgrError whose message begins with `where`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UsageError(f"{where}: {_said(error)}") from None
    except client_errors() as error:
        raise _in_words(where, error) from None  # the cause names addresses that are signed


def client_errors() -> tuple[type[Exception], ...]:
    """Return what the client raises when a request fails, is refused, or is answered with nonsense."""
    return (*_transport_errors(), RuntimeError, ValueError, KeyError, TypeError)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that made the error, None where there was no answer."""
    status = getattr(getattr(_cause(error), "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def is_passing(error: BaseException) -> bool:
    """Say whether the same request may succeed a little later: the connection failed, or the server was unwell."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = status_of(error)
    if status is not None:
        return status in _PASSING
    cause = _cause(error)
    if isinstance(cause, json.JSONDecodeError):  # a page of something in between, whose status the client passed over
        return True
    return isinstance(cause, _transport_errors()) and not isinstance(cause, OfflineModeIsEnabled)


def wait_asked(error: BaseException) -> float:
    """Return for how many seconds the server asked to be left alone, a minute at most; 0 where it did not."""
    headers = getattr(getattr(_cause(error), "response", None), "headers", {})
    limited = _LIMITED.search(str(headers.get("RateLimit", "")))
    asked = limited[1] if limited else str(headers.get("Retry-After", "")).strip()
    return min(float(asked), _LONGEST_WAIT) if asked.isdigit() else 0.0


def _cause(error: BaseException) -> BaseException:
    """Return what went wrong beneath the error that the client raises for a failed upload."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _in_words(where: str, error: BaseException) -> LoramgrError:
    from huggingface_hub import errors

    cause, status = _cause(error), status_of(error)
    if isinstance(cause, (errors.RevisionNotFoundError, errors.EntryNotFoundError)):
        return NotFoundError(f"{where}: no such revision or file on the hub", "check the name")
    if isinstance(cause, errors.RepositoryNotFoundError) and status == 404:
        return NotFoundError(f"{where}: no such repository on the hub", f"check the name; if it is private, {_LOGIN}")
    if status in MOVED_ON:
        return ConflictError(f"{where}: something else was there first: {_said(cause)}", "push again")
    why, hint = _refusal(cause, status)
    return UncheckedError(f"{where}: {why}", hint)


def _refusal(cause: BaseException, status: int | None) -> tuple[str, str]:
    """Return why nothing came of a request, and what to do."""
    from huggingface_hub import errors

    if isinstance(cause, errors.OfflineModeIsEnabled):
        return "the hub is not asked while HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    if isinstance(cause, errors.GatedRepoError):
        return "the repository asks for its terms to be accepted first", f"accept them on its page, then run {_LOGIN}"
    if status == 401:
        return "the hub shows it to nobody that it does not know, or there is no such repository", _LOGIN
    if status == 403:
        return f"the hub does not allow it: {_said(cause)}", _LOGIN
    return f"the hub cannot be asked: {_said(cause)}", _AGAIN


def _said(error: BaseException) -> str:
    """Return the first line of what the error says, without the parts of addresses and headers that are secrets."""
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return _TOKEN.sub("…", _QUERY.sub("?…", line))


def _transport_errors() -> tuple[type[Exception], ...]:
    """Return what the client and its HTTP library raise; which library that is depends on the client's version."""
    from huggingface_hub import errors

    failed: type[Any] = errors.HfHubHTTPError
    library = [base for base in failed.__mro__ if base.__name__ == "HTTPError"]
    return (failed, ConnectionError, TimeoutError, *library)
