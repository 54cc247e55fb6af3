"""The files of an adapter's folder: where it is, which weights count, and what a version keeps."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from stat import S_ISREG

from loramgr.containment import resolve_inside
from loramgr.errors import IncompatibleError, NotFoundError, UncheckedError, UsageError
from loramgr.formats.hints import HINTS

__all__ = [
    "CONFIGURATION",
    "MLX_WEIGHTS",
    "NO_WEIGHTS",
    "REMAINDER",
    "WEIGHTS",
    "candidates",
    "is_present",
    "is_tokenizer_file",
    "kept_beside",
    "not_an_adapter",
    "weights_file",
]

CONFIGURATION = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first one that is there counts, as in PEFT
MLX_WEIGHTS = "adapters.safetensors"
NO_WEIGHTS = "save the adapter again, or download its weights too"
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.*", "additional_chat_templates/*",
)  # fmt: skip
REMAINDER = "loramgr_remainder.safetensors"  # beside an extracted adapter: what makes the fine-tune of a merge with it
_KEPT = ("README.md", *_TOKENIZER, REMAINDER, HINTS)
_TRAINING_STATE = ("optimizer*", "scheduler*", "rng_state*", "scaler*", "training_args*", "trainer_state.json")
_MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "model*.index.json")
_OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt")
_MANY = 5


def weights_file(folder: Path) -> Path:
    """Return the one weights file of a PEFT adapter that is used; NotFoundError where there is none."""
    for name in WEIGHTS:
        if is_present(folder, name):
            return folder / name
    raise NotFoundError(f"{folder}: {CONFIGURATION} is there, and neither {' nor '.join(WEIGHTS)}", NO_WEIGHTS)


def kept_beside(folder: Path, own: Iterable[str], include: Sequence[str], *, is_single: bool) -> list[str]:
    """Return what a version keeps of an adapter's folder, as sorted relative paths; `own` is what it is made of.

    README, tokenizer and chat templates, the remainder of an exact extraction, and the files that the `include` globs
    name; the training state only where a glob names it. Of a single file only what is named is kept. Raises UsageError
    for a glob that leaves the folder, NotFoundError for one that names nothing, and IncompatibleError for a link out of
    the folder.
    """
    kept = {_plain(folder, name) for name in own}
    there = [] if is_single else [path.name for path in folder.iterdir()]
    for pattern in _KEPT:
        if fnmatch.filter(there, pattern.partition("/")[0]):  # to look for each would take most of the time of a read
            kept.update(_matches(folder, pattern))
    for pattern in include:
        kept.update(_included(folder, pattern))
    return sorted(kept, key=str.encode)


def is_tokenizer_file(name: str) -> bool:
    """Say whether a file, as a relative path with `/`, is one of a tokenizer or a chat template."""
    return any(PurePosixPath(name).match(pattern) and name.count("/") == pattern.count("/") for pattern in _TOKENIZER)


def candidates(folder: Path) -> list[str]:
    """Return the files in a folder that may be the weights of an adapter: neither a model's nor a training state.

    Raises UncheckedError for a folder that cannot be read.
    """
    try:
        there = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UncheckedError(f"{folder}: cannot be read: {error.strerror}") from error
    passed = (*_TRAINING_STATE, *(_MODEL_WEIGHTS if "config.json" in there else ()), REMAINDER)
    named = [name for name in there if any(fnmatch.fnmatch(name, pattern) for pattern in _OTHER_WEIGHTS)]
    found = [name for name in named if not any(fnmatch.fnmatch(name, pattern) for pattern in passed)]
    return [name for name in found if (folder / name).is_file() or (folder / name).is_symlink()]


def is_present(folder: Path, name: str) -> bool:
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
    return [_plain(folder, name) for name in names if is_present(folder, name)]


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


def not_an_adapter(folder: Path) -> NotFoundError:
    """Say that there is no adapter, what the folder looks like, and where adapters are beneath it."""
    below = sorted(config.parent for config in folder.glob(f"*/{CONFIGURATION}"))
    if below:
        names = ", ".join(str(path) for path in below[:_MANY])
        more = f" and {len(below) - _MANY} more" if len(below) > _MANY else ""
        return NotFoundError(
            f"{folder}: no {CONFIGURATION}, but adapters in folders beneath it", f"name one: {names}{more}"
        )
    if _has(folder, ["config.json"]) and _has(folder, _MODEL_WEIGHTS):
        return NotFoundError(
            f"{folder}: no {CONFIGURATION}: this is a whole model",
            f"loramgr base add {folder}; a fine-tune of a base: loramgr add {folder} --base BASE",
        )
    return NotFoundError(f"{folder}: no {CONFIGURATION}{_what_is_there(folder)}", "name the folder that holds it")


def _what_is_there(folder: Path) -> str:
    if _has(folder, _TRAINING_STATE):
        return ", only the state of a training run"
    names = [path.name for path in folder.iterdir()]
    if not names:
        return ", the folder is empty"
    return ", only a tokenizer" if all(map(is_tokenizer_file, names)) else ""


def _has(folder: Path, patterns: Iterable[str]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))
