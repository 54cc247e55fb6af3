"""Git tags of a hub's repository: `v<number>` for the commit of each version and, where asked, the adapter's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from loramgr.errors import ConflictError, IntegrityError
from loramgr.log import Entry
from loramgr.needs import live
from loramgr.remotes.hub_client import HubClient
from loramgr.remotes.protocol import VersionContent

__all__ = ["check_free", "git_tags", "mirror_tags", "unmarked", "version_tag"]


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


def unmarked(entries: Sequence[Entry], manifests: Sequence[str], tags: Mapping[str, str]) -> list[Entry]:
    """Return the entries of the versions there that are not removed and have no git tag."""
    pushed = {*manifests}
    return [
        entry
        for entry in live(entries)
        if entry.content["version"] in pushed and version_tag(entry.content["number"]) not in tags
    ]


def mirror_tags(
    client: HubClient, repository: str, entries: Sequence[Entry], there: Mapping[str, str]
) -> list[tuple[str, str | None]]:
    """Bring the git tags of all names that ever were tags of the adapter to where these are now.

    `there` are the git tags as they are. Returns those that changed, each with its commit, None for one taken away.
    """
    wanted = _tags_after(entries)
    changed: list[tuple[str, str | None]] = []
    for tag in sorted({tag for entry in entries for tag in _tags_of(entry)}):
        commit = there.get(version_tag(wanted[tag])) if tag in wanted else None
        if there.get(tag) == commit:
            continue
        if tag in there:
            client.untag(repository, tag)
        if commit is not None:
            client.tag(repository, tag, commit)
        changed.append((tag, commit))
    return changed


def _tags_after(entries: Iterable[Entry]) -> dict[str, int]:
    """Return the adapter's tags after these entries, and the version that each names."""
    tags: dict[str, int] = {}
    for entry in entries:
        content = entry.content
        if entry.kind == "publish":
            tags.update(dict.fromkeys(content["tags"], content["number"]))
        elif entry.kind == "tag":
            tags[content["tag"]] = content["number"]
        elif entry.kind == "untag":
            tags.pop(content["tag"], None)
        elif entry.kind == "remove":
            gone = {*tags.values()} if content["whole"] else {*content["numbers"]}
            tags = {tag: number for tag, number in tags.items() if number not in gone}
    return tags


def _tags_of(entry: Entry) -> list[str]:
    if entry.kind == "publish":
        return [*entry.content["tags"]]
    return [entry.content["tag"]] if entry.kind in ("tag", "untag") else []
