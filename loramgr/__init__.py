"""A manager for LoRA adapters: immutable versions of them, exact merges, and bases restored bit for bit.

`Workspace` is the way in; its methods take references and options and return the records of `loramgr.records`.
`attach` takes a model in memory in hand, to merge adapters into it in place.
Names are imported when they are first used, so that `import loramgr` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramgr.errors import (
        ConflictError,
        IncompatibleError,
        IntegrityError,
        LoramgrError,
        NotFoundError,
        RacedError,
        UncheckedError,
        UsageError,
    )
    from loramgr.records import (
        AddedVersion,
        Addition,
        ArchiveReport,
        BaseRecord,
        BaseReference,
        BaseVerification,
        DerivedVersion,
        DiffReport,
        DiffSummary,
        ExportReport,
        FileRecord,
        FileReport,
        GcReport,
        HistoryEntry,
        InspectReport,
        LiveReport,
        MergeCheck,
        MergedAdapter,
        MergeReport,
        ModuleDifference,
        ModuleError,
        ModuleRecord,
        RebuildReport,
        RecomposeReport,
        RemoteRecord,
        RemoteStatus,
        RemoteVerification,
        RemoteVersionRecord,
        Removal,
        SchemaReport,
        StatusReport,
        StoreVerification,
        TensorChange,
        TransferReport,
        UnmergeReport,
        Usage,
        VersionRecord,
        to_json,
    )
    from loramgr.workspace import (
        AddOptions,
        ComposeOptions,
        ExtractOptions,
        MergeOptions,
        PullOptions,
        PushOptions,
        ReadHints,
        ResizeOptions,
        Retention,
        VersionQuery,
        Workspace,
    )
    from loramgr.workspace.live import Composition, LiveModel, attach

__version__ = "0.1.0"

_HOMES = ("loramgr.errors", "loramgr.records", "loramgr.workspace", "loramgr.workspace.live")

__all__ = [
    "AddOptions",
    "AddedVersion",
    "Addition",
    "ArchiveReport",
    "BaseRecord",
    "BaseReference",
    "BaseVerification",
    "ComposeOptions",
    "Composition",
    "ConflictError",
    "DerivedVersion",
    "DiffReport",
    "DiffSummary",
    "ExportReport",
    "ExtractOptions",
    "FileRecord",
    "FileReport",
    "GcReport",
    "HistoryEntry",
    "IncompatibleError",
    "InspectReport",
    "IntegrityError",
    "LiveModel",
    "LiveReport",
    "LoramgrError",
    "MergeCheck",
    "MergeOptions",
    "MergeReport",
    "MergedAdapter",
    "ModuleDifference",
    "ModuleError",
    "ModuleRecord",
    "NotFoundError",
    "PullOptions",
    "PushOptions",
    "RacedError",
    "ReadHints",
    "RebuildReport",
    "RecomposeReport",
    "RemoteRecord",
    "RemoteStatus",
    "RemoteVerification",
    "RemoteVersionRecord",
    "Removal",
    "ResizeOptions",
    "Retention",
    "SchemaReport",
    "StatusReport",
    "StoreVerification",
    "TensorChange",
    "TransferReport",
    "UncheckedError",
    "UnmergeReport",
    "Usage",
    "UsageError",
    "VersionQuery",
    "VersionRecord",
    "Workspace",
    "__version__",
    "attach",
    "to_json",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562), from the cheapest module that has it."""
    if name in __all__:
        for home in map(import_module, _HOMES):
            if name in home.__all__:
                globals()[name] = getattr(home, name)
                return globals()[name]
    raise AttributeError(f"module 'loramgr' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted(__all__)
