"""`loramgr diff`: two adapters or two models beside each other."""

from __future__ import annotations

from typing import Any

import click

from loramgr.cli.lazy import Command
from loramgr.cli.options import hint_options, jobs_option, plot_option
from loramgr.cli.session import Session

__all__ = ["diff"]


@click.command(cls=Command)
@click.argument("a")
@click.argument("b")
@click.option("--spectrum", is_flag=True, help="Singular values, principal angles and φ(i, j) of every module.")
@plot_option
@hint_options
@jobs_option
@click.pass_obj
def diff(session: Session, /, a: str, b: str, jobs: int | None, **options: Any) -> None:
    """Compare two adapters or two models, and show what changed most.

    A and B are both adapters (references, or paths to adapters on disk), or both models (names of bases, paths to model
    folders, merged ones too). Of adapters the deltas are compared, of models the tensors. The distances are Frobenius
    norms; relative ones are over the norm of A.
    """
    hints = {key: options.pop(key) for key in ("alpha", "enable_lora")}
    session.sink.show(session.workspace(jobs, **hints).diff(a, b, **options))
