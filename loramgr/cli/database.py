"""`loramgr verify` and `loramgr db …`: the store and the catalog themselves."""

from __future__ import annotations

import click

from loramgr.cli.lazy import Command, LazyGroup, Listed
from loramgr.cli.options import jobs_option
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
@jobs_option
@click.pass_obj
def verify(session: Session, refs: tuple[str, ...], quick: bool, jobs: int | None) -> None:
    """Read the store again and compare the catalog with the logs.

    Exit code 5 when something is damaged or missing.
    """
    check = session.workspace(jobs).verify(refs, quick=quick)
    session.sink.verdict(check, not (check.corrupt or check.missing))


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
