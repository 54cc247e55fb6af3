"""Use cases that import checkpoints: one adapter, or all in the folders beneath one.

Adapters are read and staged by threads, some ahead of the others, and published in groups: the files of a group become
durable together, then one transaction acknowledges all its versions.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path

from loramgr.adapter import Adapter
from loramgr.catalog.catalog import Writer
from loramgr.errors import ConflictError, LoramgrError, NotFoundError, UncheckedError, UsageError
from loramgr.formats import examine, kept_files, read_adapter
from loramgr.formats.discovery import find_adapters, is_checkpoint
from loramgr.formats.examination import Examination, FileExaminer
from loramgr.formats.files import adapter_files
from loramgr.formats.folder import CONFIGURATION
from loramgr.formats.hints import HINTS, ReadHints, encode_hints
from loramgr.records import AddedVersion, Addition, FileRecord, VersionRecord
from loramgr.references import check_name, check_tag
from loramgr.store.batch import StoreBatch, batch
from loramgr.workspace.adapters import (
    annotate,
    check_finite,
    doubts,
    find_same,
    manifest,
    natural_name,
    parents_of,
    record_version,
    reference,
    summary,
)
from loramgr.workspace.finetunes import is_whole_model, written_difference
from loramgr.workspace.home import Home, NewFiles, file_state
from loramgr.workspace.initials import written_from_base, written_plain
from loramgr.workspace.matching import Match, Matcher
from loramgr.workspace.options import FROM_BASE, AddOptions
from loramgr.workspace.sources import absolute, slug

__all__ = ["add_adapter", "add_all", "holds_several"]

GROUP = 128
GROUP_BYTES = 1 << 30
_FIELDS = [field.name for field in fields(VersionRecord)]


@dataclass(frozen=True, slots=True)
class _Source:
    """An adapter on disk and the name it gets; of several for one name only the last one gets the tags."""

    path: Path
    name: str
    is_last: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An adapter that was read and whose files and manifest are staged."""

    source: _Source
    adapter: Adapter
    examination: Examination
    files: list[FileRecord]
    match: Match
    digest: str

    @property
    def digests(self) -> list[str]:
        """What has to be in the store for it: the files and the manifest."""
        return [self.digest, *(file.digest for file in self.files)]


def add_adapter(home: Home, path: Path, options: AddOptions) -> AddedVersion:
    """Import a checkpoint as a new version, or find the version that it is already.

    Raises IncompatibleError for what cannot be read exactly, does not fit its base, or holds NaN or infinities;
    ConflictError when a tag belongs to another version.
    """
    _check_options(options)
    if options.initial == FROM_BASE:
        return _add_started_by_base(home, path, options)
    if options.initial is not None:
        return _add_trained_from(home, path, options, Path(options.initial))
    if options.base is not None and is_whole_model(path):
        return _add_fine_tune(home, path, options, options.base)
    addition = _add(home, [_Source(path, options.name if options.name is not None else natural_name(path))], options)
    for error in addition.failed.values():
        raise error
    return addition.added[0]


def _add_fine_tune(home: Home, path: Path, options: AddOptions, base: str) -> AddedVersion:
    """Import a whole model as a version of what it has other than its base."""
    name = options.name if options.name is not None else slug(absolute(path).name)
    with written_difference(home, path, base) as (folder, notes):
        added = add_adapter(home, folder, replace(options, name=name))
    return replace(added, warnings=[*notes, *added.warnings])


def _add_trained_from(home: Home, path: Path, options: AddOptions, initial: Path) -> AddedVersion:
    """Import an adapter less the one that its training began with."""
    name = options.name if options.name is not None else natural_name(path)
    with written_plain(home, path, initial, options.include) as (folder, recipe):
        return add_adapter(home, folder, replace(options, name=name, initial=None, recipe=recipe))


def _add_started_by_base(home: Home, path: Path, options: AddOptions) -> AddedVersion:
    """Import an adapter less what its initialisation took out of the base."""
    name = options.name if options.name is not None else natural_name(path)
    with written_from_base(home, path, options.base, options.include) as (folder, recipe, notes):
        added = add_adapter(home, folder, replace(options, name=name, initial=None, recipe=recipe))
    return replace(added, warnings=[*notes, *added.warnings])


def add_all(home: Home, folder: Path, options: AddOptions) -> Addition:
    """Import every adapter in a folder and in those beneath it, the checkpoints of a run in their order.

    Files of weights that lie side by side are adapters by themselves; what none recognises is skipped and told.

    Each gets the name it would get alone; where folders in different places would share one, the names of those in
    between come before it. One that fails does not stop the others and is told in the result. Versions are published in
    groups, so what was added before an interruption stays, and adding again goes on from there. Raises NotFoundError
    where there is none, and UsageError for parents or metrics, which are of one adapter.
    """
    _check_options(options)
    if options.parents or options.metrics:
        raise UsageError("--parent and --metric are about one adapter", "loramgr add its folder alone")
    if options.initial is not None:
        raise UsageError("--initial is about one adapter", "loramgr add its folder alone")
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: no such folder")
    found = find_adapters(folder)
    if not found.adapters:
        natural_name(folder)  # says what there is instead
    sources, failed = _named(folder, found.adapters, options.name)
    addition = _add(home, sources, options)
    return Addition(addition.added, failed | addition.failed, found.skipped)


def holds_several(path: Path) -> bool:
    """Say whether a path is no adapter itself, but a folder with adapters in it or beneath it."""
    if not path.is_dir() or (path / CONFIGURATION).exists():
        return False
    found = find_adapters(path).adapters
    return bool(found) and path not in found


def _check_options(options: AddOptions) -> None:
    if options.name is not None:
        check_name(options.name)
    for tag in options.tags:
        check_tag(tag)


def _named(root: Path, paths: Sequence[Path], name: str | None) -> tuple[list[_Source], dict[str, LoramgrError]]:
    """Give every adapter its name; an error for each whose name would still be that of another run."""
    runs = {path: absolute(path.parent if path.is_dir() and is_checkpoint(path) else path) for path in paths}
    sharing = Counter(_own_name(run) for run in set(runs.values()))
    sources: list[_Source] = []
    owners: dict[str, Path] = {}
    failed: dict[str, LoramgrError] = {}
    for path, run in runs.items():
        chosen, notes = name or _own_name(run), tuple[str, ...]()
        if name is None and sharing[chosen] > 1:
            notes = (f"{path}: called {_path_name(root, run)}, for another one is called {_own_name(run)} as well",)
            chosen = _path_name(root, run)
        if name is None and owners.setdefault(chosen, run) != run:
            failed[str(path)] = ConflictError(
                f"{path}: its name would be {chosen}, as that of {owners[chosen]}", f"loramgr add {path} --name NAME"
            )
        else:
            sources.append(_Source(path, chosen, notes=notes))
    last = {source.name: source for source in sources}
    return [replace(source, is_last=last[source.name] is source) for source in sources], failed


def _own_name(run: Path) -> str:
    """Return the name of a run's folder, or of an adapter in one file without its suffix."""
    return slug(run.name if run.is_dir() else run.stem)


def _path_name(root: Path, run: Path) -> str:
    top = absolute(root)
    parts = run.relative_to(top).parts if run.is_relative_to(top) else ()
    return slug("-".join(parts) if parts else run.name)


class _Group:
    """Adapters that are read by threads into one batch, to be published together."""

    def __init__(self, home: Home, pool: ThreadPoolExecutor, reader: _Reader, sources: Sequence[_Source]) -> None:
        self._stack = ExitStack()
        self.staged = self._stack.enter_context(batch(home.store))
        self.sources = sources
        self.futures: list[Future[_Prepared]] = [pool.submit(reader.prepare, source, self.staged) for source in sources]

    def close(self) -> None:
        """Let go of what is not published."""
        for future in self.futures:
            future.cancel()
        for future in self.futures:
            if not future.cancelled():
                future.exception()  # waits: nobody writes into a batch that is gone
        self._stack.close()

    def outcomes(self) -> Iterator[tuple[_Source, _Prepared | LoramgrError]]:
        """Yield each adapter as it was read, or why it was not."""
        for source, future in zip(self.sources, self.futures, strict=True):
            try:
                yield source, future.result()
            except LoramgrError as error:
                yield source, error


def _add(home: Home, sources: Sequence[_Source], options: AddOptions) -> Addition:
    """Publish the sources group by group, while the next group is read."""
    from tqdm import tqdm

    result = Addition([], {})
    reader = _Reader(Matcher(home, options.base, force=options.force), options)
    groups = deque(_groups(sources))
    started: deque[_Group] = deque()
    progress = tqdm(
        total=len(sources), desc="adapters", delay=1, file=sys.stderr, disable=None if home.progress else True
    )
    with home.provisional() as new, ThreadPoolExecutor(home.jobs) as pool, progress:
        try:
            while groups or started:
                while groups and len(started) < 2:
                    started.append(_Group(home, pool, reader, groups.popleft()))
                _publish(home, new, started[0], options, result)
                progress.update(len(started[0].sources))
                started.popleft().close()
        finally:
            for group in started:
                group.close()
    return result


def _groups(sources: Sequence[_Source]) -> Iterator[list[_Source]]:
    group, size = list[_Source](), 0
    for source in sources:
        files = source.path.glob("adapter_model.*") if source.path.is_dir() else [source.path]
        size += sum(file.stat().st_size for file in files if file.exists())
        group.append(source)
        if len(group) == GROUP or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads adapters and stages their files, several at once."""

    matcher: Matcher
    options: AddOptions

    def prepare(self, source: _Source, staged: StoreBatch) -> _Prepared:
        """Read one adapter, each of its files once, and stage what a version keeps of it.

        Raises UncheckedError when a file of it cannot be read, and ConflictError when one changed meanwhile.
        """
        try:
            files, names = adapter_files(source.path), kept_files(source.path, self.options.include)
            folder = files.folder
            before = {name: file_state(folder / name) for name in names}
        except OSError as error:
            raise UncheckedError(f"{error.filename or source.path}: cannot be read: {error.strerror}") from error
        adapter = read_adapter(source.path, ReadHints(self.options.alpha, self.options.enable_lora))
        match = self.matcher.match(adapter)
        adapter = self.matcher.resolved(adapter, match)
        examination, kept = self._stage(adapter, files.weights, names, staged)
        for name, state in before.items():
            if file_state(folder / name) != state:
                raise ConflictError(
                    f"{folder / name}: the file was written to while it was read", "add it when it is complete"
                )
        if not self.options.force:
            check_finite(source.path, examination)
        digest = staged.manifests.put_bytes(manifest(adapter, kept, match.digest))
        return _Prepared(source, adapter, examination, kept, match, digest)

    def _stage(
        self, adapter: Adapter, weights: Path, names: Sequence[str], staged: StoreBatch
    ) -> tuple[Examination, list[FileRecord]]:
        """Stage the files; the weights are examined as they pass, where their format allows it.

        What a person had to say so that they could be read goes with them.
        """
        folder = weights.parent
        examiner = FileExaminer(adapter, weights) if FileExaminer.reads(adapter, weights) else None
        files = []
        for name in (each for each in names if each != HINTS):
            observe = examiner.update if examiner is not None and folder / name == weights else None
            stored = staged.blobs.put_file(folder / name, observe=observe)
            files.append(FileRecord(name, stored.digest, stored.bytes))
        if adapter.hints:
            note = encode_hints(adapter.hints)
            files.append(FileRecord(HINTS, staged.blobs.put_bytes(note), len(note)))
        return (examine(adapter) if examiner is None else examiner.result()), files


def _publish(home: Home, new: NewFiles, group: _Group, options: AddOptions, result: Addition) -> None:
    """Make a group's files durable, then acknowledge its versions; what is not published is told as failed."""
    outcomes = list(group.outcomes())
    read = [outcome for _, outcome in outcomes if isinstance(outcome, _Prepared)]
    new.adopt(group.staged.settle_files({digest for prepared in read for digest in prepared.digests}))
    inside = replace(home, store=group.staged)
    published: list[tuple[_Prepared, str, bool]] = []
    logs: dict[str, list[str]] = defaultdict(list)
    with ExitStack() as together, home.writing() as writer:
        for source, outcome in outcomes:
            before = len(writer.appended)
            try:
                if isinstance(outcome, LoramgrError):
                    raise outcome
                with writer.attempt():
                    published.append((outcome, *_record(inside, writer, outcome, options)))
            except LoramgrError as error:
                result.failed[str(source.path)] = error
            logs[source.name] += writer.appended[before:]
        together.enter_context(home.store.groups.announced(writer.appended, home.store.entries))
        group.staged.settle_entries(list(logs.values()))
        records = writer.versions_called([ref for _, ref, _ in published])
    if len(published) < len(read):
        home.tidy(new)
    result.added.extend(_added(records[ref], prepared, created) for prepared, ref, created in published)


def _record(home: Home, writer: Writer, prepared: _Prepared, options: AddOptions) -> tuple[str, bool]:
    """Publish one adapter, or find the version it is; return its reference and whether it is new."""
    source, digest = prepared.source, prepared.match.digest
    options = replace(options, tags=options.tags if source.is_last else ())
    if writer.newest(source.name) is not None:
        existing = find_same(writer, source.name, prepared.files, digest if options.base is not None else None)
        if existing is not None:
            return reference(annotate(home, writer, existing, options)), False
    content = {
        "version": prepared.digest,
        "summary": summary(prepared.adapter, prepared.examination, prepared.files, digest),
        "parents": parents_of(writer, source.name, options.parents),
    }
    return record_version(home, writer, source.name, content, options), True


def _added(record: VersionRecord, prepared: _Prepared, created: bool) -> AddedVersion:
    obstacle = prepared.adapter.obstacle
    kept = () if obstacle is None else (f"kept as it is, and not to be merged: {obstacle}",)
    said = (
        *prepared.source.notes,
        *kept,
        *prepared.adapter.warnings,
        *doubts(prepared.examination),
        *prepared.match.warnings,
    )
    return AddedVersion(**{name: getattr(record, name) for name in _FIELDS}, created=created, warnings=[*said])
