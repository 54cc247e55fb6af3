"""`loramgr extract, resize`: an adapter of a full fine-tune, and one of lower rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from loramgr.cli.lazy import Command
from loramgr.cli.options import device_option, jobs_option, measurement, pair, ref_argument
from loramgr.cli.session import Session

__all__ = ["extract", "resize"]

_ADDED = (
    click.option("-m", "--message", default="", metavar="TEXT", help="What this version is."),
    click.option("--tag", "tags", multiple=True, metavar="TAG", help="Tag to give it."),
    click.option("--label", "labels", multiple=True, type=pair, metavar="K=V", help="Label to give it."),
    click.option("--metric", "metrics", multiple=True, type=measurement, metavar="K=NUMBER", help="Metric to give it."),
    device_option,
    jobs_option,
)
_TOLD = ("name", "message", "tags", "labels", "metrics")


def _add_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_ADDED):
        command = option(command)
    return command


def _told(options: dict[str, Any]) -> dict[str, Any]:
    """Take what is said about the new version out of the options."""
    told = {key: options.pop(key) for key in _TOLD}
    return told | {key: dict(told[key]) for key in ("labels", "metrics")}


@click.command(cls=Command)
@click.argument("finetuned")
@click.option("--base", required=True, help="Model that it was trained from.")
@click.option("--name", required=True, metavar="N", help="Adapter that the result is a version of.")
@click.option("--rank", type=int, metavar="R", help="Rank of every module.  [default: 16, if no other goal is given]")
@click.option("--energy", type=float, metavar="E", help="Share of every difference's squared norm to keep.")
@click.option("--max-error", type=float, metavar="X", help="Largest relative error of a module.")
@click.option("--exact", is_flag=True, help="Keep what gives the fine-tune back, bit for bit.")
@click.option("--dtype", default="float32", show_default=True, help="Dtype of the factors.")
@_add_options
@click.pass_obj
def extract(session: Session, /, finetuned: str, base: str, jobs: int | None, **options: Any) -> None:
    """Make an adapter of a full fine-tune of a base.

    FINETUNED is a model folder, or named as bases are. The matrices that changed become factors of low rank; norms,
    biases, embeddings and heads are kept as they are. With --exact, `loramgr merge BASE N -o DIR --with-remainder`
    gives the fine-tune itself.
    """
    from loramgr.workspace import AddOptions, ExtractOptions

    told = _told(options)
    if all(options[goal] is None for goal in ("rank", "energy", "max_error")):
        options["rank"] = 16
    workspace = session.workspace(jobs)
    session.sink.show(workspace.extract(finetuned, base, ExtractOptions(**options), AddOptions(**told)))


@click.command(cls=Command)
@ref_argument
@click.option("--name", required=True, metavar="N", help="Adapter that the result is a version of.")
@click.option("--rank", type=int, metavar="R", help="Largest rank of a module.")
@click.option("--energy", type=float, metavar="E", help="Share of every delta's squared norm to keep.")
@click.option("--budget", type=int, metavar="N", help="Parameters that the whole adapter may have.")
@click.option("--dtype", help="Dtype of the factors.  [default: their own]")
@_add_options
@click.pass_obj
def resize(session: Session, /, ref: str, jobs: int | None, **options: Any) -> None:
    """Truncate an adapter to the best one of lower rank.

    One of --rank, --energy and --budget says how far. A budget goes where it keeps the most. Everything but the
    factors stays as it is.
    """
    from loramgr.workspace import AddOptions, ResizeOptions

    told = _told(options)
    workspace = session.workspace(jobs)
    session.sink.show(workspace.resize(ref, ResizeOptions(**options), AddOptions(**told)))
