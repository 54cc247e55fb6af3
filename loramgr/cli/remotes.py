"""`loramgr remote …, push, pull, clone`: what goes to other places and comes from them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import click

from loramgr.cli.lazy import Command, LazyGroup, Listed
from loramgr.cli.options import age, connections_option, yes_option
from loramgr.cli.session import Session
from loramgr.cli.views import size
from loramgr.errors import LoramgrError

__all__ = [
    "add",
    "clone",
    "delete",
    "gc",
    "list_adapters",
    "list_remotes",
    "pull",
    "push",
    "remote",
    "remove",
    "status",
    "verify",
]

COMMANDS = {
    "add": Listed("loramgr.cli.remotes:add", "Register a remote under a name."),
    "list": Listed("loramgr.cli.remotes:list_remotes", "List the registered remotes."),
    "remove": Listed("loramgr.cli.remotes:remove", "Forget a remote; what is there stays there."),
    "list-adapters": Listed(
        "loramgr.cli.remotes:list_adapters", "List the adapters at a remote, each by its newest version."
    ),
    "status": Listed("loramgr.cli.remotes:status", "Compare the adapters here with those at a remote."),
    "verify": Listed("loramgr.cli.remotes:verify", "Read everything at a remote and compare it with its digests."),
    "delete": Listed("loramgr.cli.remotes:delete", "Delete an adapter at a remote."),
    "gc": Listed("loramgr.cli.remotes:gc", "Delete at a remote what no log there refers to."),
}

_remote_argument = click.argument("remote", required=False)
_refs_argument = click.argument("refs", nargs=-1, metavar="[REF]...")
_dry_run = click.option("--dry-run", is_flag=True, help="Show what would go; change nothing, here or there.")
_rebase = click.option("--rebase", is_flag=True, help="Where both sides went on, put what is new here after theirs.")
_tags = click.option("--tags", is_flag=True, help="Give tags to git too, on a hub; they always go with the log.")
_tags_come = click.option("--tags", is_flag=True, expose_value=False, help="Take tags along: they always come.")


@click.group(cls=LazyGroup, table=COMMANDS)
def remote() -> None:
    """Look after the places that adapters are pushed to and pulled from.

    REMOTE is a registered name or a URL: file:PATH, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX,
    hf:ORG, hf:ORG/NAME. Without it the only one registered is meant, or the one named origin.
    """


@click.command(cls=Command)
@click.argument("name")
@click.argument("url")
@click.pass_obj
def add(session: Session, name: str, url: str) -> None:
    """Register a remote under a name.

    Nothing is asked of it yet. A URL with credentials in it is refused: they belong into the places where the tools of
    that store look for them.
    """
    workspace = session.workspace()
    added = workspace.remote_add(name, url)
    session.sink.show(added)
    others = [each.name for each in workspace.remote_list() if each.url == added.url and each.name != name]
    if others:
        session.sink.note(f"note: the same remote is also called {', '.join(others)}")


@click.command(cls=Command)
@click.pass_obj
def list_remotes(session: Session) -> None:
    """List the registered remotes."""
    session.sink.show(session.workspace().remote_list())


@click.command(cls=Command)
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Show what would be forgotten; forget nothing.")
@yes_option
@click.pass_obj
def remove(session: Session, name: str, dry_run: bool, yes: bool) -> None:
    """Forget a remote; what is there stays there.

    Asks, or needs --yes, where versions of this home have their files only there.
    """
    workspace = session.workspace()
    removal = workspace.remote_remove(name, dry_run=True)
    if not dry_run:
        if count := workspace.promised_at(name):
            session.sink.confirm([f"{name}, the only place with the files of {count} versions"], yes)
        removal = workspace.remote_remove(name)
    session.sink.show(removal)


@click.command(cls=Command)
@_remote_argument
@click.pass_obj
def list_adapters(session: Session, remote: str | None) -> None:
    """List the adapters at a remote, each by its newest version.

    Exit code 5 where some cannot be read; the others are listed.
    """
    damage: dict[str, LoramgrError] = {}
    session.sink.show(session.workspace().remote_adapters(remote, damage=damage))
    _tell(damage)


@click.command(cls=Command)
@_remote_argument
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.pass_obj
def status(session: Session, remote: str | None, names: tuple[str, ...]) -> None:
    """Compare the adapters here with those at a remote.

    same; ahead: there is more here, push; behind: there is more there, pull; diverged: both, push --rebase; forked: the
    remote has several heads, push --rebase; here, there: only in one place. Exit code 5 where some cannot be read.
    """
    damage: dict[str, LoramgrError] = {}
    session.sink.show(session.workspace().remote_status(remote, names, damage=damage))
    _tell(damage)


@click.command(cls=Command)
@_remote_argument
@click.option("--quick", is_flag=True, help="Compare the sizes of files, do not read them.")
@connections_option
@click.pass_obj
def verify(session: Session, remote: str | None, quick: bool, jobs: int | None) -> None:
    """Read everything at a remote and compare it with its digests.

    Exit code 5 when something is damaged or missing, else 3 when something could not be read.
    """
    check = session.workspace(jobs).remote_verify(remote, quick=quick)
    damaged = bool(check.corrupt or check.missing)
    session.sink.verdict(check, not (damaged or check.unchecked), 5 if damaged else 3)


@click.command(cls=Command)
@click.argument("remote")
@click.argument("name")
@_dry_run
@yes_option
@click.pass_obj
def delete(session: Session, remote: str, name: str, dry_run: bool, yes: bool) -> None:
    """Delete an adapter at a remote.

    Its log goes, with all versions; their files go with the remote's next gc. Homes that have it keep it.
    """
    workspace = session.workspace()
    removal = workspace.remote_delete(remote, name, dry_run=True)
    if not dry_run:
        session.sink.confirm([f"{name} at {remote}"], yes)
        removal = workspace.remote_delete(remote, name)
    session.sink.show(removal)


@click.command(cls=Command)
@_remote_argument
@click.option("--grace", type=age, default="24h", show_default=True, metavar="AGE", help="0, 30m, 24h, 7d.")
@_dry_run
@yes_option
@click.pass_obj
def gc(session: Session, remote: str | None, grace: timedelta, dry_run: bool, yes: bool) -> None:
    """Delete at a remote what no log there refers to.

    What is younger than AGE stays: it may belong to a push that runs. What goes is gone for good.
    """
    workspace = session.workspace()
    report = workspace.remote_gc(remote, grace, dry_run=True)
    if report.removed and not dry_run:
        session.sink.confirm([f"{len(report.removed)} objects ({size(report.bytes)}) for good"], yes)
        report = workspace.remote_gc(remote, grace)
    session.sink.show(report)


@click.command(cls=Command)
@_refs_argument
@click.option("--to", "target", metavar="REMOTE", help="A registered remote or a URL.")
@click.option("--all", "everything", is_flag=True, help="Push every adapter.")
@click.option("--repair", is_flag=True, help="Read all that is there of them too, and put right what is damaged.")
@_rebase
@_tags
@_dry_run
@connections_option
@click.pass_obj
def push(session: Session, /, refs: tuple[str, ...], everything: bool, jobs: int | None, **options: Any) -> None:
    """Bring adapters to a remote.

    REF names an adapter: its whole log goes, and of its versions the files that the remote lacks. Where the log went on
    there meanwhile, nothing is overwritten: exit code 7. What is missing there of versions that were pushed before, or
    has another length, goes again; with --repair also what has other bytes.
    """
    from loramgr.workspace import PushOptions

    _check_choice(refs, everything)
    session.sink.show(session.workspace(jobs).push(refs, PushOptions(**options)))


@click.command(cls=Command)
@_refs_argument
@click.option("--from", "source", metavar="REMOTE", help="A registered remote or a URL.")
@click.option("--all", "everything", is_flag=True, help="Pull every adapter, with the files of all its versions.")
@click.option("--all-versions", is_flag=True, help="Bring the files of every version.")
@_rebase
@_tags_come
@_dry_run
@connections_option
@click.pass_obj
def pull(session: Session, /, refs: tuple[str, ...], everything: bool, jobs: int | None, **options: Any) -> None:
    """Bring adapters from a remote.

    The whole log of an adapter comes, and the files of the version that REF means, a bare name the latest one. Every
    byte is hashed before it gets a name; a pull that was cut off or killed goes on where it was. REF may also be
    hf://org/name[@revision], a repository that loramgr did not write.
    """
    from loramgr.workspace import PullOptions

    _check_choice(refs, everything)
    session.sink.show(session.workspace(jobs).pull(refs, PullOptions(**options)))


@click.command(cls=Command)
@click.argument("url")
@click.option("--name", metavar="REMOTE", help="What to call the remote.  [default: origin]")
@connections_option
@click.pass_obj
def clone(session: Session, url: str, name: str | None, jobs: int | None) -> None:
    """Register a remote and bring everything that is there.

    The home may be empty or have adapters. A second time, only what is new comes.
    """
    session.sink.show(session.workspace(jobs).clone(url, name))


def _tell(damage: dict[str, LoramgrError]) -> None:
    """End with what is wrong with adapters that could not be read, once the others are shown."""
    if damage:
        first = next(iter(damage.values()))
        raise type(first)("\n".join(error.message for error in damage.values()), first.hint)


def _check_choice(refs: tuple[str, ...], everything: bool) -> None:
    if bool(refs) == everything:
        raise click.UsageError("Name adapters, or give --all.", click.get_current_context())
