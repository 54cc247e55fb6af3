"""A full fine-tune as an adapter: the tensors and values in which it differs from its base, exact to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loramgr.errors import IncompatibleError
from loramgr.formats.difference import Part, Written, parts_of, write_difference
from loramgr.formats.folder import CONFIGURATION
from loramgr.tensorfile import Data, TensorView
from loramgr.workspace.derived import scratch_folder
from loramgr.workspace.differing import Changed, Comparison, compare, read_checked
from loramgr.workspace.home import Home
from loramgr.workspace.sources import find_base

if TYPE_CHECKING:
    import torch

__all__ = ["is_whole_model", "written_difference"]

_PLACE = 8  # bytes that a place takes in the file


def is_whole_model(path: Path) -> bool:
    """Say whether a path is a folder with a whole model and no adapter."""
    if not path.is_dir() or (path / CONFIGURATION).exists() or not (path / "config.json").is_file():
        return False
    patterns = ("model*.safetensors", "pytorch_model*.bin")
    return any(True for pattern in patterns for _ in path.glob(pattern))


@contextmanager
def written_difference(home: Home, path: Path, base_text: str) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Give, for the block, a folder with what the fine-tune in `path` has other than the base, as an adapter.

    With it come sentences for the person. One tensor is held at a time. Raises IncompatibleError for models of two
    architectures, quantized ones, and a fine-tune that is the base itself.
    """
    with scratch_folder(home) as scratch:
        folder = scratch / "adapter"
        folder.mkdir()
        yield folder, _write(home, path, base_text, folder)


def _write(home: Home, path: Path, base_text: str, folder: Path) -> tuple[str, ...]:
    base, tuned = find_base(home, base_text), find_base(home, str(path.absolute()))
    comparison = compare(base, tuned, exact=False)
    if not comparison.changed:
        raise IncompatibleError(
            f"{path} has no tensor that differs from those of {base.name or base.source}",
            "name the base that it was trained from",
        )
    parts = [part for changed in comparison.changed for part in _parts(comparison, changed)]
    biases = all(changed.name.endswith(".bias") for changed in comparison.changed if changed.source is not None)
    about = Written(
        method="bitfit" if biases else "full",
        base_digest=base.digest,
        base_name=base.name or Path(base.source).name,
        task_type=comparison.task_type,
        keeps_ties=comparison.keeps_ties,
    )
    write_difference(folder, parts, about)
    return tuple(_notes(comparison))


def _parts(comparison: Comparison, changed: Changed) -> list[Part]:
    name = comparison.alignment.pairs.get(changed.name, changed.name)
    source = None if changed.source is None else comparison.base.checkpoint.tensors[changed.source]
    count = None if source is None else _changed_values(changed.view, source)
    size = changed.view.spec.nbytes // max(1, changed.view.spec.elements)
    sparse = count is not None and count * (_PLACE + size) < changed.view.spec.nbytes
    specs = parts_of(name, changed.view.spec, count if sparse else None)
    tuned = comparison.finetuned
    if source is None or not sparse:
        return [Part(specs[0], lambda: read_checked(tuned, changed.view.spec.name))]
    return [
        Part(specs[0], lambda: _places(changed.view, source)),
        Part(specs[1], lambda: _values(changed.view, source)),
    ]


def _changed_values(view: TensorView, source: TensorView) -> int | None:
    """Return how many values differ in their bits, None for tensors of two shapes or dtypes."""
    if (view.spec.dtype, view.spec.shape) != (source.spec.dtype, source.spec.shape):
        return None
    return int(_differing(view, source).numel())


def _differing(view: TensorView, source: TensorView) -> torch.Tensor:
    import torch

    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    one, other = (each.load().flatten() for each in (view, source))
    bits = integers[one.element_size()]
    return (one.view(bits) != other.view(bits)).nonzero()[:, 0]


def _places(view: TensorView, source: TensorView) -> Data:
    from loramgr.tensors import as_bytes

    return as_bytes(_differing(view, source))


def _values(view: TensorView, source: TensorView) -> Data:
    from loramgr.tensors import as_bytes

    return as_bytes(view.load().flatten()[_differing(view, source)].contiguous())


def _notes(comparison: Comparison) -> list[str]:
    base = comparison.base.checkpoint.tensors
    dtypes = sorted(
        {
            each.view.spec.dtype
            for each in comparison.changed
            if each.source is not None and base[each.source].spec.dtype != each.view.spec.dtype
        }
    )
    notes = []
    if dtypes:
        notes.append(f"stored as {', '.join(dtypes)}, unlike the base: merge with --dtype to get its bits back")
    if comparison.alignment.missing:
        notes.append(f"the base has {_listed(comparison.alignment.missing)}, and the fine-tune not: a merge keeps that")
    return notes


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
