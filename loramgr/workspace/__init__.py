"""The use cases of loramgr: what can be done with bases, adapters and merged models."""

from __future__ import annotations

from loramgr.catalog.query import VersionQuery
from loramgr.hints import ReadHints
from loramgr.workspace.options import (
    AddOptions,
    ComposeOptions,
    ExtractOptions,
    MergeOptions,
    PullOptions,
    PushOptions,
    ResizeOptions,
    Retention,
)
from loramgr.workspace.workspace import Workspace

__all__ = [
    "AddOptions",
    "ComposeOptions",
    "ExtractOptions",
    "MergeOptions",
    "PullOptions",
    "PushOptions",
    "ReadHints",
    "ResizeOptions",
    "Retention",
    "VersionQuery",
    "Workspace",
]
