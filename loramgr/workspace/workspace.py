"""`Workspace`: every use case as a method, on one home folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from loramgr.catalog.query import VersionQuery
from loramgr.records import (
    AddedVersion,
    BaseRecord,
    BaseVerification,
    ExportReport,
    InspectReport,
    MergeCheck,
    MergeReport,
    RebuildReport,
    Removal,
    SchemaReport,
    StatusReport,
    StoreVerification,
    UnmergeReport,
    VersionRecord,
)
from loramgr.workspace import adapters, bases, edits, health
from loramgr.workspace.home import Home, default_home
from loramgr.workspace.options import AddOptions, MergeOptions

__all__ = ["Workspace"]


# `list` is a method below, and would hide the built-in in its annotations
Bases = list[BaseRecord]
Versions = list[VersionRecord]


class Workspace:
    """A home folder with a store and a catalog, made on first use.

    `home` None means `LORAMGR_HOME`, else the platform's folder for user data; `jobs` None means one thread per core;
    `progress` shows bars on a terminal. Every method raises a subclass of `LoramgrError` for what a person can
    mend, and leaves catalog, store and outputs as they were when it does.
    """

    def __init__(self, home: Path | str | None = None, *, jobs: int | None = None, progress: bool = False) -> None:
        self.home = default_home() if home is None else Path(home)
        self._jobs = jobs or os.cpu_count() or 1
        self._progress = progress

    @cached_property
    def _opened(self) -> Home:
        return Home.open(self.home, self._jobs, self._progress)

    def base_add(self, source: str | Path, name: str | None = None) -> BaseRecord:
        """Fingerprint a folder, file or `hf://` address and register it as a base."""
        return bases.add_base(self._opened, str(source), name)

    def base_list(self) -> Bases:
        """Return the registered bases, by name."""
        return bases.list_bases(self._opened)

    def base_show(self, base: str) -> BaseRecord:
        """Return one registered base."""
        return bases.show_base(self._opened, base)

    def base_verify(self, base: str) -> BaseVerification:
        """Read a base again, tensor by tensor, and compare it with its registration."""
        return bases.verify_base(self._opened, base)

    def base_remove(self, base: str, *, force: bool = False, dry_run: bool = False) -> Removal:
        """Forget a base; its files stay where they are."""
        return bases.remove_base(self._opened, base, force=force, dry_run=dry_run)

    def add(self, path: Path | str, options: AddOptions | None = None) -> AddedVersion:
        """Import a checkpoint as a new version of an adapter."""
        return adapters.add_adapter(self._opened, Path(path), options or AddOptions())

    def list(self, query: VersionQuery | None = None) -> Versions:
        """Return the versions that a query selects; None means the newest one of every adapter."""
        return adapters.list_versions(self._opened, query or VersionQuery())

    def log(self, name: str) -> Versions:
        """Return the versions of an adapter, newest first."""
        with self._opened.catalog.reading() as reader:
            return reader.log(name)

    def inspect(self, ref: str, *, spectrum: bool = False) -> InspectReport:
        """Report what the tensors of a version, or of an adapter on disk, say."""
        from loramgr.workspace import inspecting

        return inspecting.inspect_adapter(self._opened, ref, spectrum=spectrum)

    def export(self, ref: str, output: Path | str) -> ExportReport:
        """Write the files of an adapter as they came."""
        return adapters.export_adapter(self._opened, ref, Path(output))

    def tag(self, ref: str, tag: str, *, move: bool = False) -> VersionRecord:
        """Give a version a tag, moving it there from another version when asked to."""
        return edits.tag(self._opened, ref, tag, move=move)

    def untag(self, ref: str) -> VersionRecord:
        """Take a tag, given as `name@tag`, off its version."""
        return edits.untag(self._opened, ref)

    def label(self, ref: str, labels: Mapping[str, str | None]) -> VersionRecord:
        """Set labels of a version; None drops one."""
        return edits.label(self._opened, ref, labels)

    def metric(self, ref: str, metrics: Mapping[str, float | None]) -> VersionRecord:
        """Set metrics of a version; None drops one."""
        return edits.measure(self._opened, ref, metrics)

    def rename(self, name: str, new: str) -> VersionRecord:
        """Give an adapter another name."""
        return edits.rename(self._opened, name, new)

    def bind(self, ref: str, base: str, *, force: bool = False) -> VersionRecord:
        """Tie an adapter to a base: a new version."""
        return edits.bind(self._opened, ref, base, force=force)

    def remove(self, ref: str, *, force: bool = False, dry_run: bool = False) -> Removal:
        """Drop a version, or by its bare name an adapter."""
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

    def unmerge(self, folder: Path | str, output: Path | str | None = None) -> UnmergeReport:
        """Take a merge out of a folder, in place when `output` is None, and prove it by the base digest."""
        from loramgr.workspace import restoring

        return restoring.unmerge(self._opened, Path(folder), None if output is None else Path(output))

    def status(self, folder: Path | str) -> StatusReport:
        """Say what a model folder is and what of it changed."""
        from loramgr.workspace import restoring

        return restoring.status(self._opened, Path(folder))

    def verify_merge(self, folder: Path | str) -> MergeCheck:
        """Replay a recorded merge and compare every bit."""
        from loramgr.workspace import restoring

        return restoring.verify_merge(self._opened, Path(folder))

    def verify(self, refs: Sequence[str] = (), *, quick: bool = False) -> StoreVerification:
        """Read the store again and compare the catalog with the logs."""
        return health.verify(self._opened, refs, quick=quick)

    def db_current(self) -> SchemaReport:
        """Return the schema revision of the catalog."""
        return health.current_schema(self.home)

    def db_upgrade(self) -> SchemaReport:
        """Bring the catalog to the newest schema."""
        return health.upgrade_schema(self.home)

    def db_rebuild(self) -> RebuildReport:
        """Make the catalog anew from the logs."""
        return health.rebuild_catalog(self.home)
