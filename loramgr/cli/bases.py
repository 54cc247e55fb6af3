"""`loramgr base …`: base models."""

from __future__ import annotations

import click

from loramgr.cli.lazy import Command, LazyGroup, Listed
from loramgr.cli.options import base_argument, dry_run_option, force_option, jobs_option, yes_option
from loramgr.cli.session import Session

__all__ = ["add", "base", "list_bases", "remove", "show", "verify"]

COMMANDS = {
    "add": Listed("loramgr.cli.bases:add", "Fingerprint a base model and register it."),
    "list": Listed("loramgr.cli.bases:list_bases", "List the registered bases."),
    "show": Listed("loramgr.cli.bases:show", "Show a registered base."),
    "verify": Listed("loramgr.cli.bases:verify", "Read every tensor of a base again and compare."),
    "remove": Listed("loramgr.cli.bases:remove", "Forget a base; its files stay where they are."),
}


@click.group(cls=LazyGroup, table=COMMANDS)
def base() -> None:
    """Register, check and remove base models.

    BASE is a registered name, a base digest or the first digits of one, a path to a model folder or file, or
    hf://org/name[@revision].
    """


@click.command(cls=Command)
@click.argument("source")
@click.option("--name", help="What to call it.  [default: the folder's name]")
@jobs_option
@click.pass_obj
def add(session: Session, source: str, name: str | None, jobs: int | None) -> None:
    """Fingerprint a base model and register it.

    SOURCE is a model folder, a file of tensors, or hf://org/name[@revision]. A second time, unchanged files are not
    read again.
    """
    session.sink.show(session.workspace(jobs).base_add(source, name))


@click.command(cls=Command)
@click.pass_obj
def list_bases(session: Session) -> None:
    """List the registered bases."""
    session.sink.show(session.workspace().base_list())


@click.command(cls=Command)
@base_argument
@click.pass_obj
def show(session: Session, base: str) -> None:
    """Show a registered base."""
    session.sink.show(session.workspace().base_show(base))


@click.command(cls=Command)
@base_argument
@jobs_option
@click.pass_obj
def verify(session: Session, base: str, jobs: int | None) -> None:
    """Read every tensor of a base again and compare.

    Exit code 5 when a tensor is not what was registered.
    """
    check = session.workspace(jobs).base_verify(base)
    session.sink.verdict(check, check.ok)


@click.command(cls=Command)
@base_argument
@force_option
@dry_run_option
@yes_option
@click.pass_obj
def remove(session: Session, base: str, force: bool, dry_run: bool, yes: bool) -> None:
    """Forget a base; its files stay where they are.

    Refused while versions belong to it, unless --force.
    """
    workspace = session.workspace()
    removal = workspace.base_remove(base, force=force, dry_run=True)
    if not dry_run:
        session.sink.confirm(removal.removed, yes)
        removal = workspace.base_remove(base, force=force)
    session.sink.show(removal)
