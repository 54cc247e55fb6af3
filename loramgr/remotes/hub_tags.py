"""Git tags of a hub's repository: `v<number>` for the commit of each version and, where asked, the adapter's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from loramgr.errors import ConflictError, IntegrityError
from loramgr.log import Entry
from loramgr.remotes.hub_client import HubClient
from loramgr.remotes.protocol import VersionContent

__all__ = ["check_free", "git_tags", "mirror_tags", "version_tag"]


def version_tag(number: int) -> str:
    """Return the git tag of a version."""
    return f"v{number}"


def git_tags(client: HubClient, repository: str) -> dict[str, str]:
    """Return the git tags there and the commits that they name."""
    told = client.get_json(repository, f"api/models/{repository}/refs")
    tags = told.get("tags") if isinstance(told, dict) else None
    if not isinstance(tags, list):
        raise IntegrityError(f"{repository}: the hub does not say which tags there are")
    named = ((tag.get("name"), tag.get("targetCommit")) for tag in tags if isinstance(tag, dict))
    return {name: commit for name, commit in named if isinstance(name, str) and isinstance(commit, str)}


def check_free(repository: str, tags: Mapping[str, str], versions: Sequence[VersionContent]) -> None:
    """Raise ConflictError when a version's tag is there before the version is: somebody else put it there."""
    for version in versions:
        tag = version_tag(version.number)
        if tag in tags:
            raise ConflictError(
                f"{repository}: the git tag {tag} is there already, and is not of a version that loramgr pushed",
                f"hf repos tag delete {repository} {tag}",
            )


def mirror_tags(client: HubClient, repository: str, entries: Iterable[Entry], changed: Iterable[Entry]) -> None:
    """Bring the git tags that the changed entries are about to where the adapter's tags are after all entries."""
    wanted: dict[str, int] = {}
    for entry in entries:
        content = entry.content
        if entry.kind == "publish":
            wanted.update(dict.fromkeys(content["tags"], content["number"]))
        elif entry.kind == "tag":
            wanted[content["tag"]] = content["number"]
        elif entry.kind == "untag":
            wanted.pop(content["tag"], None)
    touched = {tag for entry in changed for tag in _tags_of(entry)}
    there = git_tags(client, repository) if touched else {}
    for tag in sorted(touched):
        commit = there.get(version_tag(wanted[tag])) if tag in wanted else None
        if tag in there and there[tag] != commit:
            client.untag(repository, tag)
        if commit is not None and there.get(tag) != commit:
            client.tag(repository, tag, commit)


def _tags_of(entry: Entry) -> list[str]:
    if entry.kind == "publish":
        return [*entry.content["tags"]]
    return [entry.content["tag"]] if entry.kind in ("tag", "untag") else []
