"""The entry point: global options, and the table of commands."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

import click

from loramgr import __version__
from loramgr.cli.boundary import guarded
from loramgr.cli.lazy import LazyGroup, Listed
from loramgr.cli.session import Session
from loramgr.cli.sink import Sink

__all__ = ["cli", "main", "run"]

COMMANDS = {
    "base": Listed("loramgr.cli.bases:base", "Register, check and remove base models."),
    "add": Listed(
        "loramgr.cli.adapters:add", "Import a checkpoint as a new version of an adapter, or all beneath a folder."
    ),
    "list": Listed("loramgr.cli.adapters:list_adapters", "List adapters, each by its newest version that matches."),
    "log": Listed("loramgr.cli.adapters:log", "Show the versions of an adapter, newest first."),
    "inspect": Listed("loramgr.cli.adapters:inspect", "Look into an adapter: ranks, norms, what it would change."),
    "diff": Listed("loramgr.cli.comparing:diff", "Compare two adapters or two models, and show what changed most."),
    "export": Listed("loramgr.cli.adapters:export", "Write an adapter's files as they came, or in another format."),
    "tag": Listed("loramgr.cli.edits:tag", "Give a version a movable name."),
    "untag": Listed("loramgr.cli.edits:untag", "Take a tag away."),
    "label": Listed("loramgr.cli.edits:label", "Set or drop labels of a version."),
    "metric": Listed("loramgr.cli.edits:metric", "Set or drop metrics of a version."),
    "rename": Listed("loramgr.cli.edits:rename", "Rename an adapter."),
    "bind": Listed("loramgr.cli.edits:bind", "Tie an adapter to a base: a new version."),
    "remove": Listed("loramgr.cli.edits:remove", "Remove a version, or a whole adapter."),
    "prune": Listed("loramgr.cli.upkeep:prune", "Remove old versions by a rule."),
    "restore": Listed("loramgr.cli.upkeep:restore", "Bring back what remove or prune took."),
    "compose": Listed("loramgr.cli.composing:compose", "Make one adapter of several, by the method of your choice."),
    "recompose": Listed("loramgr.cli.composing:recompose", "Make a composed version again by its recipe and compare."),
    "extract": Listed("loramgr.cli.extracting:extract", "Make an adapter of a full fine-tune of a base."),
    "resize": Listed("loramgr.cli.extracting:resize", "Truncate an adapter to the best one of lower rank."),
    "merge": Listed("loramgr.cli.merging:merge", "Merge adapters into a base: a model folder ready to deploy."),
    "switch": Listed(
        "loramgr.cli.merging:switch", "Merge other adapters into a merged folder, in the place of those in it."
    ),
    "unmerge": Listed("loramgr.cli.merging:unmerge", "Give back the base of a merged folder, bit for bit."),
    "status": Listed("loramgr.cli.merging:status", "Tell what a model folder is and whether it changed."),
    "verify-merge": Listed("loramgr.cli.merging:verify_merge", "Replay a recorded merge and compare bit for bit."),
    "remote": Listed(
        "loramgr.cli.remotes:remote", "Look after the places that adapters are pushed to and pulled from."
    ),
    "push": Listed("loramgr.cli.remotes:push", "Bring adapters to a remote."),
    "pull": Listed("loramgr.cli.remotes:pull", "Bring adapters from a remote."),
    "clone": Listed("loramgr.cli.remotes:clone", "Register a remote and bring everything that is there."),
    "verify": Listed("loramgr.cli.database:verify", "Read the store again and compare the catalog with the logs."),
    "gc": Listed("loramgr.cli.upkeep:gc", "Take out of the store what nothing refers to."),
    "history": Listed("loramgr.cli.home:history", "Show who did what when, newest first."),
    "du": Listed("loramgr.cli.home:du", "Show how many bytes adapters take."),
    "home": Listed("loramgr.cli.home:home", "Put a whole home into one archive, or restore one."),
    "db": Listed("loramgr.cli.database:db", "Look after the catalog's schema, or rebuild it from the logs."),
}


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--home",
    envvar="LORAMGR_HOME",
    type=click.Path(file_okay=False),
    help="Folder of the store and the catalog.  [env LORAMGR_HOME; default: the platform's user data folder]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print names only, and no notes.")
@click.option("--no-progress", is_flag=True, help="Draw no progress bars.")
@click.option("--debug", is_flag=True, help="Show the traceback of every error.")
@click.version_option(__version__, "--version", message="loramgr %(version)s")
@click.pass_context
def cli(context: click.Context, /, home: str | None, as_json: bool, quiet: bool, no_progress: bool, **_: bool) -> None:
    """Keep LoRA adapters the way git keeps source: every version immutable, named by its content, tied to its base."""
    sink = Sink("json" if as_json else "quiet" if quiet else "human")
    context.obj = Session(home=home, sink=sink, progress=not (no_progress or quiet))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are reported on stderr, never raised."""
    return guarded(cli, list(arguments))


def main() -> None:
    """Run the command line of this process and exit with its code."""
    # torch reads it when it is loaded. Its tensors of some MiB come and go: in small pages a third of a merge's time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # numpy, which torch brings, starts threads that wait busily for work that it is never given here
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(50_000, 20, 20)  # modules leave no garbage, and to look for it takes a sixth of their import
    sys.exit(run(sys.argv[1:]))
