"""What an object store answered, told from the errors of obstore, in words that never repeat a secret.

Its messages hold the address of the request, which may be signed, so only the status, the store's code and the kind of
failure are taken from them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from loramgr.errors import LoramgrError, NotFoundError, UncheckedError

__all__ = [
    "Answer",
    "errors",
    "is_placeless",
    "is_refused",
    "is_transient",
    "is_unpartial",
    "is_unreadable",
    "is_unsupported",
    "read_answer",
    "worded",
]

_STATUS = re.compile(r"(?:status code: |\(code: )(\d{3})(?: ([A-Za-z -]{1,40}))?")
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,60})</Code>")
_BUSY = 429
_CONFLICTS = frozenset({"ConditionalRequestConflict", "OperationAborted"})
_NOT_IMPLEMENTED = 501
_NO_PLACE = frozenset({"NoSuchBucket", "ContainerNotFound"})
_FAILURES = (
    (re.compile(r"TimedOut|kind: Timeout|operation timed out"), "nothing came within the time allowed"),
    (re.compile(r"InvalidCertificate|UnknownIssuer|certificate"), "its certificate is not trusted"),
    (re.compile(r"InvalidMessage|InvalidContentType|received corrupt message"), "it does not speak TLS there"),
    (re.compile(r"failed to lookup address|dns error"), "its host is not known"),
    (re.compile(r"URL scheme is not allowed|BadScheme"), "it asks for a connection without TLS"),
    (re.compile(r"refused", re.IGNORECASE), "the connection is refused"),
    (re.compile(r"Got invalid|response body|Header"), "its answer cannot be read"),
)
_HINT = "look at the URL, the credentials and the certificates: docs/object-stores.md"
_LASTING = re.compile(
    r"certificate|UnknownIssuer|InvalidContentType|URL scheme is not allowed|BadScheme|Name or service not known"
)
_METADATA = re.compile(r"/latest/api/token|/latest/meta-data|/computeMetadata/|/metadata/identity")


class Answer(NamedTuple):
    """What is known of a failed request: HTTP status (None where no answer came), the store's code, and in words."""

    status: int | None
    code: str
    words: str
    transient: bool


def read_answer(error: Exception) -> Answer:
    """Read an error of obstore."""
    text = str(error)
    if _METADATA.search(text):
        return Answer(None, "", "there are no credentials for it", transient=False)
    status, code = _STATUS.search(text), _CODE.search(text)
    named = code[1] if code else ""
    if status is None:
        words = next((words for pattern, words in _FAILURES if pattern.search(text)), "the connection broke")
        return Answer(None, named, words, transient=not _LASTING.search(text))
    number = int(status[1])
    words = f"it answers {number} {status[2] or ''}".rstrip() + (f" ({named})" if named else "")
    return Answer(number, named, words, _passes(number, named))


def _passes(status: int, code: str) -> bool:
    return status == _BUSY or (status >= 500 and status != _NOT_IMPLEMENTED) or code in _CONFLICTS


def errors() -> tuple[type[Exception], ...]:
    """Return what obstore raises."""
    from obstore.exceptions import BaseError

    return (BaseError, OSError)


def is_transient(error: Exception) -> bool:
    """Say whether the same request may work a moment later: busy, broken or silent connections, server errors."""
    known = isinstance(error, errors()) and not isinstance(error, FileNotFoundError)
    return known and read_answer(error).transient


def is_refused(error: Exception) -> bool:
    """Say whether a conditional write was refused because the key is there, or in another state."""
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    refused = isinstance(error, AlreadyExistsError | PreconditionError)
    return refused and not (is_transient(error) or is_placeless(error))


def is_unsupported(error: Exception) -> bool:
    """Say whether the store does not know conditional writes."""
    from obstore.exceptions import NotSupportedError

    return isinstance(error, NotSupportedError) or read_answer(error).status == _NOT_IMPLEMENTED


def is_placeless(error: Exception) -> bool:
    """Say whether the bucket or container is not there, rather than the key."""
    return read_answer(error).code in _NO_PLACE


def is_unreadable(error: Exception) -> bool:
    """Say whether an answer came and broke off or made no sense, which obstore does not ask for again by itself."""
    answer = read_answer(error)
    return answer.status is None and answer.transient and "Error performing" not in str(error)


def is_unpartial(error: Exception) -> bool:
    """Say whether the store answered a request for a part as one for the whole, which obstore does not accept."""
    return "NotPartial" in str(error)


def worded(url: str, error: Exception) -> LoramgrError:
    """Return the error for a person: NotFoundError for a bucket or container that is not there, else UncheckedError."""
    answer = read_answer(error)
    if is_placeless(error):
        return NotFoundError(f"{url}: there is no such bucket or container", "make it first, or correct the URL")
    hint = "try again later" if answer.transient else _HINT
    return UncheckedError(f"{url}: {answer.words}", hint)
