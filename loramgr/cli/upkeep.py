"""`loramgr prune, restore, gc`: what is kept, what comes back, and what goes for good."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import click

from loramgr.cli.lazy import Command
from loramgr.cli.options import age, dry_run_option, force_option, ref_argument, yes_option
from loramgr.cli.session import Session
from loramgr.cli.views import size

__all__ = ["gc", "prune", "restore"]

BEST_HELP = "Keep the version with the highest METRIC, or the lowest after a -. Repeatable."


@click.command(cls=Command)
@click.argument("name", required=False)
@click.option("--keep-last", "last", type=click.IntRange(min=1), required=True, metavar="N", help="Keep the newest N.")
@click.option("--keep-tagged", "tagged", is_flag=True, help="Keep tagged versions, also with --force.")
@click.option("--keep-best", "best", multiple=True, metavar="METRIC", help=BEST_HELP)
@force_option
@dry_run_option
@yes_option
@click.pass_obj
def prune(session: Session, /, name: str | None, dry_run: bool, yes: bool, **keep: Any) -> None:
    """Remove old versions by a rule.

    Of every adapter, or of NAME. Without --force, tagged versions and parents of another adapter's versions stay.
    restore brings back what was removed, until gc has deleted it.
    """
    from loramgr.workspace import Retention

    workspace, retention = session.workspace(), Retention(**keep)
    removal = workspace.prune(name, retention, dry_run=True)
    if removal.removed and not dry_run:
        session.sink.confirm(removal.removed, yes)
        removal = workspace.prune(name, retention)
    session.sink.show(removal)


@click.command(cls=Command)
@ref_argument
@click.pass_obj
def restore(session: Session, ref: str) -> None:
    """Bring back what remove or prune took.

    REF that is only a name brings back what the newest removal took from that adapter. Labels and metrics come back,
    tags do not. Exit code 5 when gc has deleted a file since.
    """
    session.sink.show(session.workspace().restore(ref))


@click.command(cls=Command)
@click.option("--grace", type=age, default="24h", show_default=True, metavar="AGE", help="0, 30m, 24h, 7d.")
@click.option("--dry-run", is_flag=True, help="Show what would go; change nothing.")
@yes_option
@click.pass_obj
def gc(session: Session, grace: timedelta, dry_run: bool, yes: bool) -> None:
    """Take out of the store what nothing refers to.

    What no log refers to and is older than AGE moves into the trash, and what has been there for AGE is deleted. So
    nothing is lost before a second run. Commands that write wait meanwhile; nothing is done while something is amiss.
    """
    workspace = session.workspace()
    report = workspace.gc(grace, dry_run=True)
    if (report.removed or report.purged) and not dry_run:
        moved = f"{len(report.removed)} files ({size(report.bytes)}) into the trash"
        deleted = f"{len(report.purged)} files ({size(report.purged_bytes)}) from the trash for good"
        counts = ((report.removed, moved), (report.purged, deleted))
        session.sink.confirm([words for files, words in counts if files], yes)
        report = workspace.gc(grace)
    session.sink.show(report)
