"""What one commit brings to a hub's repository: entries, at most one version with its files, and the card."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramgr.digests import digest_bytes
from loramgr.errors import LoramgrError
from loramgr.log import Entry
from loramgr.records import FileRecord
from loramgr.remotes.hub_card import CardFacts, OwnCard, hub_name, model_card, read_own_card
from loramgr.remotes.hub_client import HubClient
from loramgr.remotes.hub_log import HubState, Top, top_of
from loramgr.remotes.hub_snapshot import CARD, HubFile, Snapshot, blob_id, entry_path, manifest_path, place
from loramgr.remotes.protocol import VersionContent

__all__ = ["Draft", "Step", "draft", "operations", "steps", "title_of"]

_SMALL = 4 << 20  # bytes of a configuration or card that is read for the card
_CONFIGURATION = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Step:
    """What one commit brings: entries, and the version that they publish, None where they publish none."""

    entries: tuple[Entry, ...]
    version: VersionContent | None


@dataclass(frozen=True, slots=True)
class Draft:
    """The files that a commit writes, as bytes or as where they are, with their digests, and what it deletes."""

    written: dict[str, bytes | Path]
    digests: dict[str, str]
    deleted: tuple[str, ...]

    def differences(self, snapshot: Snapshot) -> list[str]:
        """Return the paths that a commit has otherwise than the draft says."""
        return sorted(path for path in self.written if not self._is_same(path, snapshot.files.get(path)))

    def _is_same(self, path: str, there: HubFile | None) -> bool:
        if there is None:
            return False
        return there.digest == self.digests[path] if there.digest else there.oid == blob_id(self.written[path])


def steps(entries: Sequence[Entry], versions: Sequence[VersionContent]) -> list[Step]:
    """Return a step for each version that is pushed; what follows the last one goes with it."""
    brought = {(version.number, version.digest): version for version in versions}
    made: list[Step] = []
    waiting: list[Entry] = []
    for entry in entries:
        waiting.append(entry)
        published = entry.kind == "publish"
        version = brought.get((entry.content["number"], entry.content["version"])) if published else None
        if version is not None:
            made.append(Step(tuple(waiting), version))
            waiting = []
    if not waiting:
        return made
    return [*made[:-1], Step((*made[-1].entries, *waiting), made[-1].version)] if made else [Step(tuple(waiting), None)]


def title_of(step: Step) -> str:
    """Return the title of a step's commit."""
    name = step.entries[-1].name
    if step.version is not None:
        return f"{name} v{step.version.number}"
    return f"{name}: {', '.join(dict.fromkeys(entry.kind for entry in step.entries))}"


def draft(client: HubClient, state: HubState, step: Step, blob: Callable[[str], Path]) -> Draft:
    """Say what the commit of a step writes on top of a state; reads the card of a version that stays at the top."""
    entries = {**state.entries, **{entry.digest: entry for entry in step.entries}}
    written: dict[str, bytes | Path] = {entry_path(entry.digest): entry.encode() for entry in step.entries}
    digests: dict[str, str] = {}
    deleted: tuple[str, ...] = ()
    before = top_of(state.entries, {*state.snapshot.manifests})
    manifests = {*state.snapshot.manifests, *([step.version.digest] if step.version else [])}
    if step.version is not None:
        places = {place(file): file for file in step.version.files}
        written[manifest_path(step.version.digest)] = step.version.manifest
        written |= {path: blob(file.digest) for path, file in places.items()}
        digests |= {path: file.digest for path, file in places.items()}
        old = {place(file) for file in _files(before)}
        deleted = tuple(sorted(path for path in old - places.keys() if path in state.snapshot.files))
    top = top_of(entries, manifests)
    if top is not None:
        read = _reader(client, state.snapshot, step.version, blob)
        written[CARD] = model_card(_facts(state.snapshot.repository, top, read))
    digests |= {path: digest_bytes(data) for path, data in written.items() if isinstance(data, bytes)}
    return Draft(written, digests, deleted)


@contextmanager
def operations(made: Draft, *, by_path: bool) -> Iterator[list[Any]]:
    """Give the client's operations for a draft for the duration of the block.

    `by_path` is for hubs with Xet; a file that is given opened goes by plain LFS, which every hub knows.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with ExitStack() as opened:

        def content(source: bytes | Path) -> Any:
            return source if isinstance(source, bytes) or by_path else opened.enter_context(source.open("rb"))

        added = [CommitOperationAdd(path, content(source)) for path, source in sorted(made.written.items())]
        yield [*added, *(CommitOperationDelete(path) for path in made.deleted)]


def _reader(
    client: HubClient, snapshot: Snapshot, version: VersionContent | None, blob: Callable[[str], Path]
) -> Callable[[FileRecord], bytes | None]:
    """Return what reads a small file of the version at the top: from here where it is pushed, else from the hub."""

    def read(file: FileRecord) -> bytes | None:
        if file.bytes > _SMALL:
            return None
        if version is not None and file in version.files:
            return blob(file.digest).read_bytes()
        try:
            data = client.read(snapshot.repository, snapshot.commit, place(file), _SMALL)
        except LoramgrError:  # the card does without
            return None
        return data if digest_bytes(data) == file.digest else None

    return read


def _files(top: Top | None) -> list[FileRecord]:
    return [FileRecord(**file) for file in top.published.content["summary"]["files"]] if top else []


def _facts(repository: str, top: Top, read: Callable[[FileRecord], bytes | None]) -> CardFacts:
    said, summary = top.published.content, top.published.content["summary"]
    files = {file.path: file for file in _files(top)}
    found = {path: read(files[path]) for path in (_CONFIGURATION, CARD) if path in files}
    own = read_own_card(found[CARD] or b"") if CARD in found else OwnCard(None, "")
    return CardFacts(
        repository=repository,
        name=top.published.name,
        number=said["number"],
        digest=said["version"],
        method=str(summary["method"]),
        parameters=summary["parameters"],
        base_model=_base_model(found.get(_CONFIGURATION)),
        base=summary["base"],
        rank=summary["rank"],
        alpha=summary["alpha"],
        targets=[str(target) for target in summary["target_modules"]],
        dtype=str(summary["dtype"]),
        license=own.license,
        message=said["message"],
        metrics=top.metrics,
        tags=top.tags,
        removed=top.removed,
        text=own.text,
    )


def _base_model(configuration: bytes | None) -> str | None:
    """Return the base's name on a hub as the adapter's configuration has it; None for a path."""
    try:
        said = json.loads(configuration or b"{}")
    except (ValueError, RecursionError):
        return None
    return hub_name(said.get("base_model_name_or_path")) if isinstance(said, dict) else None
