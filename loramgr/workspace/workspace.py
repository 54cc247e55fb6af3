"""`Workspace`: every use case as a method, on one home folder.

Each method imports its use case when it is called: asking the catalog must not cost the reading of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from loramgr.catalog.query import VersionQuery
from loramgr.records import (
    AddedVersion,
    Addition,
    ArchiveReport,
    BaseRecord,
    BaseVerification,
    DerivedVersion,
    DiffReport,
    ExportReport,
    FileReport,
    GcReport,
    HistoryEntry,
    InspectReport,
    MergeCheck,
    MergeReport,
    RebuildReport,
    RecomposeReport,
    Removal,
    SchemaReport,
    StatusReport,
    StoreVerification,
    UnmergeReport,
    Usage,
    VersionRecord,
)
from loramgr.workspace.exchange import DAY, Exchange
from loramgr.workspace.options import AddOptions, ComposeOptions, ExtractOptions, MergeOptions, ResizeOptions, Retention

if TYPE_CHECKING:
    import torch

    from loramgr.workspace.live import LiveModel
    from loramgr.workspace.usage import By

__all__ = ["Workspace"]

# `list` is a method below, and would hide the built-in in its annotations
Bases = list[BaseRecord]
Versions = list[VersionRecord]
Entries = list[HistoryEntry]
Usages = list[Usage]
Inspection = InspectReport | FileReport


class Workspace(Exchange):
    """A home folder with a store and a catalog, made on first use.

    `home` None means `LORAMGR_HOME`, else the platform's folder for user data; `jobs` None means one thread per core;
    `progress` shows bars on a terminal; `hints` is what adapters given as paths do not say. Every method raises a
    subclass of `LoramgrError` for what a person can mend, and leaves catalog, store and outputs as they were then.
    """

    def base_add(self, source: str | Path, name: str | None = None) -> BaseRecord:
        """Fingerprint a folder, file or `hf://` address and register it as a base."""
        from loramgr.workspace import bases

        return bases.add_base(self._opened, str(source), name)

    def base_list(self) -> Bases:
        """Return the registered bases, by name."""
        from loramgr.workspace import bases

        return bases.list_bases(self._opened)

    def base_show(self, base: str) -> BaseRecord:
        """Return one registered base."""
        from loramgr.workspace import bases

        return bases.show_base(self._opened, base)

    def base_verify(self, base: str) -> BaseVerification:
        """Read a base again, tensor by tensor, and compare it with its registration."""
        from loramgr.workspace import bases

        return bases.verify_base(self._opened, base)

    def base_remove(self, base: str, *, force: bool = False, dry_run: bool = False) -> Removal:
        """Forget a base; its files stay where they are."""
        from loramgr.workspace import bases

        return bases.remove_base(self._opened, base, force=force, dry_run=dry_run)

    def add(self, path: Path | str, options: AddOptions | None = None) -> AddedVersion:
        """Import a checkpoint as a new version of an adapter."""
        from loramgr.workspace.adding import add_adapter

        return add_adapter(self._opened, Path(path), options or AddOptions())

    def add_all(self, folder: Path | str, options: AddOptions | None = None) -> Addition:
        """Import every adapter in a folder and beneath it; one that fails does not stop the others."""
        from loramgr.workspace.adding import add_all

        return add_all(self._opened, Path(folder), options or AddOptions())

    def holds_several(self, path: Path | str) -> bool:
        """Say whether a path is no adapter itself, but a folder with adapters beneath it."""
        from loramgr.workspace.adding import holds_several

        return holds_several(Path(path))

    def list(self, query: VersionQuery | None = None) -> Versions:
        """Return the versions that a query selects; None means the newest one of every adapter."""
        from loramgr.workspace import listing

        return listing.list_versions(self._opened, query or VersionQuery())

    def log(self, name: str) -> Versions:
        """Return the versions of an adapter, newest first."""
        from loramgr.workspace import listing

        return listing.log_of(self._opened, name)

    def history(self, ref: str | None = None, *, limit: int | None = None) -> Entries:
        """Return log entries, newest first: all of them, an adapter's, or those about one version."""
        from loramgr.workspace.history import history

        return history(self._opened, ref, limit)

    def du(self, by: By = "adapter") -> Usages:
        """Return how many bytes the files of adapters, or of the adapters of each base, take."""
        from loramgr.workspace.usage import usage

        return usage(self._opened, by)

    def inspect(self, ref: str, *, spectrum: bool = False, plot: Path | str | None = None) -> Inspection:
        """Report what the tensors of a version, or of an adapter on disk, say; `plot` is a picture file to write."""
        from loramgr.workspace import inspecting

        return inspecting.inspect_adapter(self._opened, ref, spectrum=spectrum, plot=plot)

    def diff(self, a: str, b: str, *, spectrum: bool = False, plot: Path | str | None = None) -> DiffReport:
        """Compare two adapters or two models, by reference, name or path; `plot` is a picture file to write."""
        from loramgr.workspace import diffing

        return diffing.diff(self._opened, a, b, spectrum=spectrum, plot=plot)

    def export(self, ref: str, output: Path | str, format: str | None = None, base: str | None = None) -> ExportReport:
        """Write an adapter for another tool: its files as they came, or in another format."""
        from loramgr.workspace import exporting

        return exporting.export_adapter(self._opened, ref, Path(output), format, base)

    def compose(
        self,
        adapters: Sequence[str | tuple[str, float]],
        name: str,
        options: ComposeOptions | None = None,
        add: AddOptions | None = None,
    ) -> DerivedVersion:
        """Make a version of `name` out of several, as `REF`, `REF=WEIGHT` or (ref, weight), told as `add` says."""
        from loramgr.workspace import composing

        return composing.compose(self._opened, adapters, name, options or ComposeOptions(), add or AddOptions())

    def recompose(self, ref: str, *, device: str = "auto") -> RecomposeReport:
        """Make a composed version again from its recipe, and compare."""
        from loramgr.workspace import recomposing

        return recomposing.recompose(self._opened, ref, device)

    def tag(self, ref: str, tag: str, *, move: bool = False) -> VersionRecord:
        """Give a version a tag, moving it there from another version when asked to."""
        from loramgr.workspace import edits

        return edits.tag(self._opened, ref, tag, move=move)

    def untag(self, ref: str) -> VersionRecord:
        """Take a tag, given as `name@tag`, off its version."""
        from loramgr.workspace import edits

        return edits.untag(self._opened, ref)

    def label(self, ref: str, labels: Mapping[str, str | None]) -> VersionRecord:
        """Set labels of a version; None drops one."""
        from loramgr.workspace import edits

        return edits.label(self._opened, ref, labels)

    def metric(self, ref: str, metrics: Mapping[str, float | None]) -> VersionRecord:
        """Set metrics of a version; None drops one."""
        from loramgr.workspace import edits

        return edits.measure(self._opened, ref, metrics)

    def rename(self, name: str, new: str) -> VersionRecord:
        """Give an adapter another name."""
        from loramgr.workspace import edits

        return edits.rename(self._opened, name, new)

    def bind(self, ref: str, base: str, *, force: bool = False) -> VersionRecord:
        """Tie an adapter to a base: a new version."""
        from loramgr.workspace import edits

        return edits.bind(self._opened, ref, base, force=force)

    def remove(self, ref: str, *, force: bool = False, dry_run: bool = False) -> Removal:
        """Drop a version, or by its bare name an adapter."""
        from loramgr.workspace import edits

        return edits.remove(self._opened, ref, force=force, dry_run=dry_run)

    def merge(
        self,
        base: str,
        adapters: Sequence[str | tuple[str, float]],
        output: Path | str,
        options: MergeOptions | None = None,
    ) -> MergeReport:
        """Merge adapters, as `REF`, `REF=WEIGHT` or (ref, weight), into a base and write a model folder."""
        from loramgr.workspace import merging

        return merging.merge(self._opened, base, adapters, Path(output), options or MergeOptions())

    def attach(
        self,
        model: torch.nn.Module | Mapping[str, torch.Tensor],
        *,
        base: str | None = None,
        numerics: str = "fast",
        prove: bool = True,
        keep_tied: bool = False,
    ) -> LiveModel:
        """Take a module or a dictionary of tensors in hand, to merge adapters into it in place; see `loramgr.attach`.

        `base` is the registered base, path or hub address that the model has to be, None for the one that adapters
        record, as far as it is registered; `numerics` is fast or exact; `prove` takes the digest of every tensor before
        its first change and compares it after the way back; `keep_tied` changes tied names together, as PEFT does.
        """
        from loramgr.workspace import live, live_base

        known = None if base is None else live_base.asked_base(self._opened, base)
        options = live.LiveOptions(known, numerics, prove=prove, keep_tied=keep_tied)
        return live.LiveModel(self._opened, model, options)

    def extract(
        self, finetuned: str | Path, base: str, options: ExtractOptions, add: AddOptions | None = None
    ) -> DerivedVersion:
        """Publish an adapter of a full fine-tune and its base."""
        from loramgr.workspace import extracting

        return extracting.extract(self._opened, str(finetuned), base, options, add)

    def resize(self, ref: str, options: ResizeOptions, add: AddOptions | None = None) -> DerivedVersion:
        """Publish the best version of lower rank."""
        from loramgr.workspace import resizing

        return resizing.resize(self._opened, ref, options, add)

    def remake(
        self,
        base: str,
        adapters: Sequence[str | tuple[str, float]],
        output: Path | str,
        options: MergeOptions | None = None,
    ) -> MergeReport:
        """Write the fine-tune that an adapter was extracted from with `exact`, bit for bit."""
        from loramgr.workspace import remaking

        return remaking.remake(self._opened, base, adapters, Path(output), options or MergeOptions())

    def merge_in_place(
        self, base: str, adapters: Sequence[str | tuple[str, float]], options: MergeOptions | None = None
    ) -> MergeReport:
        """Merge adapters into a base's own folder, which keeps what gives the base back."""
        from loramgr.workspace import merging

        return merging.merge_in_place(self._opened, base, adapters, options or MergeOptions())

    def switch(
        self,
        folder: Path | str,
        adapters: Sequence[str | tuple[str, float]],
        options: MergeOptions | None = None,
    ) -> MergeReport:
        """Merge other adapters into a merged folder, in the place of those that are in it."""
        from loramgr.workspace import switching

        return switching.switch(self._opened, Path(folder), adapters, options or MergeOptions())

    def unmerge(self, folder: Path | str, output: Path | str | None = None, *, device: str = "auto") -> UnmergeReport:
        """Take a merge out of a folder, in place when `output` is None, and prove it by the base digest."""
        from loramgr.workspace import restoring

        return restoring.unmerge(self._opened, Path(folder), None if output is None else Path(output), device)

    def status(self, folder: Path | str) -> StatusReport:
        """Say what a model folder is and what of it changed."""
        from loramgr.workspace import standing

        return standing.status(self._opened, Path(folder))

    def verify_merge(self, folder: Path | str) -> MergeCheck:
        """Replay a recorded merge and compare every bit."""
        from loramgr.workspace import restoring

        return restoring.verify_merge(self._opened, Path(folder))

    def verify(
        self,
        refs: Sequence[str] = (),
        *,
        quick: bool = False,
        sample: tuple[int, int] | None = None,
        repair: bool = False,
    ) -> StoreVerification:
        """Read the store again, or the N-th of T parts as `sample`, and compare the catalog with the logs.

        `repair` mends what can be mended first, and what is reported is what remains.
        """
        from loramgr.workspace import remote_sources, repairing, verifying

        scope = verifying.Scope(quick, sample)
        if not repair:
            return verifying.verify(self._opened, refs, scope)
        home, done = repairing.open_home(self.home, self._jobs, self._progress)
        remotes = remote_sources.RemoteSources(home)
        report = repairing.repair(home, refs, scope, remotes.sources())
        remotes.tidy()
        return replace(report, repaired=[*done, *report.repaired], notes=[*report.notes, *dict.fromkeys(remotes.notes)])

    def gc(self, grace: timedelta = DAY, *, dry_run: bool = False) -> GcReport:
        """Take out of the store what no log refers to and is older than the grace, in two steps a grace apart."""
        from loramgr.workspace import collecting

        return collecting.collect(self._opened, grace, dry_run=dry_run)

    def prune(self, name: str | None, keep: Retention, *, dry_run: bool = False) -> Removal:
        """Drop the old versions of an adapter, of every adapter where `name` is None."""
        from loramgr.workspace import retention

        return retention.prune(self._opened, name, keep, dry_run=dry_run)

    def restore(self, ref: str) -> VersionRecord:
        """Bring a removed version back, or by a bare name what the newest removal took."""
        from loramgr.workspace import retention

        return retention.restore(self._opened, ref)

    def home_export(self, archive: Path | str) -> ArchiveReport:
        """Write everything that counts into one archive."""
        from loramgr.workspace.archive import export_home

        return export_home(self._opened, Path(archive))

    def home_import(self, archive: Path | str) -> ArchiveReport:
        """Take in what an archive holds and this home lacks."""
        from loramgr.workspace.archive import import_home

        return import_home(self._opened, Path(archive))

    def db_current(self) -> SchemaReport:
        """Return the schema revision of the catalog."""
        from loramgr.workspace import health

        return health.current_schema(self.home)

    def db_upgrade(self) -> SchemaReport:
        """Bring the catalog to the newest schema."""
        from loramgr.workspace import health

        return health.upgrade_schema(self.home)

    def db_rebuild(self) -> RebuildReport:
        """Make the catalog anew from the logs."""
        from loramgr.workspace import health

        return health.rebuild_catalog(self.home)
