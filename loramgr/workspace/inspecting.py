"""What an adapter is, seen through its tensors: per-module norms and ranks, and whether it can be merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from loramgr.adapter import Adapter, LowRank, Update
from loramgr.catalog.reader import Reader
from loramgr.digests import digest_bytes, digest_file
from loramgr.errors import IncompatibleError, LoramgrError
from loramgr.formats import adapter_folder, examine, kept_files, read_adapter
from loramgr.formats.examination import Examination
from loramgr.records import BaseReference, FileRecord, InspectReport, ModuleRecord, VersionRecord
from loramgr.references import is_path
from loramgr.workspace.adapters import manifest, summary
from loramgr.workspace.home import Home
from loramgr.workspace.loading import loading_torch
from loramgr.workspace.matching import bind_registered
from loramgr.workspace.pairs import kind_alone, module_name
from loramgr.workspace.plotting import Picture
from loramgr.workspace.sources import slug
from loramgr.workspace.spectra import Delta, measured

__all__ = ["inspect_adapter", "open_adapter", "version_of_folder"]


@contextmanager
def open_adapter(home: Home, ref: str) -> Iterator[tuple[VersionRecord, Adapter, Path]]:
    """Give a version, its adapter and the folder of its files, from the store or, for a path, from disk."""
    if is_path(ref):
        folder = adapter_folder(Path(ref))
        adapter = read_adapter(folder)
        yield version_of_folder(home, folder, adapter), adapter, folder
        return
    with home.catalog.reading() as reader:
        version = reader.version(ref)
    with home.files_of(version) as folder:
        yield version, read_adapter(folder), folder


def version_of_folder(home: Home, folder: Path, adapter: Adapter) -> VersionRecord:
    """Return the record that an adapter on disk would be published with; its version is 0, since it has none."""
    sizes = {name: (folder / name).stat().st_size for name in kept_files(folder, ())}
    files = [FileRecord(name, digest_file(folder / name), size) for name, size in sizes.items()]
    digest = adapter.base_digest
    with home.catalog.reading() as reader:
        base = None if digest is None else BaseReference(_base_name(reader, digest), digest)
    facts = summary(adapter, examine(adapter), files, digest)
    shared = {key: facts[key] for key in facts.keys() & VersionRecord.__dataclass_fields__.keys()}
    changed = max((folder / name).stat().st_mtime for name in sizes)
    return VersionRecord(
        **{
            **shared,
            "name": slug(folder.name),
            "version": 0,
            "digest": digest_bytes(manifest(adapter, files, digest)),
            "base": base,
            "files": files,
            "parents": [],
            "tags": [],
            "labels": {},
            "metrics": {},
            "message": "",
            "created_at": datetime.fromtimestamp(changed, UTC).isoformat().replace("+00:00", "Z"),
        }
    )


def inspect_adapter(home: Home, ref: str, *, spectrum: bool, plot: Path | str | None = None) -> InspectReport:
    """Report what an adapter's tensors say; `ref` may be a path, which needs no catalog entry.

    With `spectrum` every delta is measured against the others and, where its base is at hand, against its weight;
    `plot` is a picture file to write, None for none.
    """
    picture = None if plot is None else Picture(plot)
    with open_adapter(home, ref) as (version, adapter, _):
        examination = examine(adapter)
        fit = _fit(home, version, adapter, examination)
        notes: list[str] = []
        with loading_torch(), ThreadPoolExecutor(max_workers=max(1, home.jobs)) as pool:
            items = sorted(adapter.updates.items())
            described = [
                pool.submit(_module, name, update, fit.kinds.get(name), spectrum=spectrum) for name, update in items
            ]
            modules = [each.result() for each in described]
            if spectrum:
                modules, notes = measured(home, version, adapter, modules)
    report = InspectReport(
        **{field: getattr(version, field) for field in VersionRecord.__dataclass_fields__},
        modules=modules,
        warnings=[*adapter.warnings, *_zero(examination), *notes],
        mergeable=fit.obstacle is None,
        reason=fit.obstacle,
        share_of_base=fit.share,
    )
    if picture is None:
        return report
    picture.draw_inspection(report)
    return replace(report, plot=str(picture.path))


@dataclass(frozen=True)
class _Fit:
    """How an adapter lies on its base: why it cannot be merged, the kind of every bound update, its share of weights.

    None and empty where no base is registered.
    """

    obstacle: str | None
    kinds: Mapping[str, str] = field(default_factory=dict)
    share: float | None = None


def _fit(home: Home, version: VersionRecord, adapter: Adapter, examination: Examination) -> _Fit:
    obstacle = f"NaN or infinite values in {examination.non_finite[0]}" if examination.non_finite else None
    with home.catalog.reading() as reader:
        bases = [] if version.base is None else reader.bases_with_digest(version.base.digest)
    if not bases:
        return _Fit(obstacle)
    share = version.parameters / bases[0].parameters
    try:
        bound = bind_registered(home, adapter, bases[0]).updates
    except IncompatibleError as error:
        return _Fit(obstacle or error.message, share=share)
    except LoramgrError as error:
        return _Fit(obstacle or f"could not be checked: {error.message}", share=share)
    return _Fit(obstacle, {update.name: update.kind for update in bound}, share)


def _module(name: str, update: Update, kind: str | None, *, spectrum: bool) -> ModuleRecord:
    """Describe one update; `kind` is what it is on the base, None to go by the adapter alone."""
    kind = kind or kind_alone(name, update)
    if isinstance(update, LowRank):
        return _low_rank_module(module_name(name), update, kind, spectrum=spectrum)
    spec = next(update.views()).spec
    inputs = spec.shape[1] if len(spec.shape) == 2 else None
    outputs = spec.shape[0] if spec.shape else None
    return ModuleRecord(module_name(name), kind, None, None, None, inputs, outputs, spec.dtype, None, None)


def _low_rank_module(name: str, update: LowRank, kind: str, *, spectrum: bool) -> ModuleRecord:
    from loramgr.algebra.spectrum import effective_rank, frobenius_norm

    delta = Delta.of(update)
    told = None if delta is None or not spectrum else delta
    return ModuleRecord(
        name=name,
        kind=kind,
        rank=update.rank,
        alpha=update.alpha,
        scaling=update.scaling,
        in_features=update.lora_A.spec.shape[1],
        out_features=update.lora_B.spec.shape[0],
        dtype=update.lora_A.spec.dtype,
        delta_norm=None if delta is None else frobenius_norm(delta.values),
        effective_rank=None if delta is None else effective_rank(delta.values),
        spectrum=None if told is None else told.values.tolist(),
        rank_used=None if told is None else told.rank_used,
        dead_ranks=None if told is None else told.dead_ranks,
    )


def _zero(examination: Examination) -> list[str]:
    return [f"{module}: the update is zero, it changes nothing" for module in examination.zero_updates]


def _base_name(reader: Reader, digest: str) -> str | None:
    bases = reader.bases_with_digest(digest)
    return bases[0].name if bases else None
