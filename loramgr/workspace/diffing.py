"""Two adapters, or two models, beside each other: what differs, and by how much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loramgr.adapter import Adapter
from loramgr.checkpoints.source import Checkpoint
from loramgr.errors import IncompatibleError, LoramgrError, NotFoundError
from loramgr.formats import read_adapter
from loramgr.formats.files import adapter_files
from loramgr.records import DiffReport, DiffSummary, ModuleDifference, VersionRecord
from loramgr.workspace.adapters import reference
from loramgr.workspace.comparing import compare_adapters, compare_models
from loramgr.workspace.home import Home
from loramgr.workspace.matching import resolved_for
from loramgr.workspace.plotting import Picture
from loramgr.workspace.sources import find_base, is_outside, open_source

__all__ = ["diff"]


@dataclass(frozen=True, slots=True)
class _Adapter:
    """An adapter to be compared: a version, or else the folder of one on disk."""

    text: str
    version: VersionRecord | None
    folder: Path | None  # of a file that stands alone, the file

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.text if self.version is None else reference(self.version)

    @property
    def digest(self) -> str | None:
        """The version digest, None on disk."""
        return None if self.version is None else self.version.digest

    def is_same(self, other: _Adapter) -> bool:
        """Say, without reading, whether both are known to be the same."""
        if self.folder is None or other.folder is None:
            return self.digest is not None and self.digest == other.digest
        return self.folder.resolve() == other.folder.resolve()


@dataclass(frozen=True, slots=True)
class _Model:
    """A model to be compared; `digest` is that of a registered base, None for a path that was not hashed."""

    name: str
    digest: str | None
    checkpoint: Checkpoint

    def is_same(self, other: _Model) -> bool:
        """Say, without reading, whether both are known to be the same."""
        if self.digest is not None and self.digest == other.digest:
            return True
        return self.checkpoint.path.resolve() == other.checkpoint.path.resolve()


def diff(home: Home, a: str, b: str, *, spectrum: bool, plot: Path | str | None = None) -> DiffReport:
    """Compare two adapters (references or paths) or two models (names of bases, paths or hub addresses).

    `plot` is a picture file to write, None for none.
    Raises NotFoundError for what is neither, and IncompatibleError for an adapter and a model, for different bases,
    for no module in common, and for values that are no numbers.
    """
    picture = None if plot is None else Picture(plot)
    report = _diff(home, a, b, spectrum=spectrum)
    if picture is None:
        return report
    picture.draw_diff(report)
    return replace(report, plot=str(picture.path))


def _diff(home: Home, a: str, b: str, *, spectrum: bool) -> DiffReport:
    first, second = _found(home, a), _found(home, b)
    if isinstance(first, _Adapter) and isinstance(second, _Adapter):
        return _diff_adapters(home, first, second, spectrum=spectrum)
    if isinstance(first, _Model) and isinstance(second, _Model):
        return _diff_models(home, first, second)
    model = a if isinstance(first, _Model) else b
    raise IncompatibleError(f"{model} is a whole model and the other an adapter", "name two adapters, or two models")


def _found(home: Home, text: str) -> _Adapter | _Model:
    if is_outside(text):
        return _found_outside(text)
    with home.catalog.reading() as reader:
        try:
            return _Adapter(text, reader.version(text), None)
        except NotFoundError as no_adapter:
            try:
                reader.base(text)
            except LoramgrError:
                raise no_adapter from None
    base = find_base(home, text)
    return _Model(base.name or text, base.digest, base.checkpoint)


def _found_outside(text: str) -> _Adapter | _Model:
    try:
        files = adapter_files(Path(text))
        return _Adapter(text, None, files.weights if files.is_single else files.folder)
    except (NotFoundError, IncompatibleError) as no_adapter:
        try:
            checkpoint, _, _ = open_source(text)
        except (NotFoundError, IncompatibleError) as no_model:
            raise (no_model if text.startswith("hf://") else no_adapter) from None
    return _Model(text, None, checkpoint)


def _diff_adapters(home: Home, first: _Adapter, second: _Adapter, *, spectrum: bool) -> DiffReport:
    with ExitStack() as stack:
        a = stack.enter_context(_opened(home, first))
        b = a if first.is_same(second) else stack.enter_context(_opened(home, second))
        bases = [_base(side, adapter) for side, adapter in ((first, a), (second, b))]
        if None not in bases and bases[0] != bases[1]:
            raise IncompatibleError(
                f"{first.name} belongs to the base {bases[0]}, and {second.name} to {bases[1]}",
                "compare adapters of one base",
            )
        known = bases[0] or bases[1]
        a, b = (resolved_for(home, each, known) for each in (a, b))
        modules, notes = compare_adapters(home, (a, b), known, spectrum=spectrum)
    if None in bases and known is not None:
        unknown = first if bases[0] is None else second
        notes.insert(0, f"{unknown.name} does not say which base it belongs to: taken for the other's, {known}")
    return DiffReport(
        first.name,
        second.name,
        "adapters",
        first.digest,
        second.digest,
        _config_difference(_configuration(a), _configuration(b)),
        modules,
        _summary(modules),
        notes=notes,
    )


@contextmanager
def _opened(home: Home, side: _Adapter) -> Iterator[Adapter]:
    if side.version is None:
        assert side.folder is not None
        yield read_adapter(side.folder, home.hints)
        return
    with home.files_of(side.version) as folder:
        base = side.version.base
        yield resolved_for(home, read_adapter(folder), None if base is None else base.digest)


def _base(side: _Adapter, adapter: Adapter) -> str | None:
    """Return the digest of the base that the adapter belongs to; None where nobody knows."""
    if side.version is not None:
        return None if side.version.base is None else side.version.base.digest
    return adapter.base_digest


def _diff_models(home: Home, first: _Model, second: _Model) -> DiffReport:
    other = first if first.is_same(second) else second
    modules, notes = compare_models(home, (first.checkpoint, other.checkpoint))
    config = _config_difference(first.checkpoint.config or {}, other.checkpoint.config or {})
    named = (first.name, second.name, "models", first.digest, second.digest)
    return DiffReport(*named, config, modules, _summary(modules), notes=notes)


def _configuration(adapter: Adapter) -> dict[str, Any]:
    return {**adapter.config, "format": adapter.format, "method": adapter.method, "dtype": adapter.dtype}


def _config_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the keys with different values; a missing one is None, and lists of names have no order."""
    keys = sorted(a.keys() | b.keys())
    return {key: [a.get(key), b.get(key)] for key in keys if _unordered(a.get(key)) != _unordered(b.get(key))}


def _unordered(value: Any) -> Any:
    names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return sorted(value) if names else value


def _summary(modules: Sequence[ModuleDifference]) -> DiffSummary:
    from loramgr.algebra.comparison import Distances, Tally

    tally, measured, unknown = Tally(), 0, 0
    for each in modules:
        if each.norm_a is None or each.norm_b is None or each.distance is None:
            unknown += each.status != "same"
        else:
            measured += 1
            tally.include(Distances(each.norm_a, each.norm_b, each.distance, each.cosine))
    whole = tally.distances()
    if all(each.status == "same" for each in modules) and any(each.cosine == 1 for each in modules):
        whole = replace(whole, cosine=1.0)  # also where no norm is known
    counts = Counter(each.status for each in modules)
    nothing = unknown > 0 and not measured
    return DiffSummary(
        same=counts["same"],
        changed=counts["changed"],
        added=counts["added"],
        removed=counts["removed"],
        unknown=unknown,
        distance=None if nothing else whole.distance,
        relative_distance=None if nothing else whole.relative_distance,
        cosine=None if nothing else whole.cosine,
    )
