"""Which format an adapter on disk has, and the one function that reads them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loramgr.adapter import Adapter
from loramgr.errors import IncompatibleError, IntegrityError, LoramgrError, NotFoundError, UncheckedError
from loramgr.formats import (
    adapterhub,
    biases,
    cloneofsimo,
    difference,
    diffusers,
    gguf,
    kohya,
    loralib,
    mlx,
    peft_evidence,
    torchtune,
)
from loramgr.formats.evidence import Detector, Evidence
from loramgr.formats.files import AdapterFiles, adapter_files
from loramgr.formats.folder import CONFIGURATION, kept_beside
from loramgr.formats.hints import ReadHints, with_those_beside
from loramgr.formats.peculiarities import (
    NEXT,
    Told,
    told_by_beginning,
    told_by_pickle,
    told_of_parts,
    what_it_is,
    what_path_is,
)

__all__ = ["adapter_folder", "detect", "kept_files", "read_adapter", "recognise", "told_instead"]

DETECTORS: tuple[Detector, ...] = (peft_evidence.detect, mlx.detect, gguf.detect, torchtune.detect, loralib.detect,
    kohya.detect, diffusers.detect, cloneofsimo.detect, difference.detect, biases.detect, adapterhub.detect,
)  # fmt: skip


def read_adapter(path: Path, hints: ReadHints | None = None) -> Adapter:
    """Read an adapter from its folder, or from its configuration or weights file inside it.

    `hints` are what a person says that the files do not, None for nothing; those that a version keeps beside its files
    count too. Reads headers, not data, and no torch for safetensors. Raises NotFoundError, UncheckedError when a file
    cannot be read, IntegrityError for damaged files, IncompatibleError for everything that loramgr cannot read exactly,
    and UsageError where a hint is needed.
    """
    try:
        files = adapter_files(path)
        found = recognise(files)
        said = hints or ReadHints()
        adapter = found.read(files, said if files.is_single else with_those_beside(said, files.folder))
    except OSError as error:
        raise UncheckedError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    return replace(adapter, dialect=found.dialect, evidence=found.sentences)


def recognise(files: AdapterFiles) -> Evidence:
    """Return the one format whose content the files have.

    Raises IncompatibleError, saying what was found, where none or several recognise it, IntegrityError for an empty
    file, and as the containers' readers.
    """
    found = _detected(files)
    if not found and files.configuration is not None:
        return peft_evidence.evidence(files)  # whose reader says what the configuration lacks
    if not found:
        told = what_it_is(files)
        raise IncompatibleError(
            f"{files.weights}: not an adapter that loramgr knows: {told.sentence}", told.hint or NEXT
        )
    if len(found) > 1:
        said = "; ".join(f"{each.format} ({', '.join(each.sentences)})" for each in found)
        raise IncompatibleError(f"{files.weights}: more than one format recognises it: {said}")
    return found[0]


def _detected(files: AdapterFiles) -> list[Evidence]:
    """Return what the formats saw; what is no file of tensors is refused for what it is, before it is parsed."""
    parts = told_of_parts(files)
    for path, told in parts.items():
        kind = IntegrityError if told.kind == "empty" else IncompatibleError
        raise kind(f"{path}: not an adapter, but {told.sentence}", told.hint or NEXT)
    try:
        return detect(files)
    except LoramgrError as error:
        pickled = told_by_pickle(files.weights)
        if pickled is None:
            raise
        raise IncompatibleError(f"{files.weights}: not an adapter, but {pickled.sentence}", NEXT) from error


def detect(files: AdapterFiles) -> list[Evidence]:
    """Return what every format that recognises the files saw."""
    return [evidence for detector in DETECTORS if (evidence := detector(files)) is not None]


def told_instead(path: Path) -> Told | None:
    """Say what a path is that no format recognises, None for an adapter, whole or damaged.

    Raises NotFoundError, UncheckedError, and IntegrityError for a damaged file of tensors.
    """
    try:
        told = told_by_beginning(path) if path.is_file() and path.name != CONFIGURATION else None
        if told is not None:
            return told
        files = adapter_files(path)
        for part, inside in told_of_parts(files).items():
            return replace(inside, sentence=f"a folder whose {part.name} is {inside.sentence}")
        return None if files.configuration_path is not None or detect(files) else what_it_is(files)
    except (NotFoundError, IncompatibleError):
        return what_path_is(path)
    except OSError as error:
        raise UncheckedError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def adapter_folder(path: Path) -> Path:
    """Return the folder in which the adapter lies that a path names; raises as `adapter_files`."""
    return adapter_files(path).folder


def kept_files(path: Path, include: Sequence[str]) -> list[str]:
    """Return what a version keeps of the adapter that a path names, as sorted relative paths; see `kept_beside`."""
    files = adapter_files(path)
    return kept_beside(files.folder, files.names, include, is_single=files.is_single)
