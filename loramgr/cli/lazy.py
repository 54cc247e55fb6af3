"""Click groups whose commands are imported when they run, so that `--help` costs no more than Click itself."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import click

__all__ = ["Command", "LazyGroup", "Listed"]


class Listed(NamedTuple):
    """A row of a group's table: where the command is, as `module:attribute`, and the line that `--help` gives it."""

    target: str
    short_help: str


def _accept_json(context: click.Context, _: click.Parameter, chosen: bool) -> None:
    """Switch the output to JSON when `--json` stands after the command instead of before it."""
    if chosen and context.obj is not None:
        context.obj.sink.mode = "json"


def _json_option() -> click.Option:
    """Return the `--json` that every command takes."""
    return click.Option(
        ["--json"],
        is_flag=True,
        expose_value=False,
        callback=_accept_json,
        help="One JSON document on stdout.",
    )


class Command(click.Command):
    """A command that also takes `--json` after its name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.params.append(_json_option())


class LazyGroup(click.Group):
    """A group with a table of commands; listing them imports none."""

    command_class = Command

    def __init__(self, *, table: Mapping[str, Listed], **kwargs: Any) -> None:
        super().__init__(no_args_is_help=False, **kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None for a name that the table lacks."""
        if cmd_name not in self.table:
            return None
        module, _, attribute = self.table[cmd_name].target.partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table's own short helps."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, listed.short_help) for name, listed in self.table.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; a name that does not exist is a usage error that proposes the nearest ones."""
        name = args[0]
        if name in self.table or name.startswith("-"):
            return super().resolve_command(ctx, args)
        from difflib import get_close_matches

        near = get_close_matches(name, self.table, n=2)
        proposal = f" Did you mean {' or '.join(near)}?" if near else ""
        raise click.UsageError(f"No such command {name!r}.{proposal}", ctx)
