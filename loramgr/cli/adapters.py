"""`loramgr add, list, log, inspect, export`: versions in, and what is known about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loramgr.cli.lazy import Command
from loramgr.cli.options import (
    force_option,
    hint_options,
    initial_option,
    jobs_option,
    measurement,
    name_argument,
    pair,
    plot_option,
    ref_argument,
    start_option,
)
from loramgr.cli.session import Session

__all__ = ["add", "export", "inspect", "list_adapters", "log"]

FORMATS = ["peft", "kohya", "lycoris", "diffusers", "mlx", "gguf", "loralib"]
SORT_HELP = "Order: name, created, rank, bytes, parameters or metric:K; with - before it the largest first."


@click.command(cls=Command)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="Adapter to add to.  [default: the folder's name, or its parent's for checkpoint-N]")
@click.option("--base", help="Base it was trained on.  [default: what its configuration says]")
@click.option("--include", multiple=True, metavar="GLOB", help="Keep files of this name too.")
@click.option("-m", "--message", default="", metavar="TEXT", help="What this version is.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Tag to give it.")
@click.option("--label", "labels", multiple=True, type=pair, metavar="K=V", help="Label to give it.")
@click.option("--metric", "metrics", multiple=True, type=measurement, metavar="K=NUMBER", help="Metric to give it.")
@click.option("--parent", "parents", multiple=True, metavar="REF", help="Its parent.  [default: the latest version]")
@click.option("--all", "everything", is_flag=True, help="Add the adapters beneath PATH too where it is one itself.")
@hint_options
@start_option
@force_option
@jobs_option
@click.pass_obj
def add(session: Session, /, path: Path, everything: bool, jobs: int | None, **options: Any) -> None:
    """Import a checkpoint as a new version of an adapter, or all beneath a folder.

    PATH is the folder or file of an adapter. Its configuration, weights, README and tokenizer are kept; the same
    files and configuration again are the version that is there already.

    Where PATH is a folder and no adapter, or with --all, every adapter in it and at most three folders beneath it is
    added, by name: the checkpoints of a run by their numbers and its end after them, and each of several weights files
    by itself; a file that is no adapter is skipped and told. Each gets the name it would get alone, with the folders
    above it before that where two would share one; --name makes all of them versions of one adapter, and a tag goes to
    the last version of a name. An adapter that fails does not stop the others: stderr tells every failure, and the exit
    code is that of the first. Adding again adds what is missing.
    """
    from loramgr.workspace import AddOptions

    options |= {key: dict(options[key]) for key in ("labels", "metrics")}
    workspace, chosen = session.workspace(jobs), AddOptions(**options)
    if everything or workspace.holds_several(path):
        addition = workspace.add_all(path, chosen)
        session.sink.show(addition.added)
        for skipped, what in addition.skipped.items():
            session.sink.note(f"skipped: {skipped}: no adapter, but {what}")
        addition.check()
    else:
        session.sink.show(workspace.add(path, chosen))


@click.command(cls=Command)
@click.option("--base", help="Only of this base.")
@click.option("--name", metavar="GLOB", help="Only adapters of such a name.")
@click.option("--tag", help="Only versions with this tag.")
@click.option("--label", "labels", multiple=True, type=pair, metavar="K=V", help="Only versions with this label.")
@click.option("--metric", "metrics", multiple=True, metavar="'K>N'", help="Only versions whose metric is so: acc>0.9.")
@click.option("--method", help="Only of this method: lora, dora, …")
@click.option("--rank", type=int, help="Only of this (largest) rank.")
@click.option("--target", metavar="MODULE", help="Only versions that target this module.")
@click.option("--sort", default="name", show_default=True, metavar="KEY", help=SORT_HELP)
@click.option("--limit", type=click.IntRange(min=0), help="At most so many.")
@click.option("--all-versions", is_flag=True, help="Every version that matches, not only the newest.")
@click.option("--latest-only", is_flag=True, help="Let the filters see only the newest versions.")
@click.pass_obj
def list_adapters(session: Session, /, **filters: Any) -> None:
    """List adapters, each by its newest version that matches."""
    from loramgr.workspace import VersionQuery

    session.sink.show(session.workspace().list(VersionQuery(**filters)))


@click.command(cls=Command)
@name_argument
@click.pass_obj
def log(session: Session, /, name: str) -> None:
    """Show the versions of an adapter, newest first."""
    session.sink.show(session.workspace().log(name))


@click.command(cls=Command)
@ref_argument
@click.option("--spectrum", is_flag=True, help="Singular values, ranks really used, shares of the weights, outliers.")
@plot_option
@hint_options
@initial_option
@click.pass_obj
def inspect(session: Session, /, ref: str, spectrum: bool, plot: Path | None, **hints: Any) -> None:
    """Look into an adapter: ranks, norms, what it would change.

    REF is name, name@v3, name@tag, name@sha256:prefix or sha256:prefix, or a path to an adapter on disk. Of any other
    file or folder it tells what that is instead.
    """
    session.sink.show(session.workspace(**hints).inspect(ref, spectrum=spectrum, plot=plot))


@click.command(cls=Command)
@ref_argument
@click.argument("output", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--format", type=click.Choice(FORMATS), help="Format to write.  [default: the files as they came]")
@click.option("--base", help="Base whose names and layout count.  [default: the one it belongs to]")
@hint_options
@click.pass_obj
def export(session: Session, /, ref: str, output: Path, format: str | None, base: str | None, **hints: Any) -> None:
    """Write an adapter's files as they came, or in another format.

    DIR must not exist yet; it appears whole. The scaling is right for the reader of the format; what the format cannot
    hold is refused by name (exit code 6), and what a reader should know is told.
    """
    session.sink.show(session.workspace(**hints).export(ref, output, format=format, base=base))
