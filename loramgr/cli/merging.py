"""`loramgr merge, unmerge, status, verify-merge`: model folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from loramgr.cli.lazy import Command
from loramgr.cli.options import base_argument, device_option, folder_argument, force_option, hint_options, jobs_option
from loramgr.cli.session import Session

__all__ = ["merge", "status", "switch", "unmerge", "verify_merge"]


_MERGE_OPTIONS = (
    click.option(
        "--numerics",
        type=click.Choice(["exact", "fast"]),
        default="exact",
        help="exact: correctly rounded, everywhere the same; fast: float32, rounded once.  [default: exact]",
    ),
    click.option("--verify", is_flag=True, help="Read the output again and compare before it appears."),
    click.option("--replacements-of", metavar="REF", help="Whose saved modules to take, where several bring the same."),
    click.option("--keep-tied", is_flag=True, help="Keep tied weights tied: both names change together."),
    hint_options,
    force_option,
    device_option,
    jobs_option,
)


def _merge_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_MERGE_OPTIONS):
        command = option(command)
    return command


@click.command(cls=Command)
@base_argument
@click.argument("adapters", nargs=-1, required=True, metavar="REF[=WEIGHT]...")
@click.option("-o", "--output", metavar="DIR", type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--in-place", is_flag=True, help="Change the base's own folder instead; it can be unmerged.")
@click.option("--reversible", is_flag=True, help="Keep beside the weights what unmerges them without the base.")
@click.option("--dtype", help="Dtype of the merged weights.  [default: the base's]")
@click.option("--with-remainder", is_flag=True, help="Give the fine-tune itself that REF was extracted from, exactly.")
@_merge_options
@click.pass_obj
def merge(
    session: Session,
    /,
    base: str,
    adapters: tuple[str, ...],
    output: Path | None,
    jobs: int | None,
    *,
    in_place: bool,
    **options: Any,
) -> None:
    """Merge adapters into a base: a model folder ready to deploy.

    With exact numerics every weight is the true sum, rounded once. WEIGHT is 1 where it is not given. An adapter that
    was extracted with --exact gives its fine-tune back with --with-remainder, proved by the digest.
    """
    from loramgr.workspace import MergeOptions

    if in_place is (output is not None):
        raise click.UsageError("Give -o DIR for a new folder, or --in-place.")
    with_remainder = options.pop("with_remainder")
    if with_remainder and output is None:
        raise click.UsageError("--with-remainder makes a new folder: give -o DIR.")
    hints = {key: options.pop(key) for key in ("alpha", "enable_lora")}
    workspace, chosen = session.workspace(jobs, **hints), MergeOptions(**options)
    if output is None:
        session.sink.show(workspace.merge_in_place(base, adapters, chosen))
    elif with_remainder:
        session.sink.show(workspace.remake(base, adapters, output, chosen))
    else:
        session.sink.show(workspace.merge(base, adapters, output, chosen))


@click.command(cls=Command)
@folder_argument
@click.argument("adapters", nargs=-1, required=True, metavar="REF[=WEIGHT]...")
@_merge_options
@click.pass_obj
def switch(session: Session, /, folder: Path, adapters: tuple[str, ...], jobs: int | None, **options: Any) -> None:
    """Merge other adapters into a merged folder, in the place of those in it.

    What was merged is taken out bit for bit and the new merge made in one pass; the folder changes in one step.
    """
    from loramgr.workspace import MergeOptions

    hints = {key: options.pop(key) for key in ("alpha", "enable_lora")}
    session.sink.show(session.workspace(jobs, **hints).switch(folder, adapters, MergeOptions(**options)))


@click.command(cls=Command)
@folder_argument
@click.option("-o", "--output", metavar="DIR", type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--in-place", is_flag=True, help="Change the folder itself, as without -o.")
@device_option
@jobs_option
@click.pass_obj
def unmerge(session: Session, folder: Path, output: Path | None, in_place: bool, device: str, jobs: int | None) -> None:
    """Give back the base of a merged folder, bit for bit.

    Proved by the base digest; where it cannot be, nothing changes and the exit code is 5.
    """
    if in_place and output is not None:
        raise click.UsageError("-o and --in-place exclude each other.")
    session.sink.show(session.workspace(jobs).unmerge(folder, output, device=device))


@click.command(cls=Command)
@folder_argument
@jobs_option
@click.pass_obj
def status(session: Session, folder: Path, jobs: int | None) -> None:
    """Tell what a model folder is and whether it changed."""
    session.sink.show(session.workspace(jobs).status(folder))


@click.command(cls=Command)
@folder_argument
@jobs_option
@click.pass_obj
def verify_merge(session: Session, folder: Path, jobs: int | None) -> None:
    """Replay a recorded merge and compare bit for bit.

    Exit code 5 when a tensor differs.
    """
    check = session.workspace(jobs).verify_merge(folder)
    session.sink.verdict(check, check.ok)
