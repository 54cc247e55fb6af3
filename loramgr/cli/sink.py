"""The one way out: data on stdout, everything else on stderr, for people, for programs, or only the names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

import click

from loramgr.errors import LoramgrError, UsageError

__all__ = ["Mode", "Sink", "printable"]

Mode = Literal["human", "json", "quiet"]


def printable(text: str) -> str:
    """Return the text with control characters escaped: names come from other people's files."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class Sink:
    """Shows records in one mode, chosen once by the command line."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode

    def show(self, record: Any) -> None:
        """Show a record, or a list of records of one kind; its warnings and notes go to stderr."""
        self._mention(record)
        # Here and not above: --help shows no records.
        if self.mode == "json":
            import json

            from loramgr.records import to_json

            print(json.dumps(to_json(record), indent=2, allow_nan=False))
            return
        from loramgr.cli.views import names, render

        lines = names(record) if self.mode == "quiet" else render(record)
        if lines:
            print("\n".join(map(printable, lines)))

    def verdict(self, record: Any, ok: bool, exit_code: int = 5) -> None:
        """Show the record of a check; one that is not ok ends the command with the exit code."""
        self.show(record)
        if not ok:
            click.get_current_context().exit(exit_code)

    def note(self, text: str) -> None:
        """Tell a person something beside the data; silent with `--quiet`."""
        if self.mode != "quiet":
            print(printable(text), file=sys.stderr)

    def confirm(self, what: Sequence[str], yes: bool) -> None:
        """Ask before something is destroyed; elsewhere than on a terminal only `--yes` is an answer."""
        if yes:
            return
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(f"this removes {', '.join(what)}", "repeat the command with --yes, or look with --dry-run")
        if not click.confirm(f"Remove {', '.join(map(printable, what))}?", err=True):
            raise LoramgrError("nothing removed")

    def _mention(self, record: Any) -> None:
        """Write the warnings and notes that a record carries."""
        for text in getattr(record, "warnings", ()):
            print(f"warning: {printable(text)}", file=sys.stderr)
        for text in getattr(record, "notes", ()):
            self.note(f"note: {text}")
        if record == []:
            self.note("nothing found")
