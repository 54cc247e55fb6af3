"""An adapter whose initialisation changed the base, written as the plain LoRA that it is on the stock base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loramgr.digests import digest_file
from loramgr.formats import adapter_folder, kept_files, read_adapter
from loramgr.formats.folder import CONFIGURATION, WEIGHTS
from loramgr.formats.peft_initial import write_plain
from loramgr.hints import ReadHints
from loramgr.workspace.derived import scratch_folder, versions_used
from loramgr.workspace.home import Home

__all__ = ["written_plain"]


@contextmanager
def written_plain(
    home: Home, path: Path, initial: Path, include: Sequence[str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give, for the block, a folder with the adapter in `path` less the `initial` one, and the recipe of that.

    What a version keeps beside the weights goes with it, and what `include` names. Raises as `read_from_initial`.
    """
    from loramgr.checkpoints.output import copy_files

    adapter = read_adapter(path, ReadHints(initial=initial))
    own = (CONFIGURATION, *WEIGHTS)
    with scratch_folder(home) as scratch:
        folder = scratch / "adapter"
        folder.mkdir()
        copy_files(adapter_folder(path), folder, [name for name in kept_files(path, include) if name not in own])
        write_plain(adapter, folder)
        yield folder, _recipe(path, initial)


def _recipe(path: Path, initial: Path) -> dict[str, Any]:
    """Return what was made of what: the digests of both adapters' files."""
    return {
        "operation": "subtract-initial",
        "method": "initial",
        "inputs": [{"role": role, "files": _digests(each)} for role, each in (("trained", path), ("initial", initial))],
        "versions": versions_used(),
    }


def _digests(path: Path) -> dict[str, str]:
    folder = adapter_folder(path)
    names = (CONFIGURATION, *WEIGHTS)
    return {name: digest_file(folder / name) for name in names if (folder / name).is_file()}
