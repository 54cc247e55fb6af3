"""Composing adapters: one new version out of several, by a method of the table, with its parents and its recipe."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loramgr.adapter import Adapter
from loramgr.checkpoints.families import is_vocabulary
from loramgr.digests import parse_tensor_lines
from loramgr.errors import IncompatibleError, UsageError
from loramgr.formats import examine
from loramgr.formats.peft_writer import Origins, WrittenFactors, write_peft
from loramgr.records import DerivedVersion, VersionRecord
from loramgr.references import check_name, is_path, parse_weighted
from loramgr.tensorfile import TensorView
from loramgr.workspace.adapters import reference
from loramgr.workspace.adding import add_adapter
from loramgr.workspace.combining import Account, Part, combine
from loramgr.workspace.compose_plan import ComposePlan
from loramgr.workspace.computing import pick_device
from loramgr.workspace.contributions import sha256_as
from loramgr.workspace.derived import derived, overall, scratch_folder, versions_used
from loramgr.workspace.home import Home
from loramgr.workspace.inspecting import open_adapter
from loramgr.workspace.options import AddOptions, ComposeOptions

__all__ = ["Asked", "Input", "compose", "opened", "write_composition"]

Asked = str | tuple[str, float]
_DTYPE = "F32"


@dataclass(frozen=True, slots=True)
class Input(Part):
    """A version that is composed, with what the catalog says of it."""

    version: VersionRecord


def compose(
    home: Home, adapters: Sequence[Asked], name: str, options: ComposeOptions, add: AddOptions
) -> DerivedVersion:
    """Publish the combination of versions as a version of `name`, whose parents they are, told as `add` says.

    One adapter with weight 1 of which nothing is left out gives itself back, byte for byte. Raises UsageError for
    weights that are all zero or not finite, NotFoundError, and IncompatibleError for adapters of different bases, for
    updates that cannot be combined, and where nothing is left.
    """
    check_name(name)
    plan = ComposePlan.chosen(options)
    with opened(home, adapters) as (parts, folders):
        told = replace(add, name=name, parents=list(dict.fromkeys(part.ref for part in parts)))
        notes = [*_unknown_bases(parts)]
        if plan.gives_back(parts):
            _check_finite(parts[0])
            kept = [file.path for file in parts[0].version.files]
            recipe = _recipe(plan, parts, 0.0)
            base = _registered_base(home, parts)
            added = add_adapter(home, folders[0], replace(told, recipe=recipe, include=kept, base=base))
            return derived(added, plan.parameters.method, [], notes)
        with scratch_folder(home) as folder:
            account, more = write_composition(home, parts, plan, folder, options.device)
            recipe = _recipe(plan, parts, overall(account.modules))
            added = add_adapter(home, folder, replace(told, recipe=recipe))
        return derived(added, plan.parameters.method, account.modules, [*notes, *more])


@contextmanager
def opened(home: Home, adapters: Sequence[Asked]) -> Iterator[tuple[list[Input], list[Path]]]:
    """Give the versions that were asked for with their weights, and the folders of their files, for the block.

    Raises UsageError for a path, which cannot be a parent, and for weights that are all zero or not finite;
    IncompatibleError for versions of different bases.
    """
    told = [parse_weighted(each) if isinstance(each, str) else (each[0], float(each[1])) for each in adapters]
    asked = [(text, weight + 0.0) for text, weight in told]  # a recipe does not keep the sign of -0.0
    if not asked:
        raise UsageError("no adapter to compose", "loramgr list")
    for text, weight in asked:
        if is_path(text):
            raise UsageError(f"{text} is a path, and a composed version has versions as parents", f"loramgr add {text}")
        if not math.isfinite(weight):
            raise UsageError(f"the weight {weight} of {text} is not finite", f"{text}=0.5")
    if not any(weight for _, weight in asked):
        raise UsageError("all weights are zero: nothing is left of the adapters", f"{asked[0][0]}=0.5")
    with ExitStack() as stack:
        parts, folders = [], []
        for text, weight in asked:
            version, adapter, folder = stack.enter_context(open_adapter(home, text))
            parts.append(Input(reference(version), adapter, weight, version))
            folders.append(folder)
        _check_bases(parts)
        yield parts, folders


def write_composition(
    home: Home, parts: Sequence[Input], plan: ComposePlan, folder: Path, device: str
) -> tuple[Account, list[str]]:
    """Write the combination as a PEFT adapter into an empty folder, module by module.

    Return how good its factors are, and sentences for the person. Raises IncompatibleError as `combine` does, and
    where nothing is left.
    """
    where, note = pick_device(device)
    dtype = plan.dtype or _DTYPE
    combination = combine(parts, plan.parameters, dtype, where, _own_tables(home, parts))
    origins, notes = _origins(parts)
    with _threads(plan):
        write_peft(folder, _watched(combination.factors, home), combination.tensors, origins)
    combination.account.check(dtype)
    return combination.account, [*([] if note is None else [note]), *notes]


@contextmanager
def _threads(plan: ComposePlan) -> Iterator[None]:
    """Compute with one thread for the block, unless dense matrices are built: cores are too small to be shared."""
    import torch

    from loramgr.algebra.composing.composed import is_dense

    before = torch.get_num_threads()
    torch.set_num_threads(before if is_dense(plan.parameters) else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _watched(factors: Mapping[str, WrittenFactors], home: Home) -> dict[str, WrittenFactors]:
    """Return the factors, each of which moves a progress bar when it is made."""
    from tqdm import tqdm

    off = None if home.progress else True
    progress = tqdm(total=len(factors), desc="modules", delay=1, leave=False, file=sys.stderr, disable=off)

    def moving(each: WrittenFactors) -> WrittenFactors:
        def make() -> Any:
            made = each.make()
            progress.update()
            if progress.n == progress.total:
                progress.close()
            return made

        return replace(each, make=make)

    return {name: moving(each) for name, each in factors.items()}


def _check_bases(parts: Sequence[Input]) -> None:
    known = [part for part in parts if part.version.base is not None]
    for part in known[1:]:
        first, other = known[0].version.base, part.version.base
        if first is not None and other is not None and first.digest != other.digest:
            raise IncompatibleError(
                f"{known[0].ref} belongs to the base {first.name or first.digest}, "
                f"{part.ref} to {other.name or other.digest}: their deltas are of different weights"
            )


def _check_finite(part: Input) -> None:
    if non_finite := examine(part.adapter).non_finite:
        raise IncompatibleError(f"{part.ref}: NaN or infinite values in {non_finite[0]}", "train it again")


def _unknown_bases(parts: Sequence[Input]) -> Iterator[str]:
    if len({part.ref for part in parts}) > 1:
        for ref in dict.fromkeys(part.ref for part in parts if part.version.base is None):
            yield f"{ref} records no base; it is taken for that of the others"


def _base_digest(parts: Sequence[Input]) -> str | None:
    return next((part.version.base.digest for part in parts if part.version.base is not None), None)


def _registered_base(home: Home, parts: Sequence[Input]) -> str | None:
    """Return the digest of the base, None where it is not registered here."""
    digest = _base_digest(parts)
    if digest is None:
        return None
    with home.catalog.reading() as reader:
        return digest if reader.bases_with_digest(digest) else None


def _own_tables(home: Home, parts: Sequence[Input]) -> Callable[[TensorView], bool]:
    """Return what tells whether a tensor is one of the base's own, as far as the base is registered here."""
    digest = _registered_base(home, parts)
    if digest is None:
        return lambda view: False
    known = {(t.dtype, t.shape, t.sha256) for t in parse_tensor_lines(home.store.blobs.get(digest)).values()}
    dtypes = {dtype for dtype, _, _ in known}
    return lambda view: any((dtype, view.spec.shape, sha256_as(view, dtype)) in known for dtype in dtypes)


def _origins(parts: Sequence[Input]) -> tuple[Origins, list[str]]:
    """Return what the result says of where it comes from, and sentences about what its parents do not agree on."""
    adapters = [part.adapter for part in parts]
    names = list(dict.fromkeys(each.base_name for each in adapters if each.base_name))
    tasks = sorted({each.task_type for each in adapters if each.task_type})
    _check_ties(parts)
    notes = []
    if len(tasks) > 1:
        notes.append(f"the adapters are of different tasks ({', '.join(tasks)}); the result names none")
    return (
        Origins(
            base_name=names[0] if names else None,
            base_digest=_base_digest(parts),
            task_type=tasks[0] if len(tasks) == 1 else None,
            target_modules=_targets(adapters),
            keeps_ties=adapters[0].keeps_ties,
        ),
        notes,
    )


def _check_ties(parts: Sequence[Input]) -> None:
    """Raise IncompatibleError where only some adapters change tied names together, and any changes such a name."""
    apart = next((part for part in parts if part.adapter.keeps_ties != parts[0].adapter.keeps_ties), None)
    changed = sorted(name for part in parts for name in part.adapter.updates if is_vocabulary(name))
    if apart is not None and changed:
        raise IncompatibleError(
            f"{changed[0]}: of {parts[0].ref} and {apart.ref} only one keeps tied names tied (ensure_weight_tying)",
            "loramgr merge, which knows the base's tied names",
        )


_NARROWED = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")


def _targets(adapters: Sequence[Adapter]) -> list[str] | None:
    """Return the short names of all target modules where they mean the result's modules exactly; else None."""
    for adapter in adapters:
        if not isinstance(adapter.config.get("target_modules"), list):
            return None
        if any(adapter.config.get(key) for key in _NARROWED):
            return None
    return sorted({name for adapter in adapters for name in adapter.target_modules})


def _recipe(plan: ComposePlan, parts: Sequence[Input], error: float) -> dict[str, Any]:
    """Return all that makes the same again: `recompose` reads it."""
    return {
        "operation": "compose",
        **plan.recorded(),
        "inputs": [{"ref": part.ref, "digest": part.version.digest, "weight": part.weight} for part in parts],
        "relative_error": error,
        "versions": versions_used(),
    }
