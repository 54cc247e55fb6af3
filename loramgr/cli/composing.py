"""`loramgr compose, recompose`: one adapter of several, and the same again."""

from __future__ import annotations

from typing import Any

import click

from loramgr.cli.lazy import Command
from loramgr.cli.options import device_option, jobs_option, measurement, pair, ref_argument
from loramgr.cli.session import Session

__all__ = ["compose", "recompose"]

_TOLD = ("message", "tags", "labels", "metrics")


@click.command(cls=Command)
@click.argument("adapters", nargs=-1, required=True, metavar="REF[=WEIGHT]...")
@click.option("--name", required=True, metavar="N", help="Adapter that the result is a version of.")
@click.option("--method", default="linear", metavar="METHOD", show_default=True, help="How to combine: see below.")
@click.option("--rank", type=int, metavar="R", help="Largest rank of a module.  [default: the sum; svd: the largest]")
@click.option("--density", type=float, metavar="D", help="Share of the entries that stay, to 1.  [default: 0.5]")
@click.option("--epsilon", type=float, metavar="E", help="Width of della's probabilities.  [default: 0.1]")
@click.option("--seed", type=int, metavar="S", help="What random choices are made from.  [default: 0]")
@click.option("--space", metavar="dense|core", help="Whose entries are thinned out.  [default: dense]")
@click.option("--dtype", help="Dtype of the factors.  [default: float32]")
@click.option("-m", "--message", default="", metavar="TEXT", help="What this version is.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Tag to give it.")
@click.option("--label", "labels", multiple=True, type=pair, metavar="K=V", help="Label to give it.")
@click.option("--metric", "metrics", multiple=True, type=measurement, metavar="K=NUMBER", help="Metric to give it.")
@device_option
@jobs_option
@click.pass_obj
def compose(session: Session, /, adapters: tuple[str, ...], name: str, jobs: int | None, **options: Any) -> None:
    """Make one adapter of several, by the method of your choice.

    REF is a version, WEIGHT 1 where it is not given. The deltas themselves are combined, not their factors; the result
    is a new version with its parents and its recipe, and relative_error says how far its factors are from what the
    method gives.

    METHOD is a weighted sum: linear, task_arithmetic or svd; combines entry by entry: ties, ties_peft, ties_mergekit,
    magnitude_prune, della, dare_linear, dare_ties, dare_linear_mergekit or dare_ties_mergekit; or goes by directions:
    slerp (of two), knots, tsv or iso. docs/composing.md defines each.
    """
    from loramgr.workspace import AddOptions, ComposeOptions

    told = {key: options.pop(key) for key in _TOLD}
    told |= {key: dict(told[key]) for key in ("labels", "metrics")}
    workspace = session.workspace(jobs)
    session.sink.show(workspace.compose(adapters, name, ComposeOptions(**options), AddOptions(**told)))


@click.command(cls=Command)
@ref_argument
@device_option
@jobs_option
@click.pass_obj
def recompose(session: Session, /, ref: str, device: str, jobs: int | None) -> None:
    """Make a composed version again by its recipe and compare.

    Nothing is published. Where the weights are not the same, bit for bit, their distance is told.
    """
    session.sink.show(session.workspace(jobs).recompose(ref, device=device))
