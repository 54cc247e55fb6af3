"""`loramgr tag, untag, label, metric, rename, bind, remove`: what is said about versions; the logs keep it all."""

from __future__ import annotations

from typing import TypeVar

import click

from loramgr.cli.lazy import Command
from loramgr.cli.options import (
    base_argument,
    dry_run_option,
    force_option,
    measurement,
    name_argument,
    pair,
    ref_argument,
    yes_option,
)
from loramgr.cli.session import Session

__all__ = ["bind", "label", "metric", "remove", "rename", "tag", "untag"]

Value = TypeVar("Value")


def _changes(pairs: tuple[tuple[str, Value], ...], removed: tuple[str, ...]) -> dict[str, Value | None]:
    """Return what to set, and None for what to drop; a usage error when that is nothing."""
    if not (pairs or removed):
        raise click.UsageError("Nothing to set and nothing to drop.", click.get_current_context())
    return {**dict.fromkeys(removed), **dict(pairs)}


@click.command(cls=Command)
@ref_argument
@click.argument("tag")
@click.option("--move", is_flag=True, help="Take the tag from the version that has it.")
@click.pass_obj
def tag(session: Session, ref: str, tag: str, move: bool) -> None:
    """Give a version a movable name."""
    session.sink.show(session.workspace().tag(ref, tag, move=move))


@click.command(cls=Command)
@click.argument("tagged", metavar="NAME@TAG")
@click.pass_obj
def untag(session: Session, tagged: str) -> None:
    """Take a tag away."""
    session.sink.show(session.workspace().untag(tagged))


@click.command(cls=Command)
@ref_argument
@click.argument("labels", nargs=-1, type=pair, metavar="[K=V]...")
@click.option("--remove", "removed", multiple=True, metavar="K", help="Label to drop.")
@click.pass_obj
def label(session: Session, ref: str, labels: tuple[tuple[str, str], ...], removed: tuple[str, ...]) -> None:
    """Set or drop labels of a version."""
    session.sink.show(session.workspace().label(ref, _changes(labels, removed)))


@click.command(cls=Command)
@ref_argument
@click.argument("metrics", nargs=-1, type=measurement, metavar="[K=NUMBER]...")
@click.option("--remove", "removed", multiple=True, metavar="K", help="Metric to drop.")
@click.pass_obj
def metric(session: Session, ref: str, metrics: tuple[tuple[str, float], ...], removed: tuple[str, ...]) -> None:
    """Set or drop metrics of a version."""
    session.sink.show(session.workspace().metric(ref, _changes(metrics, removed)))


@click.command(cls=Command)
@name_argument
@click.argument("new")
@click.pass_obj
def rename(session: Session, name: str, new: str) -> None:
    """Rename an adapter."""
    session.sink.show(session.workspace().rename(name, new))


@click.command(cls=Command)
@ref_argument
@base_argument
@force_option
@click.pass_obj
def bind(session: Session, ref: str, base: str, force: bool) -> None:
    """Tie an adapter to a base: a new version.

    For one that came without a base; its names and shapes are checked against the base first.
    """
    session.sink.show(session.workspace().bind(ref, base, force=force))


@click.command(cls=Command)
@ref_argument
@force_option
@dry_run_option
@yes_option
@click.pass_obj
def remove(session: Session, ref: str, force: bool, dry_run: bool, yes: bool) -> None:
    """Remove a version, or a whole adapter.

    REF that is only a name is the whole adapter. Refused while tagged or another version's parent, unless --force.
    """
    workspace = session.workspace()
    removal = workspace.remove(ref, force=force, dry_run=True)
    if not dry_run:
        session.sink.confirm(removal.removed, yes)
        removal = workspace.remove(ref, force=force)
    session.sink.show(removal)
