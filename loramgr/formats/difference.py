"""A full fine-tune kept as what differs from its base: loramgr's own format, exact to the bit.

`adapter_config.json` has `loramgr_difference`, its version, and what the model is; `adapter_model.safetensors` has for
every changed tensor either the whole of it, `whole:NAME`, or the new values and their places in the flat tensor,
`values:NAME` and `places:NAME` (I64). Names are those of the base's files, or of a head that the base lacks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loramgr.adapter import Adapter, Patch, Replacement, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import Fields
from loramgr.formats.evidence import Evidence
from loramgr.formats.files import AdapterFiles
from loramgr.formats.folder import CONFIGURATION
from loramgr.formats.hints import ReadHints
from loramgr.formats.peft_writer import WEIGHTS
from loramgr.tensorfile import FLOAT_DTYPES, Data, TensorSpec, TensorView, encode_header

__all__ = ["Part", "Written", "detect", "parts_of", "write_difference"]

_MARK = "loramgr_difference"
_SCHEMA = 1
_KEYS = frozenset({_MARK, "method", "base_digest", "base_model_name_or_path", "task_type", "keeps_ties"})
_METHODS = ("full", "bitfit")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the file, by the name it has there; `make` returns its bytes when its turn comes."""

    spec: TensorSpec
    make: Callable[[], Data]


@dataclass(frozen=True, slots=True)
class Written:
    """What the configuration says of the fine-tune; None where nothing is known."""

    method: str
    base_digest: str
    base_name: str | None
    task_type: str | None
    keeps_ties: bool


def parts_of(name: str, whole: TensorSpec, changed: int | None) -> list[TensorSpec]:
    """Return what is written of a tensor: places and values of the `changed` ones, or for None all of it."""
    if changed is None:
        return [TensorSpec(f"whole:{name}", whole.dtype, whole.shape)]
    return [TensorSpec(f"places:{name}", "I64", (changed,)), TensorSpec(f"values:{name}", whole.dtype, (changed,))]


def write_difference(folder: Path, parts: Sequence[Part], about: Written) -> None:
    """Write the difference into an empty folder, tensor by tensor."""
    content = {
        _MARK: _SCHEMA,
        "method": about.method,
        "base_digest": about.base_digest,
        "base_model_name_or_path": about.base_name,
        "task_type": about.task_type,
        "keeps_ties": about.keeps_ties,
    }
    (folder / CONFIGURATION).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    with (folder / WEIGHTS).open("wb") as file:
        file.write(encode_header([part.spec for part in parts], {"format": "pt"}))
        for part in parts:
            file.write(part.make())


def detect(files: AdapterFiles) -> Evidence | None:
    """Recognise the format by the mark in its configuration."""
    configuration = files.configuration
    if configuration is None or _MARK not in configuration.content:
        return None
    return Evidence("loramgr", None, (f"adapter_config.json has {_MARK}",), _read)


def _read(files: AdapterFiles, hints: ReadHints) -> Adapter:
    fields = files.configuration
    if fields is None:
        raise ValueError("detect saw a configuration")
    _check(fields)
    updates: dict[str, Update] = {}
    tensors = files.tensors
    for name, view in tensors.items():
        kind, _, target = name.partition(":")
        if kind == "places" and target and f"values:{target}" in tensors:
            updates[target] = _patch(view, tensors[f"values:{target}"])
        elif kind == "whole" and target and view.spec.dtype in FLOAT_DTYPES and f"places:{target}" not in tensors:
            updates[target] = Replacement(view)
        elif kind != "values" or f"places:{target}" not in tensors:
            raise IncompatibleError(f"{files.weights}: no rule explains the tensor {name!r}")
    if not updates:
        raise IncompatibleError(f"{files.weights}: holds no tensors")
    return Adapter(
        format="loramgr",
        method=str(fields.text("method")),
        config=fields.content,
        updates=dict(sorted(updates.items())),
        tensors=tensors,
        alpha=None,
        scaling=None,
        target_modules=(),
        task_type=fields.text("task_type"),
        base_name=fields.text("base_model_name_or_path"),
        base_digest=fields.text("base_digest"),
        keeps_ties=fields.flag("keeps_ties"),
    )


def _check(fields: Fields) -> None:
    from loramgr.digests import is_digest

    if fields.content[_MARK] != _SCHEMA or isinstance(fields.content[_MARK], bool):
        raise fields.refused(_MARK, f"{_SCHEMA}: upgrade loramgr")
    unknown = sorted(fields.content.keys() - _KEYS)
    if unknown:
        raise IncompatibleError(f"{fields.path}: the key {unknown[0]!r} is not known")
    if fields.text("method") not in _METHODS:
        raise fields.refused("method", " or ".join(_METHODS))
    if not is_digest(fields.text("base_digest") or ""):
        raise fields.refused("base_digest", "a digest, sha256: and 64 hex digits")


def _patch(places: TensorView, values: TensorView) -> Patch:
    fits = places.spec.dtype == "I64" and values.spec.dtype in FLOAT_DTYPES
    if not fits or len(places.spec.shape) != 1 or places.spec.shape != values.spec.shape:
        raise IncompatibleError(
            f"{places.spec.name} is {places.spec.dtype} {places.spec.shape} and {values.spec.name} "
            f"{values.spec.dtype} {values.spec.shape}: not places and values"
        )
    return Patch(places, values)
