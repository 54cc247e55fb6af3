"""What a file or folder is that is no adapter: told by its content, read no further than its header."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loramgr.errors import LoramgrError, NotFoundError, UncheckedError
from loramgr.formats.files import AdapterFiles, adapter_files
from loramgr.formats.folder import is_tokenizer_file
from loramgr.tensorfile import LFS_MAGIC

__all__ = ["NEXT", "Told", "told_by_beginning", "told_by_pickle", "told_of_parts", "what_it_is", "what_path_is"]

_HEAD = 1 << 12
NEXT = "name the folder of an adapter, or its weights file"
_AGAIN = "download or save it again"
_UNPACK = "unpack it, and name the adapter in it"
_PICKLE = 1 << 20
_MANY = 5
_MODEL = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|conv_in|patch_embed|tok_embeddings|token_embd)\.weight$")
_LAYER = re.compile(r"(^|\.)(layers?|h|blocks?|blk|block)\.\d+\.")
_MAGICS = (
    (b"PK\x03\x04", "archive", "a ZIP archive"),
    (b"\x1f\x8b", "archive", "compressed with gzip"),
    (b"(\xb5/\xfd", "archive", "compressed with zstd"),
    (b"7z\xbc\xaf\x27\x1c", "archive", "a 7z archive"),
    (b"BZh", "archive", "compressed with bzip2"),
    (b"\xfd7zXZ\x00", "archive", "compressed with xz"),
    (b"\x89PNG", "picture", "a picture"),
    (b"\xff\xd8\xff", "picture", "a picture"),
    (b"%PDF", "document", "a PDF document"),
    (b"SQLite format 3\x00", "database", "an SQLite database"),
    (b"\x7fELF", "program", "a program"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Told:
    """What something is: a short kind, a sentence without its period, what was seen, and the next command.

    `unexplained` names tensors that no format claims; `hint` is None where there is nothing to do.
    """

    kind: str
    sentence: str
    evidence: tuple[str, ...] = ()
    unexplained: tuple[str, ...] = ()
    hint: str | None = None


def what_path_is(path: Path) -> Told:
    """Say what a path is that no format reads as an adapter.

    Raises NotFoundError where nothing is there and UncheckedError where it cannot be read; a damaged file is told.
    """
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder")
    return told_by_beginning(path) or what_it_is(AdapterFiles(path.parent, path, is_single=True))


def told_by_beginning(path: Path) -> Told | None:
    """Say what a file is by its first bytes and its name, None for one that may hold an adapter."""
    if path.exists() and not path.is_file():
        return Told("special-file", "a folder or a device, and no regular file", hint=NEXT)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise UncheckedError(f"{path}: cannot be read: {error.strerror}") from error
    return _by_first_bytes(path, head)


def told_of_parts(files: AdapterFiles) -> dict[Path, Told]:
    """Say which files of an adapter are no tensors and no configuration, and what they are instead; empty for none.

    Raises UncheckedError for a file that cannot be read.
    """
    found = {}
    if files.configuration_path is not None:
        told = told_by_beginning(files.configuration_path)
        if told is not None and told.kind not in ("json", "text", "model-configuration"):
            found[files.configuration_path] = told
    told = told_by_beginning(files.weights)
    return found if told is None else found | {files.weights: told}


def what_it_is(files: AdapterFiles) -> Told:
    """Say what a weights file holds instead of an adapter; what cannot be read is told, not raised."""
    try:
        if files.gguf is not None:
            return _gguf(files)
        names = sorted(files.tensors)
    except LoramgrError as error:
        said = error.message.removeprefix(f"{files.weights}: ")
        return told_by_pickle(files.weights) or Told(
            "unreadable", f"a file that cannot be read: {said}", hint=error.hint
        )
    return _tensors(files.weights, names)


def _tensors(path: Path, names: Sequence[str]) -> Told:
    if not names:
        return Told("empty", "a file of tensors with none in it", hint=_AGAIN)
    seen = (f"{len(names)} tensors, {', '.join(names[:_MANY])}{', …' if len(names) > _MANY else ''}",)
    if any(re.search(r"(exp_avg|momentum_buffer|optimizer)", name) for name in names):
        return Told("optimizer-state", "the state of an optimizer", seen, hint=NEXT)
    if any("base_model.model." in name for name in names):
        return Told(
            "peft-weights", "the weights of a PEFT adapter without adapter_config.json, which has rank and alpha", seen,
            hint=f"put adapter_config.json beside {path.name}, and name the folder",
        )  # fmt: skip
    if any(_MODEL.search(name) for name in names) or sum(bool(_LAYER.search(name)) for name in names) > len(names) / 2:
        return Told("base-model", "weights of a model, whole or a shard", seen, hint=f"loramgr base add {path}")
    return Told(
        "unknown-tensors",
        f"tensors that no format explains: {', '.join(names[:_MANY])}",
        seen,
        unexplained=tuple(names),
        hint="convert it to a format that loramgr reads: loramgr add --help",
    )


def told_by_pickle(path: Path) -> Told | None:
    """Say what a pickle is that holds more than tensors, by the words in its beginning; None where none tells.

    Raises OSError where the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(min(_PICKLE, path.stat().st_size))  # as read() reserves what it is asked for
    if b"param_groups" in head:
        return Told("optimizer-state", "the state of an optimizer", ("a pickle with param_groups",), hint=NEXT)
    if b"TrainingArguments" in head:
        return Told("training-state", "the arguments of a training run", ("a pickle of TrainingArguments",), hint=NEXT)
    return None


def _gguf(files: AdapterFiles) -> Told:
    assert files.gguf is not None
    metadata = files.gguf.metadata
    kind, architecture = metadata.get("general.type", "model"), metadata.get("general.architecture")
    seen = ("the file is GGUF", f"general.type is {kind!r}", f"general.architecture is {architecture!r}")
    return Told(
        "base-model",
        f"a GGUF {kind} for llama.cpp ({architecture})",
        seen,
        hint="name the model that it was made from, or its GGUF LoRA",
    )


def _by_first_bytes(path: Path, head: bytes) -> Told | None:
    """Say what a file is by its first bytes and its name; None for one that may hold tensors."""
    if not head:
        return Told("empty", "an empty file", hint=_AGAIN)
    if head.startswith(LFS_MAGIC):
        return Told(
            "git-lfs-pointer", "a Git LFS pointer, not the file itself", tuple(_lines(head)), hint="git lfs pull"
        )
    if _is_training_state(path.name) and head[8:9] != b"{":
        sentence = "a state of a training run, which adapters are kept without"
        return Told("training-state", sentence, (path.name,), hint=NEXT)
    for magic, kind, sentence in _MAGICS:
        if head.startswith(magic) and not (magic == b"PK\x03\x04" and _is_torch_archive(head)):
            hint = _UNPACK if kind == "archive" else NEXT
            return Told(kind, sentence, (f"the file begins with {magic!r}",), hint=hint)
    if head[257:262] == b"ustar":
        return Told("archive", "a tar archive", ("ustar at byte 257",), hint=_UNPACK)
    return _text(path, head)


def _is_training_state(name: str) -> bool:
    return name.startswith(("optimizer", "scheduler", "rng_state", "scaler", "training_args", "trainer_state"))


def _is_torch_archive(head: bytes) -> bool:
    """Say whether a ZIP archive is one of torch's: its first member is the pickle."""
    length = int.from_bytes(head[26:28], "little")
    return head[30 : 30 + length].endswith((b"data.pkl", b".format_version", b"byteorder", b"version"))


def _text(path: Path, head: bytes) -> Told | None:
    """Say what a text is; None for bytes that are none, and for a header of safetensors."""
    is_cut_off = len(head) < 8 and path.suffix == ".safetensors"
    if is_cut_off or b"\x00" in head or head[:1] == b"\x80" or not _is_utf8(head):
        return None
    if is_tokenizer_file(path.name):
        return Told("tokenizer", "a file of a tokenizer", (path.name,), hint=NEXT)
    is_json = path.suffix == ".json" or head.lstrip()[:1] in (b"{", b"[")
    return _json(path, head) if is_json else Told("text", "plain text", tuple(_lines(head))[:1], hint=NEXT)


def _is_utf8(head: bytes) -> bool:
    """Say whether the beginning of a file is UTF-8; a character may be cut off at its end."""
    try:
        head[: len(head) - 4 if len(head) == _HEAD else len(head)].decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def _json(path: Path, head: bytes) -> Told:
    if b'"model_type"' in head:
        return Told("model-configuration", "the configuration of a model", (path.name,), hint=NEXT)
    return Told("json", "JSON, and no configuration of an adapter", (path.name,), hint=NEXT)


def _lines(head: bytes) -> Iterable[str]:
    return (line for line in head.decode(errors="replace").splitlines() if line.strip())


def _folder(folder: Path) -> Told:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UncheckedError(f"{folder}: cannot be read: {error.strerror}") from error
    if not names:
        return Told("empty", "an empty folder", hint=NEXT)
    seen = (f"{len(names)} files: {', '.join(names[:_MANY])}{', …' if len(names) > _MANY else ''}",)
    if "model_index.json" in names or ("config.json" in names and any(map(_is_of_model, names))):
        return Told("base-model", "a whole model", seen, hint=f"loramgr base add {folder}")
    if all(is_tokenizer_file(name) for name in names):
        return Told("tokenizer", "a tokenizer", seen, hint=NEXT)
    try:
        files = adapter_files(folder)
    except LoramgrError as error:
        kind = "training-state" if any(map(_is_training_state, names)) else "folder"
        return Told(kind, error.message.removeprefix(f"{folder}: "), seen, hint=error.hint)
    return what_path_is(files.weights)


def _is_of_model(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".index.json"))
