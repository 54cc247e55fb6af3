"""The errors a person can meet: what happened, what to do next, and the exit code that scripts rely on."""

from __future__ import annotations

__all__ = [
    "ConflictError",
    "IncompatibleError",
    "IntegrityError",
    "LoramgrError",
    "NotFoundError",
    "RacedError",
    "UncheckedError",
    "UsageError",
]


class LoramgrError(Exception):
    """An expected failure, in words for the person who meets it.

    `message` names the thing, `hint` is the next command or None where there is nothing to do;
    `exit_code` and `kind` are what the command line and its JSON report.
    """

    exit_code = 1
    kind = "failed"

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(LoramgrError):
    """The call itself is wrong: a malformed name, reference, digest or option."""

    exit_code = 2
    kind = "usage"


class UncheckedError(LoramgrError):
    """Something could not be read, so nothing can be said about it: not a pass."""

    exit_code = 3
    kind = "unchecked"


class NotFoundError(LoramgrError):
    """No adapter, version, base, remote or file of that name."""

    exit_code = 4
    kind = "not_found"


class IntegrityError(LoramgrError):
    """Bytes are missing, damaged, or not those that their digest names."""

    exit_code = 5
    kind = "integrity"


class IncompatibleError(LoramgrError):
    """The parts do not fit: another base, an unsupported variant, wrong shapes, a quantized base."""

    exit_code = 6
    kind = "incompatible"


class ConflictError(LoramgrError):
    """Somebody else holds the name, the tag or the lock, or has moved on since we looked."""

    exit_code = 7
    kind = "conflict"


class RacedError(ConflictError):
    """A log has moved on since it was read: who reads it again and rebases may go on."""
