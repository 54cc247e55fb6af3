"""Writes `docs/cli.md` from the commands themselves; with `--check`, only says whether it is what they say.

python docs/generate.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from loramgr.cli.main import cli

REFERENCE = Path(__file__).parent / "cli.md"
INTRODUCTION = """\
# Command line reference

Made from the commands by `python docs/generate.py`; `make check` fails when it is out of date.
`--json` is accepted before and after every command, `-h` is `--help`. What REF, BASE and the exit codes mean is in the
[README](../README.md).
"""


def commands(context: click.Context) -> Iterator[click.Context]:
    """Yield the context of a command, then those of the commands below it, in the order of `--help`."""
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            assert command is not None, name
            yield from commands(click.Context(command, context, name))


def reference() -> str:
    """Return the whole reference as Markdown: every command's `--help` under its name."""
    # The width is given, so that no terminal has a say.
    root = cli.make_context("loramgr", [], resilient_parsing=True, terminal_width=100)
    sections = [f"## {each.command_path}\n\n```text\n{each.get_help()}\n```\n" for each in commands(root)]
    return "\n".join([INTRODUCTION, *sections])


def main() -> int:
    """Write the reference, or compare it; 1 when it is out of date."""
    text = reference()
    if "--check" not in sys.argv[1:]:
        REFERENCE.write_text(text, encoding="utf-8")
        return 0
    if REFERENCE.is_file() and REFERENCE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/cli.md is out of date: python docs/generate.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
