"""Composing a version again from its recipe, and how far what comes out is from what is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramgr.adapter import Adapter, LowRank
from loramgr.catalog.query import VersionQuery
from loramgr.errors import IncompatibleError, NotFoundError, UsageError
from loramgr.formats import examine, read_adapter
from loramgr.log import Entry
from loramgr.records import RecomposeReport, VersionRecord
from loramgr.references import is_path
from loramgr.workspace.adapters import reference
from loramgr.workspace.compose_plan import ComposePlan
from loramgr.workspace.composing import opened, write_composition
from loramgr.workspace.deltas import aligned, product_of
from loramgr.workspace.derived import scratch_folder, versions_used
from loramgr.workspace.home import Home
from loramgr.workspace.inspecting import open_adapter

__all__ = ["recompose"]


def recompose(home: Home, ref: str, device: str) -> RecomposeReport:
    """Make a composed version again out of its inputs and compare the weights; nothing is published.

    Raises IncompatibleError for a version that was not composed, and NotFoundError for inputs that are gone.
    """
    if is_path(ref):
        raise UsageError(f"{ref} is a path, and recipes are kept with versions", "loramgr list")
    with open_adapter(home, ref) as (version, stored, _):
        recipe = _recipe(home, version)
        plan, inputs = ComposePlan.replayed(recipe), _inputs(home, version, recipe["inputs"])
        with opened(home, inputs) as (parts, folders), scratch_folder(home) as scratch:
            folder, notes = folders[0], list[str]()
            if not plan.gives_back(parts):
                folder = scratch
                _, notes = write_composition(home, parts, plan, folder, device)
            digest, distance = _compared(folder, version, stored)
    return RecomposeReport(
        ref=reference(version),
        method=plan.parameters.method,
        same=digest == version.weights_digest,
        weights_digest=version.weights_digest,
        recomposed_digest=digest,
        relative_distance=distance,
        made_with=dict(recipe["versions"]),
        recomposed_with=versions_used(),
        notes=notes,
    )


def _recipe(home: Home, version: VersionRecord) -> Mapping[str, Any]:
    """Return the recipe in the entry that published a version."""
    ref = reference(version)
    recipe = _published(home, version).content["recipe"]
    if recipe is None:
        raise IncompatibleError(f"{ref} has no recipe: it was not composed", f"loramgr history {ref}")
    if recipe.get("operation") != "compose":
        raise IncompatibleError(f"{ref} was made in another way than by compose", f"loramgr history {ref}")
    return dict(recipe)


def _published(home: Home, version: VersionRecord) -> Entry:
    """Return the entry of the version's own log that published it; others may have published the same digest."""
    with home.catalog.reading() as reader:
        state = reader.log_state("adapter", version.name)
        digests = [] if state is None else reader.newest_entries(state.root, None)
    entries = (Entry.decode(home.store.entries.get(digest)) for digest in digests)
    return next(each for each in entries if each.kind == "publish" and each.content["number"] == version.version)


def _inputs(home: Home, version: VersionRecord, recorded: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Return references of the inputs and their weights, by digest: their names may have changed since."""
    with home.catalog.reading() as reader:
        known = {found.digest: found for found in reader.versions(VersionQuery(all_versions=True))}
    gone = [each for each in recorded if each["digest"] not in known]
    if gone:
        names = ", ".join(f"{each['ref']} ({each['digest']})" for each in gone)
        raise NotFoundError(
            f"what {reference(version)} was composed of is gone: {names}", f"loramgr restore {gone[0]['ref']}"
        )
    return [(reference(known[each["digest"]]), float(each["weight"])) for each in recorded]


def _compared(folder: Path, version: VersionRecord, stored: Adapter) -> tuple[str, float]:
    """Return the weights digest of the adapter in the folder, and how far its deltas are from the stored ones."""
    made = read_adapter(folder)
    digest = examine(made).weights_digest
    return digest, 0.0 if digest == version.weights_digest else _distance(made, stored)


def _distance(made: Adapter, stored: Adapter) -> float:
    """Return ‖made − stored‖ / ‖stored‖ of all deltas and replaced tensors together; infinite where stored is zero."""
    from loramgr.algebra.lowrank import decomposed, summed

    apart = whole = 0.0
    for first, second in aligned([made, stored]).values():
        if isinstance(first, LowRank) and isinstance(second, LowRank):
            there, here = product_of(second), product_of(first)
            apart += float(decomposed(summed([here, there.scaled(-1)])).values.norm()) ** 2
            whole += float(decomposed(there).values.norm()) ** 2
        else:
            pair = [next(each.views()).load().double() for each in (first, second) if each is not None]
            apart += float((pair[0] - pair[-1]).norm() if len(pair) == 2 else math.inf) ** 2
            whole += float(pair[-1].norm()) ** 2
    if apart == 0:
        return 0.0
    return math.sqrt(apart / whole) if whole else math.inf
