"""An adapter whose initialisation changed the base, written as the plain LoRA that it is on the stock base.

What it began with comes from the adapter as it was before the training, or from the base alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loramgr.adapter import Adapter
from loramgr.digests import digest_file
from loramgr.errors import UsageError
from loramgr.formats import adapter_folder, kept_files, read_adapter
from loramgr.formats.files import adapter_files
from loramgr.formats.folder import CONFIGURATION, WEIGHTS
from loramgr.formats.peft_initial import read_as_plain, without, write_plain
from loramgr.hints import ReadHints
from loramgr.workspace.derived import scratch_folder, versions_used
from loramgr.workspace.home import Home
from loramgr.workspace.matching import match_base
from loramgr.workspace.sources import OpenBase, base_of_digest, find_base
from loramgr.workspace.starting import started_by, started_from

__all__ = ["written_from_base", "written_plain"]


@contextmanager
def written_plain(
    home: Home, path: Path, initial: Path, include: Sequence[str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give, for the block, a folder with the adapter in `path` less the `initial` one, and the recipe of that.

    What a version keeps beside the weights goes with it, and what `include` names. Raises as `read_from_initial`.
    """
    adapter = read_adapter(path, ReadHints(initial=initial))
    inputs = [{"role": role, "files": _digests(each)} for role, each in (("trained", path), ("initial", initial))]
    with _written(home, path, adapter, include) as folder:
        yield folder, _recipe("initial", inputs)


@contextmanager
def written_from_base(
    home: Home, path: Path, asked: str | None, include: Sequence[str]
) -> Iterator[tuple[Path, dict[str, Any], tuple[str, ...]]]:
    """Give the same of an adapter of PiSSA or OLoRA, with what it began with computed of its base, and the notes on it.

    `asked` is the base, None for the one that the configuration names. Raises IncompatibleError for an initialisation
    that the base does not determine, and UsageError where no base is known.
    """
    trained, method = read_as_plain(adapter_files(path).folder)
    if method is None:
        said = trained.config.get("init_lora_weights")
        raise UsageError(f"{path}: init_lora_weights {said!r} leaves the base as it is", "leave --initial away")
    start = started_by(method, path)
    base = _base(home, trained, asked, path)
    before, errors = started_from(trained, base, start)
    largest = max(errors.values(), default=0.0)
    inputs: list[dict[str, Any]] = [
        {"role": "trained", "files": _digests(path)},
        {"role": "base", "digest": base.digest},
    ]
    note = (
        f"What {start.name} began with was computed of {base.name or base.source} in float64; PEFT's own, in float32, "
        f"differs by at most {largest:.1e} of a weight's largest singular value."
    )
    recipe = {**_recipe("initial-of-base", inputs), "initialisation": start.name, "largest_error": largest}
    with _written(home, path, without(trained, before), include) as folder:
        yield folder, recipe, (note,)


@contextmanager
def _written(home: Home, path: Path, adapter: Adapter, include: Sequence[str]) -> Iterator[Path]:
    from loramgr.checkpoints.output import copy_files

    own = (CONFIGURATION, *WEIGHTS)
    with scratch_folder(home) as scratch:
        folder = scratch / "adapter"
        folder.mkdir()
        copy_files(adapter_folder(path), folder, [name for name in kept_files(path, include) if name not in own])
        write_plain(adapter, folder)
        yield folder


def _base(home: Home, adapter: Adapter, asked: str | None, path: Path) -> OpenBase:
    if asked is not None:
        return find_base(home, asked)
    match = match_base(home, adapter, None, force=False)
    if match.digest is None:
        raise UsageError(f"{path}: no base is known for it", "loramgr add PATH --base BASE --initial base")
    return base_of_digest(home, match.digest)


def _recipe(method: str, inputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what was made of what: the digests of the files."""
    return {"operation": "subtract-initial", "method": method, "inputs": [*inputs], "versions": versions_used()}


def _digests(path: Path) -> dict[str, str]:
    folder = adapter_folder(path)
    names = (CONFIGURATION, *WEIGHTS)
    return {name: digest_file(folder / name) for name in names if (folder / name).is_file()}
