"""Makes an adapter of a full fine-tune and its base: factors for the matrices that changed, the rest as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loramgr.algebra.goals import Goal
from loramgr.errors import IncompatibleError
from loramgr.formats import read_adapter
from loramgr.formats.folder import is_tokenizer_file
from loramgr.formats.peft_writer import Origins, write_peft
from loramgr.records import DerivedVersion
from loramgr.references import check_name
from loramgr.workspace.adding import add_adapter
from loramgr.workspace.computing import pick_device
from loramgr.workspace.derived import derived, scratch_folder, versions_used
from loramgr.workspace.differing import Comparison, compare
from loramgr.workspace.factoring import Factoring
from loramgr.workspace.home import Home
from loramgr.workspace.loading import loading_torch
from loramgr.workspace.matching import bind_to
from loramgr.workspace.options import AddOptions, ExtractOptions
from loramgr.workspace.planning import parse_dtype
from loramgr.workspace.remainders import write_remainder
from loramgr.workspace.sources import OpenBase, find_base, is_outside

__all__ = ["extract"]

_MANY = 3


def extract(
    home: Home, finetuned: str, base_text: str, options: ExtractOptions, add: AddOptions | None = None
) -> DerivedVersion:
    """Publish the adapter that turns a base into (nearly) its fine-tune; both are named as bases are, or by a path.

    One pair of tensors is held at a time. Raises UsageError for a goal that makes no sense, and IncompatibleError for
    models of two architectures, quantized ones, NaN or infinite values, and a fine-tune that is the base itself.
    """
    add = add or AddOptions()
    goal = Goal(options.rank, options.energy, options.max_error)
    goal.check()
    dtype = parse_dtype(options.dtype)
    assert dtype is not None
    if add.name is not None:
        check_name(add.name)
    device, note = pick_device(options.device)
    base, tuned = find_base(home, base_text), _find_finetuned(home, finetuned)
    comparison = compare(base, tuned, exact=options.exact)
    _check_changed(comparison, comparison.changed)
    with scratch_folder(home) as scratch:
        folder = scratch / "adapter"
        folder.mkdir()
        work = Factoring(home, comparison, goal, dtype, device, scratch / "factors")
        work.run()
        _check_changed(comparison, [*work.factors, *work.tensors])
        write_peft(folder, work.factors, work.tensors, _origins(comparison))
        _check_bound(folder, comparison, work)
        _copy_tokenizer(tuned, folder)
        if options.exact:
            with loading_torch():
                write_remainder(home, folder, comparison, device)
        recipe = _recipe(comparison, options, device)
        added = add_adapter(home, folder, replace(add, base=base_text, recipe=recipe))
    notes = [*([note] if note else []), *_notes(comparison, work)]
    return derived(added, "extract", work.errors, notes)


def _find_finetuned(home: Home, text: str) -> OpenBase:
    """Open the fine-tune; a folder's plain name is a path, too, where no base is called so."""
    if not is_outside(text) and Path(text).exists():
        with home.catalog.reading() as reader:
            registered = any(text == base.name for base in reader.bases())
        return find_base(home, text if registered else f"./{text}")
    return find_base(home, text)


def _check_changed(comparison: Comparison, changed: Sequence[object]) -> None:
    base, tuned = comparison.base, comparison.finetuned
    if not changed:
        raise IncompatibleError(
            f"{tuned.source} has no tensor that differs from those of {base.name or base.source}: nothing to extract",
            "name the base that it was trained from",
        )


def _origins(comparison: Comparison) -> Origins:
    base = comparison.base
    return Origins(
        base_name=base.name or Path(base.source).name,
        base_digest=base.digest,
        task_type=comparison.task_type,
        keeps_ties=comparison.keeps_ties,
    )


def _check_bound(folder: Path, comparison: Comparison, work: Factoring) -> None:
    """Raise IncompatibleError unless the adapter, as it is written, lands on the tensors that it was made of."""
    ties = {name: group.source for group in comparison.base.ties for name in group.tied}
    wanted = {each.name: each for each in (*comparison.changed, *work.kept)}
    for bound in bind_to(read_adapter(folder), comparison.base).updates:
        changed = wanted[bound.name]
        pair = comparison.alignment.pairs.get(changed.name)
        landed = {bound.target, ties.get(bound.target)} if pair is not None else {pair}
        fits = pair in landed or comparison.alignment.sources.get(changed.name) in landed
        factors = work.factors.get(changed.module) if changed.kind else None
        if not fits or (factors is not None and bound.transposed != changed.transposed):
            raise IncompatibleError(
                f"{changed.name}: its update would change {bound.target} in another way than it was made for",
                "give the base a config.json with its model_type",
            )


def _copy_tokenizer(tuned: OpenBase, folder: Path) -> None:
    """Copy the fine-tune's tokenizer, which an adapter with another vocabulary brings along."""
    from loramgr.checkpoints.output import copy_files

    names = [name for name in tuned.checkpoint.other_files if is_tokenizer_file(name)]
    copy_files(tuned.checkpoint.root, folder, names)


def _recipe(comparison: Comparison, options: ExtractOptions, device: str) -> dict[str, Any]:
    goal = {name: getattr(options, name) for name in ("rank", "energy", "max_error")}
    return {
        "operation": "extract",
        "method": "extract",
        "base": comparison.base.digest,
        "finetuned": comparison.finetuned.digest,
        **{name: value for name, value in goal.items() if value is not None},
        "dtype": parse_dtype(options.dtype),
        "exact": options.exact,
        "device": device.partition(":")[0],
        "versions": versions_used(),
    }


def _untied_by_peft(comparison: Comparison) -> list[str]:
    """Return the changed tensors whose ties PEFT does not see: it knows them by these names only (0.21)."""
    sources = {group.source for group in comparison.finetuned.ties if group.known and comparison.keeps_ties}
    changed = (each.name for each in comparison.changed if each.name in sources)
    return [name for name in changed if name.split(".")[-2:-1] not in (["embed_tokens"], ["lm_head"])]


def _notes(comparison: Comparison, work: Factoring) -> list[str]:
    """Return what the person should know of tensors that are not as they might expect."""
    said = (
        (work.whole, "kept whole, since their factors would be no smaller"),
        (comparison.alignment.missing, "in the base and not in the fine-tune: a merge keeps them"),
        (comparison.left_out, "no plain floats, which an adapter cannot hold"),
        (_untied_by_peft(comparison), "tied to the output head; a merge changes both, PEFT itself only this one"),
    )
    notes = []
    for names, what in said:
        if names:
            more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
            notes.append(f"{', '.join(names[:_MANY])}{more}: {what}")
    return notes
