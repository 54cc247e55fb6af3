"""Adapter file formats: one module per format, each read into `Adapter` without torch where the file allows it."""

from __future__ import annotations

from loramgr.formats.examination import Examination, examine
from loramgr.formats.registry import adapter_folder, kept_files, read_adapter

__all__ = ["Examination", "adapter_folder", "examine", "kept_files", "read_adapter"]
