"""What an adapter is, seen through its tensors: per-module norms and ranks, and whether it can be merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from loramgr.adapter import Adapter
from loramgr.catalog.reader import Reader
from loramgr.digests import digest_bytes, digest_file
from loramgr.errors import IncompatibleError, LoramgrError
from loramgr.formats import adapter_folder, examine, kept_files, read_adapter
from loramgr.formats.examination import Examination
from loramgr.formats.registry import told_instead
from loramgr.records import BaseReference, FileRecord, FileReport, InspectReport, VersionRecord
from loramgr.references import is_path
from loramgr.workspace.adapters import manifest, natural_name, summary
from loramgr.workspace.describing import described_module, unscaled_module
from loramgr.workspace.home import Home
from loramgr.workspace.loading import loading_torch
from loramgr.workspace.matching import bind_registered, resolved_for
from loramgr.workspace.plotting import Picture
from loramgr.workspace.spectra import measured

__all__ = ["inspect_adapter", "open_adapter", "version_of_folder"]


@contextmanager
def open_adapter(home: Home, ref: str, *, is_looked_at: bool = False) -> Iterator[tuple[VersionRecord, Adapter, Path]]:
    """Give a version, its adapter and the folder of its files, from the store or, for a path, from disk.

    With `is_looked_at` the adapter of a path may lack a scaling; see `ReadHints`.
    """
    if is_path(ref):
        path = Path(ref)
        adapter = read_adapter(path, replace(home.hints, is_looked_at=is_looked_at))
        adapter = resolved_for(home, adapter, adapter.base_digest)
        yield version_of_folder(home, path, adapter), adapter, adapter_folder(path)
        return
    with home.catalog.reading() as reader:
        version = reader.version(ref)
    with home.files_of(version) as folder:
        base = None if version.base is None else version.base.digest
        yield version, resolved_for(home, read_adapter(folder), base), folder


def version_of_folder(home: Home, path: Path, adapter: Adapter) -> VersionRecord:
    """Return the record that an adapter on disk would be published with; its version is 0, since it has none."""
    folder = adapter_folder(path)
    sizes = {name: (folder / name).stat().st_size for name in kept_files(path, ())}
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
            "name": natural_name(path),
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


def inspect_adapter(
    home: Home, ref: str, *, spectrum: bool, plot: Path | str | None = None
) -> InspectReport | FileReport:
    """Report what an adapter's tensors say; `ref` may be a path, which needs no catalog entry.

    Of a path that is no adapter the report says what it is instead.

    With `spectrum` every delta is measured against the others and, where its base is at hand, against its weight;
    `plot` is a picture file to write, None for none.
    """
    picture = None if plot is None else Picture(plot)
    told = told_instead(Path(ref)) if is_path(ref) else None
    if told is not None:
        return FileReport(ref, told.kind, told.sentence, [*told.evidence], [*told.unexplained], told.hint)
    with open_adapter(home, ref, is_looked_at=True) as (version, adapter, _):
        examination = examine(adapter)
        fit = _fit(home, version, adapter, examination)
        notes: list[str] = []
        with loading_torch(), ThreadPoolExecutor(max_workers=max(1, home.jobs)) as pool:
            items = sorted(adapter.updates.items())
            described = [
                pool.submit(described_module, name, update, fit.kinds.get(name), spectrum=spectrum)
                for name, update in items
            ]
            modules = [each.result() for each in described]
            if spectrum:
                modules, notes = measured(home, version, adapter, modules)
        if adapter.is_unscaled:
            modules = [unscaled_module(module) for module in modules]
    report = InspectReport(
        **{field: getattr(version, field) for field in VersionRecord.__dataclass_fields__},
        modules=modules,
        warnings=[*adapter.warnings, *_zero(examination), *notes],
        mergeable=fit.obstacle is None,
        reason=fit.obstacle,
        share_of_base=fit.share,
        dialect=adapter.dialect,
        evidence=[*adapter.evidence],
        training={key: value for key, value in adapter.config.items() if key.startswith("ss_")},
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
    obstacle = adapter.obstacle
    if obstacle is None and examination.non_finite:
        obstacle = f"NaN or infinite values in {examination.non_finite[0]}"
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


def _zero(examination: Examination) -> list[str]:
    return [f"{module}: the update is zero, it changes nothing" for module in examination.zero_updates]


def _base_name(reader: Reader, digest: str) -> str | None:
    bases = reader.bases_with_digest(digest)
    return bases[0].name if bases else None
