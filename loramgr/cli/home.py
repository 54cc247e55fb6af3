"""`loramgr history, du, home …`: what happened in a home, what it takes, and all of it in one archive."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from loramgr.cli.lazy import Command, LazyGroup, Listed
from loramgr.cli.session import Session

__all__ = ["du", "export_home", "history", "home", "import_home"]

COMMANDS = {
    "export": Listed("loramgr.cli.home:export_home", "Write everything into one archive."),
    "import": Listed("loramgr.cli.home:import_home", "Take in everything that an archive holds."),
}

_archive = click.argument("archive", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))


@click.command(cls=Command)
@click.argument("ref", required=False)
@click.option("--limit", type=click.IntRange(min=0), help="At most so many.")
@click.pass_obj
def history(session: Session, ref: str | None, limit: int | None) -> None:
    """Show who did what when, newest first.

    With REF only what happened to that adapter or, where REF names one, to that version; a removed one too.
    """
    session.sink.show(session.workspace().history(ref, limit=limit))


@click.command(cls=Command)
@click.option("--by", type=click.Choice(["adapter", "base"]), default="adapter", show_default=True, help="Add up by.")
@click.pass_obj
def du(session: Session, by: Literal["adapter", "base"]) -> None:
    """Show how many bytes adapters take.

    Every file counts once. Those that several names share stand in the row (shared), what only removed versions need
    in (removed), what gc has set aside in (trash).
    """
    session.sink.show(session.workspace().du(by))


@click.group(cls=LazyGroup, table=COMMANDS)
def home() -> None:
    """Put a whole home into one archive, or restore one."""


@click.command(cls=Command)
@_archive
@click.pass_obj
def export_home(session: Session, archive: Path) -> None:
    """Write everything into one archive.

    FILE, a plain tar that must not exist yet, holds every log entry, manifest and file of a version, and what is known
    of the bases' tensors; it appears whole. Others may write to the home meanwhile.
    """
    session.sink.show(session.workspace().home_export(archive))


@click.command(cls=Command)
@_archive
@click.pass_obj
def import_home(session: Session, archive: Path) -> None:
    """Take in everything that an archive holds.

    The home may be empty, or have some of it: of two logs the longer goes on. Where both went on differently, or a name
    belongs to another log, nothing is imported. Every digest is proved before anything gets a name.
    """
    session.sink.show(session.workspace().home_import(archive))
