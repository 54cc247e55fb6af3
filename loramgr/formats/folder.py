"""The files of an adapter's folder: where it is, which weights count, and what a version keeps."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from stat import S_ISREG

from loramgr.containment import resolve_inside
from loramgr.errors import IncompatibleError, NotFoundError, UsageError

__all__ = ["CONFIGURATION", "REMAINDER", "adapter_folder", "is_tokenizer_file", "kept_files", "weights_file"]

CONFIGURATION = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first one that is there counts, as in PEFT
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.*", "additional_chat_templates/*",
)  # fmt: skip
REMAINDER = "loramgr_remainder.safetensors"  # beside an extracted adapter: what makes the fine-tune of a merge with it
_KEPT = ("README.md", *_TOKENIZER, REMAINDER)
_TRAINING_STATE = ("optimizer*", "scheduler*", "rng_state*", "scaler*", "training_args*", "trainer_state.json")
_MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "model*.index.json")
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt")
_MANY = 5


def adapter_folder(path: Path) -> Path:
    """Return the folder of the adapter that the path names: the folder, its configuration or its weights file.

    Raises NotFoundError, saying what is there instead, and IncompatibleError for a file of another format and for
    weights that are not the ones that count.
    """
    if path.is_dir():
        folder = path
    elif path.name in (CONFIGURATION, *WEIGHTS) and path.is_file():
        folder = path.parent
    elif path.exists():
        raise IncompatibleError(
            f"{path}: not a file of a PEFT adapter", f"name a folder that holds {CONFIGURATION} and its weights"
        )
    else:
        raise NotFoundError(f"{path}: no such file or folder")
    if not _is_present(folder, CONFIGURATION):
        raise _not_an_adapter(folder)
    if path.name == WEIGHTS[1] and path != folder and _is_present(folder, WEIGHTS[0]):
        raise IncompatibleError(f"{path}: {WEIGHTS[0]} beside it is the file that counts", f"name {folder} instead")
    return folder


def weights_file(folder: Path) -> Path:
    """Return the one weights file that is used; NotFoundError where there is none."""
    for name in WEIGHTS:
        if _is_present(folder, name):
            return folder / name
    raise NotFoundError(f"{folder}: {CONFIGURATION} is there, and neither {' nor '.join(WEIGHTS)}")


def kept_files(path: Path, include: Sequence[str]) -> list[str]:
    """Return what a version keeps of an adapter's folder, as sorted relative paths.

    Configuration, weights, README, tokenizer and chat templates, the remainder of an exact extraction, and the files
    that the `include` globs name; the training state only where a glob names it. Raises UsageError for a glob that
    leaves the folder, NotFoundError for one that names nothing, and IncompatibleError for a link out of the folder.
    """
    folder = adapter_folder(path)
    kept = {CONFIGURATION, weights_file(folder).name}
    there = [path.name for path in folder.iterdir()]
    for pattern in _KEPT:
        if fnmatch.filter(there, pattern.partition("/")[0]):  # to look for each would take most of the time of a read
            kept.update(_matches(folder, pattern))
    for pattern in include:
        kept.update(_included(folder, pattern))
    return sorted(kept, key=str.encode)


def is_tokenizer_file(name: str) -> bool:
    """Say whether a file, as a relative path with `/`, is one of a tokenizer or a chat template."""
    return any(PurePosixPath(name).match(pattern) and name.count("/") == pattern.count("/") for pattern in _TOKENIZER)


def _is_present(folder: Path, name: str) -> bool:
    """Say whether a regular file of that name is there; links out of the folder and into nothing are errors."""
    path = folder / name
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if S_ISREG(mode) and "/" not in name:  # no link is on the way to it
        return True
    if not resolve_inside(folder, name).exists():
        raise NotFoundError(f"{path}: the link leads to nothing", "put a copy of the file in its place")
    return path.is_file()


def _matches(folder: Path, pattern: str) -> list[str]:
    # a plain name goes around glob, which passes over links to nothing
    is_glob = any(sign in pattern for sign in "*?[")
    names = [path.relative_to(folder).as_posix() for path in folder.glob(pattern)] if is_glob else [pattern]
    return [_plain(folder, name) for name in names if _is_present(folder, name)]


def _plain(folder: Path, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise IncompatibleError(f"{folder}: the file name {name!r} is not UTF-8", "rename the file") from error
    return name


def _included(folder: Path, pattern: str) -> list[str]:
    glob = PurePosixPath(pattern)
    if not glob.parts or glob.is_absolute() or ".." in glob.parts:
        raise UsageError(
            f"--include {pattern!r} leaves the adapter's folder", "name a file inside it, as 'extra/*.json'"
        )
    try:
        found = _matches(folder, pattern)
    except ValueError as error:
        raise UsageError(f"--include {pattern!r} is no glob: {error}") from error
    if not found:
        raise NotFoundError(f"--include {pattern!r}: no such file in {folder}")
    return found


def _not_an_adapter(folder: Path) -> NotFoundError:
    """Say that there is no adapter, what the folder looks like, and where adapters are beneath it."""
    below = sorted(config.parent for config in folder.glob(f"*/{CONFIGURATION}"))
    if below:
        names = ", ".join(str(path) for path in below[:_MANY])
        more = f" and {len(below) - _MANY} more" if len(below) > _MANY else ""
        return NotFoundError(
            f"{folder}: no {CONFIGURATION}, but adapters in folders beneath it", f"name one: {names}{more}"
        )
    if _has(folder, ["config.json"]) and _has(folder, _MODEL_WEIGHTS):
        return NotFoundError(f"{folder}: no {CONFIGURATION}: this is a whole model", f"loramgr base add {folder}")
    return NotFoundError(f"{folder}: no {CONFIGURATION}{_what_is_there(folder)}", "name the folder that holds it")


def _what_is_there(folder: Path) -> str:
    if _has(folder, WEIGHTS):
        return ", only the weights: rank and alpha are not known without it"
    if _has(folder, _TRAINING_STATE):
        return ", only the state of a training run"
    found = sorted(path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern))
    return f"; {', '.join(found[:_MANY])} may be of another format, which loramgr does not read" if found else ""


def _has(folder: Path, patterns: Iterable[str]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))
