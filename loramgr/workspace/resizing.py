"""Truncates the low-rank updates of a version: a new version of smaller rank, everything else in it as it was."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramgr.adapter import Adapter, LowRank, Shift
from loramgr.algebra.goals import Goal
from loramgr.errors import IncompatibleError, UsageError
from loramgr.formats.folder import CONFIGURATION, REMAINDER, WEIGHTS
from loramgr.formats.peft_rewriting import rewrite_peft
from loramgr.formats.peft_writer import WrittenFactors
from loramgr.records import DerivedVersion, ModuleError, VersionRecord
from loramgr.references import check_name, is_path
from loramgr.workspace.adapters import reference
from loramgr.workspace.adding import add_adapter
from loramgr.workspace.computing import pick_device
from loramgr.workspace.deltas import product_of
from loramgr.workspace.derived import derived, scratch_folder, versions_used
from loramgr.workspace.home import Home
from loramgr.workspace.inspecting import open_adapter
from loramgr.workspace.loading import loading_torch
from loramgr.workspace.options import AddOptions, ResizeOptions
from loramgr.workspace.planning import parse_dtype

if TYPE_CHECKING:
    from loramgr.algebra.lowrank import Product

__all__ = ["Resized", "resize", "resized"]


def resize(home: Home, ref: str, options: ResizeOptions, add: AddOptions | None = None) -> DerivedVersion:
    """Publish a version with the best updates of lower rank, its parent the one that was resized.

    Raises UsageError for a goal that makes no sense, a rank above the adapter's, a budget below what is not resized,
    and a path, which cannot be a parent; IncompatibleError, naming it, for an update that is no plain product.
    """
    add = add or AddOptions()
    _check(options)
    if is_path(ref):
        raise UsageError(f"{ref} is a path, and a resized version has a version as its parent", f"loramgr add {ref}")
    if add.name is not None:
        check_name(add.name)
    _, note = pick_device(options.device)
    with loading_torch(), open_adapter(home, ref) as (version, adapter, folder):
        made = resized(adapter, options, ref, home.jobs)
        with scratch_folder(home) as scratch:
            base = None if version.base is None else version.base.digest
            rewrite_peft(scratch, adapter, {name: each.factors for name, each in made.items()}, base)
            include = _copy_others(version, folder, scratch)
            told = replace(
                add, parents=[reference(version)], include=[*add.include, *include], recipe=_recipe(version, options)
            )
            added = add_adapter(home, scratch, told if add.name else replace(told, name=version.name))
    return derived(added, "resize", [each.error for each in made.values()], [] if note is None else [note])


@dataclass(frozen=True, slots=True)
class Resized:
    """The factors that an update becomes, None where nothing of it is kept, and how good they are."""

    factors: WrittenFactors | None
    error: ModuleError


def resized(adapter: Adapter, options: ResizeOptions, ref: str = "the adapter", jobs: int = 1) -> dict[str, Resized]:
    """Return what every low-rank update of an adapter becomes, by its name; `ref` is what errors call the adapter.

    `jobs` threads compute. Raises as `resize`.
    """
    _check(options)
    how = parse_dtype(options.dtype), pick_device(options.device)[0]
    updates = _updates(ref, adapter)
    with ThreadPoolExecutor(jobs) as pool:
        ranks = _ranks(pool, (ref, adapter), updates, options)
        made = pool.map(lambda name: _resized(name, updates[name], ranks[name], how), ranks)
        return dict(zip(ranks, made, strict=True))


def _check(options: ResizeOptions) -> None:
    if sum(goal is not None for goal in (options.rank, options.energy, options.budget)) != 1:
        raise UsageError("a rank, an energy or a budget has to be given, and only one of them", "--rank 8")
    if options.budget is None:
        Goal(options.rank, options.energy).check()
    elif options.budget < 1:
        raise UsageError(f"a budget of {options.budget} parameters leaves nothing", "--budget 100000")


def _updates(ref: str, adapter: Adapter) -> dict[str, LowRank]:
    """Return the updates that can be resized, without the tensors that take a parameter's place before them."""
    if adapter.obstacle is not None:
        raise IncompatibleError(f"{ref} is not resized: {adapter.obstacle}")
    shifted = next((name for name, update in adapter.updates.items() if isinstance(update, Shift)), None)
    if shifted is not None:
        raise IncompatibleError(f"{ref}: {shifted} moves with the scaling of its module (lora_bias): not resized")
    updates = {name: each for name, each in sorted(adapter.updates.items()) if isinstance(each, LowRank)}
    if not updates:
        raise IncompatibleError(f"{ref} has no low-rank updates: nothing to resize", f"loramgr inspect {ref}")
    for name, update in updates.items():
        if adapter.format != "peft" or {update.lora_A.spec, update.lora_B.spec} - {*adapter.specs}:
            raise IncompatibleError(
                f"{ref}: the factors of {name} are not stored as those of PEFT's LoRA ({adapter.format}, "
                f"{adapter.method}): not resized",
                _as_peft(ref, adapter),
            )
        if update.magnitude is not None:
            raise IncompatibleError(
                f"{ref}: {name} is decomposed by DoRA, whose norms were trained with the whole of its delta: a delta "
                "of lower rank would move every magnitude",
                "loramgr merge it, then loramgr extract",
            )
    return {name: replace(update, table=None) for name, update in updates.items()}


def _as_peft(ref: str, adapter: Adapter) -> str:
    """Return how an adapter of another format becomes one that can be resized."""
    is_named = adapter.naming is None or not adapter.naming.is_needed
    bind = "" if is_named else f"loramgr bind {ref} BASE, then "
    return f"{bind}loramgr export {ref} DIR --format peft, loramgr add DIR, and resize that"


def _ranks(
    pool: ThreadPoolExecutor, asked: tuple[str, Adapter], updates: Mapping[str, LowRank], options: ResizeOptions
) -> dict[str, int]:
    """Return the rank that every update gets, 0 for none at all; `asked` is the adapter as it was asked for."""
    from loramgr.algebra.budget import ranks_within
    from loramgr.algebra.lowrank import decomposed
    from loramgr.algebra.truncation import rank_of_energy

    ref, adapter = asked
    largest = max(update.rank for update in updates.values())
    if options.rank is not None:
        if options.rank > largest:
            raise UsageError(
                f"{ref} has rank {largest}, and {options.rank} is more: nothing to resize", f"--rank {largest}"
            )
        return {name: min(options.rank, update.rank) for name, update in updates.items()}
    device, _ = pick_device(options.device)
    found = pool.map(lambda update: decomposed(product_of(update, device)).values, updates.values())
    values = dict(zip(updates, found, strict=True))
    if options.energy is not None:
        return {name: min(updates[name].rank, rank_of_energy(each, options.energy)) for name, each in values.items()}
    costs = {name: _cost(update) for name, update in updates.items()}
    others = adapter.parameters - sum(costs[name] * update.rank for name, update in updates.items())
    left = int(options.budget or 0) - others
    spectra = {name: (each.tolist(), costs[name]) for name, each in values.items()}
    needed = [name for name, update in updates.items() if _is_needed(name, adapter)]
    least = sum(costs[name] for name in needed) or min(costs.values())
    if left < least:
        raise UsageError(
            f"--budget {options.budget} is too small: what is not resized takes {others:,} parameters, and the least "
            f"that factors can take is {least:,}",
            f"--budget {others + least}, or more",
        )
    return ranks_within(spectra, left, needed)


def _is_needed(name: str, adapter: Adapter) -> bool:
    """Say whether the adapter has more of the module, which PEFT reads only where it has factors, too."""
    update = adapter.updates[name]
    table = isinstance(update, LowRank) and update.table is not None
    return table or f"{name.removesuffix('.weight')}.bias" in adapter.updates


def _cost(update: LowRank) -> int:
    """Return how many parameters one rank of the update has."""
    return (update.lora_A.spec.elements + update.lora_B.spec.elements) // update.rank


def _resized(name: str, update: LowRank, rank: int, how: tuple[str | None, str]) -> Resized:
    """Return an update at that rank, as it is where it has that rank and dtype; `how` is dtype and device."""
    from loramgr.algebra.truncation import truncated
    from loramgr.tensors import torch_dtype

    module = name.removesuffix(".weight")
    own = update.lora_B.spec.dtype
    dtype, device = how[0] or own, how[1]
    product = product_of(update, device)
    if rank == update.rank and {dtype} == {own, update.lora_A.spec.dtype}:
        return Resized(_unchanged(update), ModuleError(module, rank, _norm(product), 0.0))
    made = truncated(product, rank, torch_dtype(dtype))
    if not all(bool(tensor.isfinite().all()) for tensor in (made.left, made.right)):
        raise IncompatibleError(f"{name}: its delta is too large for factors in {dtype}", "--dtype float32")
    relative = made.error / made.norm if made.norm else 0.0
    if rank and relative >= 1:
        raise IncompatibleError(f"{name}: its delta rounds to nothing in factors of {dtype}", "--dtype float32")
    error = ModuleError(module, rank, made.norm, relative)
    if not rank:
        return Resized(None, error)
    width = made.left.shape[1]
    shape_A, shape_B = (
        (width, *update.lora_A.spec.shape[1:]),
        (made.left.shape[0], width, *update.lora_B.spec.shape[2:]),
    )
    factors = (made.right.view(shape_A), made.left.view(shape_B))
    return Resized(WrittenFactors(update.kind, shape_A, shape_B, dtype, lambda: factors), replace(error, rank=width))


def _unchanged(update: LowRank) -> WrittenFactors:
    return WrittenFactors(
        kind=update.kind,
        shape_A=update.lora_A.spec.shape,
        shape_B=update.lora_B.spec.shape,
        dtype=update.lora_B.spec.dtype,
        make=lambda: (update.lora_A.load(), update.lora_B.load()),
        scaling=update.scaling,
    )


def _norm(product: Product) -> float:
    from loramgr.algebra.lowrank import decomposed
    from loramgr.algebra.spectrum import frobenius_norm

    return frobenius_norm(decomposed(product).values)


def _copy_others(version: VersionRecord, folder: Path, scratch: Path) -> list[str]:
    """Copy what the version keeps beside weights and configuration, and return the names.

    Not the remainder of an exact extraction, which belongs to the factors as they were.
    """
    from loramgr.checkpoints.output import copy_files

    names = [file.path for file in version.files if file.path not in (CONFIGURATION, REMAINDER, *WEIGHTS)]
    copy_files(folder, scratch, names)
    return names


def _recipe(version: VersionRecord, options: ResizeOptions) -> dict[str, Any]:
    said = {name: getattr(options, name) for name in ("rank", "energy", "budget")}
    return {
        "operation": "resize",
        "method": "resize",
        "inputs": [{"ref": reference(version), "digest": version.digest}],
        **{name: value for name, value in said.items() if value is not None},
        "dtype": parse_dtype(options.dtype),
        "versions": versions_used(),
    }
