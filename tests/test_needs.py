"""What the logs need of the store, told from the entries alone; the law against the rows is in the rebuild's test."""

from __future__ import annotations

from typing import Any

import pytest

from loramgr.errors import IntegrityError
from loramgr.log import Entry, LogKind
from loramgr.needs import Needs, mentioned, needs_of

FILE = {"path": "f", "digest": "sha256:f", "bytes": 3}


def entry(kind: str, log: LogKind = "adapter", **content: Any) -> Entry:
    return Entry(log, kind, "sql", None, "2026-01-01T00:00:00Z", "tester", content)


def publish(number: int, **changes: Any) -> Entry:
    summary = {"method": "lora", "base": None, "files": [FILE]}
    said = {"number": number, "version": f"sha256:{number}", "summary": summary}
    return entry("publish", **said | changes)


def test_a_version_needs_its_manifest_and_files_until_it_is_removed() -> None:
    log = [publish(1), publish(2)]
    assert needs_of([log]).manifests.keys() == {"sha256:1", "sha256:2"}
    log.append(entry("remove", numbers=[1], whole=False))
    needs = needs_of([log])
    assert needs == Needs({"sha256:f": 3}, {"sha256:2": {"method": "lora", "base": None, "files": [FILE]}})
    log.append(entry("remove", numbers=[2], whole=True))
    assert needs_of([log]) == Needs()
    log.append(entry("restore", numbers=[1], whole=True))
    assert needs_of([log]).manifests.keys() == {"sha256:1"}
    assert mentioned(log).manifests.keys() == {"sha256:1", "sha256:2"}


def test_a_base_needs_the_list_of_its_tensors_as_it_was_added_last() -> None:
    log = [entry("add", "base", digest="sha256:a"), entry("add", "base", digest="sha256:b")]
    assert needs_of([log]) == Needs({"sha256:b": None})
    assert mentioned(log) == Needs({"sha256:a": None, "sha256:b": None})
    assert needs_of([[*log, entry("remove", "base")]]) == Needs()


@pytest.mark.parametrize(
    "bad",
    [
        publish(1, summary=None),
        publish(1, summary={"method": "lora", "base": None, "files": [{}]}),
        publish(1, version=[]),
        entry("remove", whole=False),
        entry("restore", numbers=[7], whole=False),
        entry("restore", numbers=None, whole=False),
        entry("add", "base"),
    ],
)
def test_an_entry_that_lacks_something_is_named(bad: Entry) -> None:
    with pytest.raises(IntegrityError, match=bad.digest):
        needs_of([[bad]])
