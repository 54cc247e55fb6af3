"""How records look to a person: lines of text, never printed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from loramgr.cli.happenings import phrase
from loramgr.digests import short
from loramgr.records import (
    BaseRecord,
    BaseReference,
    DerivedVersion,
    DiffReport,
    FileRecord,
    FileReport,
    HistoryEntry,
    InspectReport,
    MergedAdapter,
    ModuleDifference,
    ModuleError,
    ModuleRecord,
    RemoteRecord,
    RemoteStatus,
    RemoteVersionRecord,
    TransferReport,
    Usage,
    VersionRecord,
)

__all__ = ["names", "render", "size", "table"]

Cell = str | int | float | None
_LONG = 60  # characters


def size(count: int) -> str:
    """Return a number of bytes in the largest unit that leaves at least one whole of it."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def table(headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Return aligned lines under their headings; numbers stand on the right, None is a dash."""
    cells = [list(headings), *([_cell(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(cell, int | float | None) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]


def _cell(value: Cell) -> str:
    """Return a value as text that fits on one line."""
    if value is None or value == "":
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("\n", " ")


def names(record: Any) -> list[str]:
    """Return what a script needs of a record: references, names or paths, one a line."""
    if isinstance(record, list):
        return [line for item in record for line in names(item)]
    if isinstance(record, (VersionRecord, RemoteVersionRecord)):
        return [f"{record.name}@v{record.version}"]
    if isinstance(record, DiffReport):
        return [module.name for module in _by_change(record.modules) if module.status != "same"]
    fields_of_names = _NAMED_BY.get(type(record), ("name", "output", "removed", "revision"))
    values = [getattr(record, field, None) for field in fields_of_names]
    value: Any = next((value for value in values if value is not None), [])
    return value if isinstance(value, list) else [str(value)]


_NAMED_BY: dict[type, tuple[str, ...]] = {HistoryEntry: ("digest",), TransferReport: ("versions",)}


def render(record: Any) -> list[str]:
    """Return the lines that show a record, or a table of several."""
    if isinstance(record, list):
        return _rows(record)
    if isinstance(record, InspectReport):
        seen = [f"seen: {sentence}" for sentence in record.evidence]
        return [*_fields(record, _hidden(record)), *seen, *_training(record.training), "", *_modules(record.modules)]
    if isinstance(record, FileReport):
        unclear = [f"not explained: {name}" for name in record.unexplained]
        return [
            f"{record.path}: no adapter, but {record.what}",
            *(f"seen: {each}" for each in record.evidence),
            *unclear,
        ]
    if isinstance(record, DiffReport):
        return _difference(record)
    if isinstance(record, DerivedVersion):
        return [*_fields(record, _hidden(record)), *_errors(record.errors)]
    return _fields(record, _hidden(record))


def _training(metadata: dict[str, str]) -> list[str]:
    """Return what a file says of its training, a line each; the beginning of what is long."""
    width = max(map(len, metadata), default=0)
    lines = [f"{key:{width}}  {_setting(value)}" for key, value in sorted(metadata.items())]
    return ["", *lines] if lines else []


def _rows(records: list[Any]) -> list[str]:
    """Return a table of records of one kind, without the columns that say nothing; no line when there are none."""
    if not records:
        return []
    columns = _COLUMNS.get(type(records[0]), _VERSION_COLUMNS)
    read = {heading: [value(record) for record in records] for heading, value in columns.items()}
    told = {heading: cells for heading, cells in read.items() if any(cell not in (None, "") for cell in cells)}
    rows = list(zip(*told.values(), strict=True))
    return [*table(list(told), rows), *_total(records)]


def _total(records: list[Any]) -> list[str]:
    """Return the line that adds up what several things take."""
    if not isinstance(records[0], Usage):
        return []
    total = sum(record.bytes for record in records)
    return [f"total {size(total)} ({total:,} bytes)"]


_BASE_COLUMNS: dict[str, Callable[[BaseRecord], Cell]] = {
    "NAME": lambda base: base.name,
    "DIGEST": lambda base: short(base.digest),
    "ARCHITECTURE": lambda base: base.architecture,
    "DTYPE": lambda base: base.dtype,
    "PARAMETERS": lambda base: base.parameters,
    "SIZE": lambda base: size(base.bytes),
    "SOURCE": lambda base: base.source,
}

_VERSION_COLUMNS: dict[str, Callable[[VersionRecord], Cell]] = {
    "VERSION": lambda version: f"{version.name}@v{version.version}",
    "DIGEST": lambda version: short(version.digest),
    "METHOD": lambda version: version.method,
    "RANK": lambda version: version.rank,
    "BASE": lambda version: _text(version.base),
    "SIZE": lambda version: size(version.bytes),
    "PARENTS": lambda version: _text(version.parents),
    "TAGS": lambda version: _text(version.tags),
    "METRICS": lambda version: _text(version.metrics),
    "CREATED": lambda version: version.created_at[:19].replace("T", " "),
    "MESSAGE": lambda version: version.message,
}

_HISTORY_COLUMNS: dict[str, Callable[[HistoryEntry], Cell]] = {
    "TIME": lambda entry: entry.time[:19].replace("T", " "),
    "AUTHOR": lambda entry: entry.author,
    "NAME": lambda entry: entry.name if entry.log == "adapter" else f"{entry.log} {entry.name}",
    "EVENT": lambda entry: entry.kind,
    "WHAT": lambda entry: phrase(entry.content),
    "ENTRY": lambda entry: short(entry.digest),
}

_USAGE_COLUMNS: dict[str, Callable[[Usage], Cell]] = {
    "NAME": lambda usage: usage.name,
    "SIZE": lambda usage: size(usage.bytes),
    "BYTES": lambda usage: usage.bytes,
}

_REMOTE_COLUMNS: dict[str, Callable[[RemoteRecord], Cell]] = {
    "NAME": lambda remote: remote.name,
    "URL": lambda remote: remote.url,
}

_STATUS_COLUMNS: dict[str, Callable[[RemoteStatus], Cell]] = {
    "NAME": lambda status: status.name,
    "STATE": lambda status: status.state,
    "AHEAD": lambda status: status.ahead,
    "BEHIND": lambda status: status.behind,
    "HEADS": lambda status: ", ".join(map(short, status.heads)),
}

_REMOTE_VERSION_COLUMNS: dict[str, Callable[[RemoteVersionRecord], Cell]] = {
    "VERSION": lambda version: f"{version.name}@v{version.version}",
    "DIGEST": lambda version: short(version.digest),
    "METHOD": lambda version: version.method,
    "SIZE": lambda version: size(version.bytes),
    "VERSIONS": lambda version: version.versions,
    "TAGS": lambda version: _text(version.tags),
    "HERE": lambda version: _text(version.here),
    "CREATED": lambda version: version.created_at[:19].replace("T", " "),
    "MESSAGE": lambda version: version.message,
}

_COLUMNS: dict[type, dict[str, Callable[[Any], Cell]]] = {
    BaseRecord: _BASE_COLUMNS,
    HistoryEntry: _HISTORY_COLUMNS,
    RemoteRecord: _REMOTE_COLUMNS,
    RemoteStatus: _STATUS_COLUMNS,
    RemoteVersionRecord: _REMOTE_VERSION_COLUMNS,
    Usage: _USAGE_COLUMNS,
}

_MODULE_COLUMNS: dict[str, Callable[[ModuleRecord], Cell]] = {
    "MODULE": lambda module: module.name,
    "KIND": lambda module: module.kind,
    "RANK": lambda module: module.rank,
    "ALPHA": lambda module: module.alpha,
    "SCALING": lambda module: module.scaling,
    "IN": lambda module: module.in_features,
    "OUT": lambda module: module.out_features,
    "DTYPE": lambda module: module.dtype,
    "NORM": lambda module: module.delta_norm,
    "EFFECTIVE RANK": lambda module: module.effective_rank,
}

_SPECTRUM_COLUMNS: dict[str, Callable[[ModuleRecord], Cell]] = {
    "USED": lambda module: module.rank_used,
    "DEAD": lambda module: None if module.dead_ranks is None else len(module.dead_ranks),
    "SHARE OF W": lambda module: module.share_of_weight,
    "× MEDIAN": lambda module: module.norm_to_median,
    "OUTLIER": lambda module: "!" if module.outlier else None,
}

_ERROR_COLUMNS: dict[str, Callable[[ModuleError], Cell]] = {
    "MODULE": lambda module: module.name,
    "RANK": lambda module: module.rank,
    "NORM": lambda module: module.norm,
    "RELATIVE ERROR": lambda module: module.relative_error,
}

_DIFFERENCE_COLUMNS: dict[str, Callable[[ModuleDifference], Cell]] = {
    "MODULE": lambda module: module.name,
    "STATUS": lambda module: module.status,
    "KIND": lambda module: module.kind,
    "DISTANCE": lambda module: module.distance,
    "RELATIVE": lambda module: module.relative_distance,
    "COSINE": lambda module: module.cosine,
    "NORM A": lambda module: module.norm_a,
    "NORM B": lambda module: module.norm_b,
    "RANK A": lambda module: module.rank_a,
    "RANK B": lambda module: module.rank_b,
    "φ": lambda module: module.subspace_similarity,
}


def _modules(modules: list[ModuleRecord]) -> list[str]:
    """Return the table of an adapter's modules; spectra follow, a line each, where they were asked for."""
    measured = {heading: read for heading, read in _SPECTRUM_COLUMNS.items() if any(map(read, modules))}
    columns = _MODULE_COLUMNS | measured
    rows = [[read(module) for read in columns.values()] for module in modules]
    spectra = [f"{m.name}: {_numbers(m.spectrum)}" for m in modules if m.spectrum]
    return [*(table(list(columns), rows) if rows else ()), *spectra]


def _errors(modules: Sequence[ModuleError]) -> list[str]:
    """Return the table of how good a computed version's modules are, under an empty line; nothing without modules."""
    rows = [[read(module) for read in _ERROR_COLUMNS.values()] for module in modules]
    return ["", *table(list(_ERROR_COLUMNS), rows)] if rows else []


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _by_change(modules: Sequence[ModuleDifference]) -> list[ModuleDifference]:
    """Return the modules with the largest distance first, and last those of which it is not known."""
    return sorted(modules, key=lambda each: (each.distance is None, -(each.distance or 0.0), each.name))


def _difference(report: DiffReport) -> list[str]:
    """Return what differs in the configurations, the table of the modules, and one line about all of them."""
    modules = _by_change(report.modules)
    read = {heading: [value(module) for module in modules] for heading, value in _DIFFERENCE_COLUMNS.items()}
    told = {heading: cells for heading, cells in read.items() if any(cell is not None for cell in cells)}
    rows = list(zip(*told.values(), strict=True))
    config = [f"{key}: {_setting(a)} → {_setting(b)}" for key, (a, b) in report.config.items()]
    spectra = [line for module in modules for line in _spectra(module)]
    picture = [] if report.plot is None else [f"plot  {report.plot}"]
    lines = [f"A  {report.a}", f"B  {report.b}", *config, "", *table(list(told), rows), *spectra]
    return [*lines, "", *picture, _summary(report)]


def _setting(value: Any) -> str:
    """Return a value of a configuration, a long one by its beginning: JSON has all of it."""
    text = "none" if value is None else _text(value) or "empty"
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"


def _spectra(module: ModuleDifference) -> list[str]:
    lists = {
        "A": module.spectrum_a,
        "B": module.spectrum_b,
        "A − B": module.spectrum_difference,
        "input angles": module.input_angles,
        "output angles": module.output_angles,
    }
    return [f"{module.name} {what}: {_numbers(values)}" for what, values in lists.items() if values]


def _summary(report: DiffReport) -> str:
    summary = report.summary
    counts = [f"{getattr(summary, what)} {what}" for what in ("changed", "added", "removed", "same")]
    unknown = f", {summary.unknown} of them not in the sums" if summary.unknown else ""
    sums = (summary.distance, summary.relative_distance, summary.cosine)
    distance, relative, cosine = (_cell(value) for value in sums)
    return f"{', '.join(counts)}{unknown}; distance {distance}, relative to A {relative}, cosine {cosine}"


def _hidden(record: Any) -> frozenset[str]:
    """Return the fields that a person sees elsewhere: in a table, on stderr, or in JSON only."""
    return frozenset(
        {"warnings", "notes", "modules", "errors", "training", "evidence", "unexplained"}
        | ({"ranks"} if isinstance(record, VersionRecord) else set())
    )


def _fields(record: Any, hidden: frozenset[str]) -> list[str]:
    """Return a record as `field  value` lines; empty lists and texts are left out."""
    shown = [(field.name, getattr(record, field.name)) for field in fields(record) if field.name not in hidden]
    kept = [(name, value) for name, value in shown if value is not None and value not in ("", [], {})]
    width = max((len(name) for name, _ in kept), default=0)
    lines: list[str] = []
    for name, value in kept:
        first, *rest = [_text(item) for item in value] if _is_block(value) else [_value(name, value)]
        lines.append(f"{name.replace('_', ' '):{width}}  {first}")
        lines.extend(f"{'':{width}}  {line}" for line in rest)
    return lines


def _is_block(value: Any) -> bool:
    """Say whether a list is shown a line for each item: records, digests and long names."""
    return isinstance(value, list) and not all(isinstance(item, str) and len(item) < 24 for item in value)


def _value(name: str, value: Any) -> str:
    """Return a field's value; only the name tells sizes and seconds from other numbers."""
    if name == "bytes" or name.startswith("bytes_"):
        return f"{size(value)} ({value:,} bytes)"
    if name == "share_of_base":
        return f"{value:.3%}"
    return f"{value:.2f}" if name == "seconds" else _text(value)


_PHRASES: dict[type, Callable[[Any], str]] = {
    BaseReference: lambda base: f"{base.name or 'not registered'} ({short(base.digest)})",
    FileRecord: lambda file: f"{file.path}  {short(file.digest)}  {size(file.bytes)}",
    MergedAdapter: lambda adapter: f"{adapter.ref}  {short(adapter.digest)}  weight {adapter.weight:g}",
    bool: lambda fact: "yes" if fact else "no",
    int: lambda number: f"{number:,}",
    float: lambda number: f"{number:.6g}",
    list: lambda items: ", ".join(map(str, items)),
    dict: lambda pairs: ", ".join(f"{key}={_text(value)}" for key, value in pairs.items()),
    Path: str,
}


def _text(value: Any) -> str:
    """Return a value in a person's words; None is nothing."""
    if value is None:
        return ""
    return _PHRASES.get(type(value), str)(value)
