"""The one place where errors become words and exit codes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click

from loramgr.cli.sink import printable
from loramgr.errors import LoramgrError, NotFoundError, UncheckedError

__all__ = ["guarded"]

BUG = "this is a bug in loramgr"
INTERRUPTED = 130


class _Failure(NamedTuple):
    """An error as it is reported; `hint` is None where there is nothing to do."""

    kind: str
    message: str
    hint: str | None
    exit_code: int


def guarded(command: click.Command, arguments: Sequence[str]) -> int:
    """Run the command and return its exit code; what it raises is reported on stderr."""
    try:
        result = command.main(list(arguments), prog_name="loramgr", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone; without this the interpreter complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        failure = _failure(error)
        _report(failure, error, _options(arguments))
        return failure.exit_code
    return result if isinstance(result, int) else 0


def _options(arguments: Sequence[str]) -> frozenset[str]:
    """Return the arguments that can be options, so that a usage error knows of `--json` before anything is parsed."""
    options = list(arguments)
    return frozenset(options[: options.index("--")] if "--" in options else options)


def _failure(error: BaseException) -> _Failure:
    """Put an exception into words."""
    if isinstance(error, LoramgrError):
        return _Failure(error.kind, error.message, error.hint, error.exit_code)
    if isinstance(error, (click.exceptions.Abort, KeyboardInterrupt)):
        return _Failure("interrupted", "interrupted; nothing half done", None, INTERRUPTED)
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, OSError):
        return _system(error)
    return _Failure("bug", f"{BUG}: {type(error).__name__}: {error}", "report it with the traceback", 1)


def _usage(error: click.ClickException) -> _Failure:
    """Word a mistake in the call, with the help of the command it was meant for."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "loramgr"
    return _Failure("usage", error.format_message(), f"{path} --help", error.exit_code)


_SYSTEM = {
    errno.ENOSPC: ("disk full", "free some space and repeat the command; nothing half done", 1),
    errno.EDQUOT: ("disk quota exceeded", "free some space and repeat the command; nothing half done", 1),
    errno.EROFS: ("not writable, the file system is read-only", "choose another place, for example with --home", 1),
    errno.EACCES: ("not readable or not writable", "check its owner and mode, or choose another place", 1),
    errno.EPERM: ("not readable or not writable", "check its owner and mode, or choose another place", 1),
    errno.EIO: ("could not be read or written, the device reports an error", "check the disk", 3),
    errno.ENOENT: ("no such file or folder", "check the path", 4),
}
_KINDS = {error.exit_code: error.kind for error in (LoramgrError, UncheckedError, NotFoundError)}


def _system(error: OSError) -> _Failure:
    """Word what the operating system refused."""
    if error.errno == errno.ENOENT and error.filename is None:  # what os.getcwd says
        gone = "the folder that the command was called in is no longer there"
        return _Failure(_KINDS[4], gone, "cd . where a merge in place has replaced it", 4)
    reason, hint, exit_code = _SYSTEM.get(error.errno or 0, (error.strerror or str(error), None, 1))
    place = error.filename2 or error.filename
    message = f"{os.fsdecode(place)}: {reason}" if isinstance(place, (str, bytes, os.PathLike)) else reason
    return _Failure(_KINDS[exit_code], message, hint, exit_code)


def _report(failure: _Failure, error: BaseException, options: frozenset[str]) -> None:
    """Write the failure on stderr, as JSON when `--json` is given; a bug or `--debug` adds the traceback."""
    # Here and not above: a command that succeeds needs neither.
    import json
    import traceback

    trace = "".join(traceback.format_exception(error)) if failure.kind == "bug" or "--debug" in options else None
    if "--json" in options:
        body = {"kind": failure.kind, "message": failure.message, "hint": failure.hint}
        print(json.dumps({"error": body | ({"traceback": trace} if trace else {})}, indent=2), file=sys.stderr)
        return
    if trace:
        print(trace, end="", file=sys.stderr)
    print(f"error: {printable(failure.message)}" if failure.kind != "interrupted" else failure.message, file=sys.stderr)
    if failure.hint:
        print(f"hint: {printable(failure.hint)}", file=sys.stderr)
