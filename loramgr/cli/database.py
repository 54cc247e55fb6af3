"""`loramgr verify` and `loramgr db …`: the store and the catalog themselves."""

from __future__ import annotations

from typing import Any

import click

from loramgr.cli.lazy import Command, LazyGroup, Listed
from loramgr.cli.options import jobs_option, part
from loramgr.cli.session import Session

__all__ = ["current", "db", "rebuild", "upgrade", "verify"]

COMMANDS = {
    "current": Listed("loramgr.cli.database:current", "Show the schema's revision."),
    "upgrade": Listed("loramgr.cli.database:upgrade", "Bring the schema to the newest revision."),
    "rebuild": Listed("loramgr.cli.database:rebuild", "Make the catalog again from the logs."),
}


@click.command(cls=Command)
@click.argument("refs", nargs=-1, metavar="[REF]...")
@click.option("--quick", is_flag=True, help="Look at names and sizes only, not at the bytes.")
@click.option("--sample", type=part, metavar="N/T", help="Read the N-th of T parts; T such runs read everything.")
@click.option("--repair", is_flag=True, help="Mend what can be mended, and report what remains.")
@jobs_option
@click.pass_obj
def verify(session: Session, /, refs: tuple[str, ...], jobs: int | None, **scope: Any) -> None:
    """Read the store again and compare the catalog with the logs.

    Exit code 5 when something is damaged or missing, else 3 when something could not be read. --repair takes files
    from the trash or from a registered remote, or makes them again, and rows from the logs; what is damaged and nowhere
    else goes into quarantine.
    """
    if scope["quick"] and scope["sample"]:
        raise click.UsageError("--quick reads nothing, so there is no --sample of it.", click.get_current_context())
    check = session.workspace(jobs).verify(refs, **scope)
    damaged = bool(check.corrupt or check.missing)
    session.sink.verdict(check, not (damaged or check.unchecked), 5 if damaged else 3)


@click.group(cls=LazyGroup, table=COMMANDS)
def db() -> None:
    """Look after the catalog's schema, or rebuild it from the logs."""


@click.command(cls=Command)
@click.pass_obj
def current(session: Session) -> None:
    """Show the schema's revision."""
    session.sink.show(session.workspace().db_current())


@click.command(cls=Command)
@click.pass_obj
def upgrade(session: Session) -> None:
    """Bring the schema to the newest revision."""
    session.sink.show(session.workspace().db_upgrade())


@click.command(cls=Command)
@click.pass_obj
def rebuild(session: Session) -> None:
    """Make the catalog again from the logs."""
    session.sink.show(session.workspace().db_rebuild())
