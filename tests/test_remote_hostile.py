"""A remote full of lies: an integrity error names each, in bounded time and memory, and nothing is written."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from logbook import summary
from remote_world import Line, MemoryStore, nothing_known

from loramgr.catalog.chains import follow
from loramgr.digests import canonical_json, digest_bytes
from loramgr.errors import IntegrityError, LoramgrError
from loramgr.forks import covers
from loramgr.log import Entry
from loramgr.records import FileRecord
from loramgr.remotes import reading
from loramgr.remotes.layout import Head, content_key, entry_key, head_key
from loramgr.remotes.log_remote import LogRemote
from loramgr.remotes.protocol import StoredKey
from loramgr.remotes.proving import parse_manifest, prove_entry
from loramgr.workspace.home import Home
from loramgr.workspace.options import PullOptions
from loramgr.workspace.pulling import pull

HERE = digest_bytes(b"what is here")
MANIFEST = canonical_json({"schema": 1})
PUBLISHED: dict[str, Any] = {
    **{"number": 1, "version": digest_bytes(MANIFEST), "parents": [], "message": "", "tags": []},
    **{"labels": {}, "metrics": {}, "recipe": None, "summary": summary()},
}
FILE = {"path": "a", "digest": HERE, "bytes": 3}
PLAIN = Entry("adapter", "publish", "sql", None, "2026-01-01T00:00:00Z", "somebody", PUBLISHED)
UNPRINTABLE = ("a\nb", "a\rb", "a\x1b[2Jb", "a\x7fb", "a\x9bb", "a\u2028b")
UNCONTAINED = ("../a", "/a", "a/../../b", "..", "", ".", "a//b", "./a", "a/", "..\\a", "C:\\a", "C:a", "a\\b", "a\0b")


def with_files(*files: Any) -> Entry:
    return replace(PLAIN, content=PUBLISHED | {"summary": summary(files=list(files))})


def with_content(**changes: Any) -> Entry:
    return replace(PLAIN, content=PUBLISHED | changes)


def with_summary(**changes: Any) -> Entry:
    return replace(PLAIN, content=PUBLISHED | {"summary": summary(**changes)})


def raw(**changes: Any) -> bytes:
    """Return an entry's bytes with fields replaced by what no entry would be made with."""
    return canonical_json(json.loads(PLAIN.encode()) | changes)


ENTRIES: dict[str, Entry | bytes] = {
    **{f"the path {path!r}": with_files(FILE | {"path": path}) for path in UNCONTAINED},
    "a path twice": with_files(FILE, FILE),
    "a file that is a folder": with_files(FILE, FILE | {"path": "a/b"}),
    "a path that is a number": with_files(FILE | {"path": 1}),
    "a negative size": with_files(FILE | {"bytes": -1}),
    "a size beyond all": with_files(FILE | {"bytes": 1e300}),
    "a size of truth": with_files(FILE | {"bytes": True}),
    "a file with a short digest": with_files(FILE | {"digest": HERE[:-1]}),
    "a file with a digest as a path": with_files(FILE | {"digest": "sha256:../../../../etc/passwd"}),
    "a file with something more": with_files(FILE | {"mode": "0777"}),
    "files that are a text": with_summary(files="abc"),
    "a file that is a list": with_files(["a", HERE, 3]),
    "no summary": with_content(summary=None),
    "a summary without a method": with_summary(method=None),
    "modules that are numbers": with_summary(modules=[1, 2]),
    "a name with a slash": replace(PLAIN, name="a/b"),
    "a name with dots": replace(PLAIN, name=".."),
    "an empty name": replace(PLAIN, name=""),
    "a name that is a list": raw(name=["sql"]),
    "the name of another": replace(PLAIN, name="other"),
    "an entry of a base": Entry("base", "add", "sql", None, PLAIN.time, "somebody", {"digest": HERE}),
    "an entry of a remote": Entry("remote", "add", "sql", None, PLAIN.time, "somebody", {"url": "file:/"}),
    "an unknown kind": raw(kind="conquer"),
    "a kind that is a list": raw(kind=[]),
    "a log that is an object": raw(log={}),
    "an unknown schema": raw(schema=2),
    "a field too many": raw(more=1),
    "content that is a list": raw(content=[]),
    "content that is a text": raw(content="abc"),
    "a time that is none": replace(PLAIN, time="yesterday"),
    "an author that is a number": raw(author=3),
    "a predecessor that is missing": replace(PLAIN, predecessor=HERE),
    "a predecessor that is a path": replace(PLAIN, predecessor="../../x"),
    "a log that begins with a tag": Entry(
        "adapter", "tag", "sql", None, PLAIN.time, "somebody", {"tag": "a", "number": 1}
    ),
    "the number zero": with_content(number=0),
    "a number beyond all": with_content(number=1e20),
    "a number that is a text": with_content(number="1"),
    "a number that is a fraction": with_content(number=1.5),
    "a version that is no digest": with_content(version="../../manifest"),
    "a reserved tag": with_content(tags=["latest"]),
    "a tag that is a path": with_content(tags=["../x"]),
    "a label that is a list": with_content(labels={"a": []}),
    "a metric that is a text": with_content(metrics={"a": "1"}),
    "a parent without a digest": with_content(parents=[{"ref": "a@v1"}]),
    "nothing": b"",
    "no JSON": b"\x00\x01\x02",
    "JSON that is a list": b"[]",
    "JSON that is a number": b"1",
    "invalid UTF-8": PLAIN.encode().replace(b"somebody", b"some\xff\xfey"),
    "a lone surrogate": PLAIN.encode().replace(b"somebody", b"\\ud800"),
    "another encoding": PLAIN.encode().decode().encode("utf-16"),
    "a duplicate key": PLAIN.encode().replace(b'{"author"', b'{"author":"one","author"'),
    "spaces": PLAIN.encode().replace(b":", b": "),
    "NaN": PLAIN.encode().replace(b'"metrics":{}', b'"metrics":{"a":NaN}'),
    "a number of a thousand digits": PLAIN.encode().replace(b'"number":1', b'"number":' + b"9" * 1000),
    "a number of a million digits": PLAIN.encode().replace(b'"number":1', b'"number":' + b"9" * 1_000_000),
    "a huge exponent": PLAIN.encode().replace(b'"metrics":{}', b'"metrics":{"a":1e999999}'),
    "lists in lists": b"[" * 200_000 + b"]" * 200_000,
    "objects in objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "lists in lists in the recipe": PLAIN.encode().replace(b'"recipe":null', b'"recipe":' + b"[" * 900 + b"]" * 900),
    "a list of lists": b"[" + b"[]," * 1_000_000 + b"[]]",
    "a text without an end": b'{"a":[[' + b"[" * 100 + b'"' + b'\\"' * 1_000_000,
    "brackets in a text without an end": b"[" * 65 + b'"' + b"[" * 90_000 + b"\\",
    "too many bytes": b" " * (5 << 20),
    **{f"the path {path!r}": with_files(FILE | {"path": path}) for path in UNPRINTABLE},
    "two paths that differ in their case": with_files(FILE, FILE | {"path": "A"}),
    "two paths that look alike": with_files(FILE | {"path": "\u00e9"}, FILE | {"path": "e\u0301"}),
}


def put(store: MemoryStore, entry: Entry | bytes, name: str = "sql") -> str:
    """Store an entry under its own digest."""
    data = entry.encode() if isinstance(entry, Entry) else entry
    digest = digest_bytes(data)
    store.put_if_absent(entry_key(name, digest), data)
    return digest


def remote_of(*entries: Entry | bytes, swaps: bool = True, head: str | None = None) -> MemoryStore:
    """Return a remote with these entries in one log, whose head is the last one."""
    store = MemoryStore(swaps=swaps)
    store.put_if_absent("loramgr.json", json.dumps({"heads": "swapped" if swaps else "branches", "layout": 1}).encode())
    digests = [put(store, entry) for entry in entries]
    if swaps:
        store.put_if_absent(head_key("sql"), Head(head or digests[-1]).encode())
    return store


def check_refused(store: MemoryStore) -> None:
    """See every reader refuse the log, and gc delete nothing; what is allocated for it is bounded."""
    before = dict(store.keys)
    known = {HERE: Entry("base", "add", "sql", None, PLAIN.time, "me", {"digest": HERE})}
    tracemalloc.start()
    for read in (
        lambda: LogRemote(store, 2).log("sql", nothing_known),
        lambda: list(LogRemote(store, 2).logs(nothing_known)),
        lambda: LogRemote(store, 1).log("sql", known.get),
        lambda: LogRemote(store, 2).collect(timedelta(0), dry_run=False),
    ):
        with pytest.raises(IntegrityError) as caught:
            read()
        assert len(caught.value.message) < 2000
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert {key: data for key, data in store.keys.items() if not key.startswith("collecting/")} == before


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("what", ENTRIES)
def test_an_entry_that_lies_is_refused(what: str, swaps: bool) -> None:
    if what == "the name of another" and not swaps:
        assert LogRemote(remote_of(ENTRIES[what], swaps=False)).log("sql", nothing_known) is None
        return
    check_refused(remote_of(ENTRIES[what], swaps=swaps))


def test_the_plain_entry_of_these_tests_is_taken() -> None:
    log = LogRemote(remote_of(PLAIN)).log("sql", nothing_known)
    assert log is not None
    assert log.entries == (PLAIN.settled(),)


@pytest.mark.parametrize(
    "second",
    [
        with_content(number=1),
        replace(PLAIN, name="other"),
        Entry("adapter", "rename", "other", None, PLAIN.time, "a", {"from": "neither"}),
        Entry("base", "remove", "sql", None, PLAIN.time, "a", {}),
    ],
)
def test_an_entry_that_does_not_follow_is_refused(second: Entry) -> None:
    check_refused(remote_of(PLAIN, replace(second, predecessor=PLAIN.digest)))


@pytest.mark.parametrize("claim", ["original", "replaces"])
def test_a_log_that_claims_what_another_says_does_not_stand_for_it(claim: str) -> None:
    first = with_content(version=HERE, message="of the victim")
    victim = [first, replace(PLAIN, predecessor=first.digest, content=PUBLISHED | {"number": 2})]
    mine = replace(PLAIN, name="other", content=PUBLISHED | {"message": "of the claimant"})
    hostile = [mine]
    for entry in victim:
        content = {"original": entry.digest, "tag": "a", "number": 1}
        kind, said = ("tag", content) if claim == "original" else ("rebase", {"replaces": [entry.digest]})
        hostile.append(Entry("adapter", kind, "other", hostile[-1].digest, PLAIN.time, "somebody", said))
    for entries in ([*hostile, *victim], [*victim, *hostile]):
        chains = follow(entries)
        assert sorted(map(len, chains.logs)) == [2, 3]
        assert chains.forks == []
    assert not covers(hostile, victim)


def test_bytes_that_their_key_does_not_name_are_refused() -> None:
    store = remote_of(PLAIN)
    store.keys[entry_key("sql", PLAIN.digest)] = (with_content(message="another").encode(), datetime.now(UTC))
    check_refused(store)


def test_predecessors_in_a_circle_come_to_an_end() -> None:
    store = remote_of(PLAIN, head=HERE)
    other = digest_bytes(b"other")
    for one, two in ((HERE, other), (other, HERE)):
        data = replace(PLAIN, predecessor=two).encode()
        store.keys[entry_key("sql", one)] = (data, datetime.now(UTC))
    check_refused(store)


def test_a_circle_among_known_entries_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LOG_ENTRIES", 1000)
    known = {HERE: replace(PLAIN, predecessor=PLAIN.digest), PLAIN.digest: replace(PLAIN, predecessor=HERE)}
    with pytest.raises(IntegrityError):
        LogRemote(remote_of(PLAIN)).log("sql", known.get)


@pytest.mark.parametrize(
    "head",
    [
        *(
            b"",
            b"{}",
            b"[]",
            b"null",
            b'{"head":1}',
            b'{"head":"sha256:../.."}',
            b"[" * 100_000,
            b"\xff",
            b" " * 100_000,
        ),
        Head(HERE).encode() + b" ",
        b'{"gone":1,"head":"' + HERE.encode() + b'","moved":null}',
        b'{"gone":true,"head":"' + HERE.encode() + b'","moved":"../x"}',
        Head(HERE).encode(),
    ],
)
def test_a_head_that_names_nothing_is_refused(head: bytes) -> None:
    store = remote_of(PLAIN)
    store.keys[head_key("sql")] = (head, datetime.now(UTC))
    check_refused(store)


@pytest.mark.parametrize("described", [b"", b"[]", b'{"layout":1}', b'{"layout":"1","heads":"swapped"}', b"[" * 9999])
def test_a_description_that_is_none_is_refused(described: bytes, tmp_path: Path) -> None:
    store = MemoryStore()
    store.put_if_absent("loramgr.json", described)
    line = Line(tmp_path)
    line.publish({"a": b"1"})
    for use in (LogRemote(store).names, lambda: line.push(LogRemote(store))):
        with pytest.raises(IntegrityError):
            use()
    assert not [key for key in store.keys if key.startswith(("logs", "heads", "manifests"))]


@pytest.mark.parametrize(
    "manifest",
    [
        *(b"", b"[]", b"{}", b'{"files":[]} ', b"[" * 100_000, b'{"files":1}'),
        *(canonical_json({"files": [FILE | {"path": path}]}) for path in (*UNCONTAINED, *UNPRINTABLE)),
        canonical_json({"files": [FILE | {"path": f"{at}"} for at in range(100_001)]}),
        canonical_json({"files": [FILE, FILE]}),
        canonical_json({"files": [FILE | {"bytes": 1e300}]}),
        b'{"files":[],"x":' + b"9" * 5000 + b"}",
        bytes(17 << 20),
    ],
)
def test_a_manifest_that_lies_is_refused(manifest: bytes) -> None:
    digest = digest_bytes(manifest)
    store = remote_of(PLAIN)
    store.put_if_absent(content_key("manifests/", digest), manifest)
    with pytest.raises(IntegrityError):
        LogRemote(store).read_manifest("sql", 1, digest)


class Endless(MemoryStore):
    """Lists keys without an end, and gives bytes without an end."""

    taken = 0

    def list(self, prefix: str) -> Iterator[StoredKey]:
        for at in range(10**9):
            self.taken += 1
            key = f"logs/{'sql'}/{at:064x}" if prefix.startswith("logs") else f"heads/name-{at}"
            yield StoredKey(key, 1 << 60, "token", datetime.now(UTC))

    def get(self, key: str, offset: int = 0) -> Iterator[bytes]:
        if key == "loramgr.json":
            yield from super().get(key)
            return
        while True:
            self.taken += 1
            yield bytes(1 << 16)


@pytest.mark.parametrize("swaps", [True, False])
def test_what_has_no_end_is_given_up(swaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("LOG_ENTRIES", "REMOTE_ENTRIES", "REMOTE_LOGS"):
        monkeypatch.setattr(reading, limit, 5000)
    store = Endless(swaps=swaps)
    store.keys = remote_of(PLAIN, swaps=swaps).keys
    uses: list[Callable[[LogRemote], object]] = [
        lambda remote: remote.names(),
        lambda remote: remote.log("sql", nothing_known),
        lambda remote: list(remote.logs(nothing_known)),
        lambda remote: remote.read_manifest("sql", 1, HERE),
        lambda remote: list(remote.read_blob("sql", 1, FileRecord("a", HERE, 100_000))),
    ]
    for use in uses:
        store.taken = 0
        with pytest.raises(IntegrityError):
            use(LogRemote(store))
        assert store.taken < 20_000


class Garbled(MemoryStore):
    """Damages one key of its first listing so that it names nothing, or nothing in its folder."""

    listings = 0

    def list(self, prefix: str) -> Iterator[StoredKey]:
        self.listings += 1
        for at, stored in enumerate(super().list(prefix)):
            yield replace(stored, key=f"{stored.key[:-1]}`") if at == 0 and self.listings == 1 else stored


@pytest.mark.parametrize("swaps", [True, False])
def test_a_listing_that_is_damaged_on_its_way_hides_nothing(swaps: bool) -> None:
    tag = Entry("adapter", "tag", "sql", PLAIN.digest, PLAIN.time, "somebody", {"tag": "prod", "number": 1})
    store = Garbled(swaps=swaps)
    store.keys = remote_of(PLAIN, tag, swaps=swaps).keys
    uses: list[Callable[[LogRemote], object]] = [
        lambda remote: remote.names(),
        lambda remote: [log.name for log in remote.logs(nothing_known) if len(log.entries) == 2],
        lambda remote: ["sql"] if len(getattr(remote.log("sql", nothing_known), "entries", ())) == 2 else [],
    ]
    for use in uses:
        store.listings = 0
        assert use(LogRemote(store)) == ["sql"]
        store.keys["logs/sql/of somebody else"] = store.keys["heads/of/somebody else"] = (b"", datetime.now(UTC))


@pytest.mark.parametrize("seed", range(200))
def test_entries_with_a_flipped_byte_are_never_believed(seed: int) -> None:
    data = bytearray(PLAIN.encode())
    data[seed * len(data) // 200] ^= 1 << seed % 8
    for name in (PLAIN.digest, digest_bytes(bytes(data))):
        try:
            entry = prove_entry("here", name, bytes(data))
        except IntegrityError:
            continue
        assert entry.encode() == bytes(data)
        assert name == digest_bytes(bytes(data))


def test_a_manifest_is_read_as_it_was_written() -> None:
    told = {"files": [FILE], "schema": 1}
    assert parse_manifest("here", digest_bytes(canonical_json(told)), canonical_json(told)) == told


def spread(store: MemoryStore, folder: Path) -> None:
    """Write what a remote has into a folder."""
    for key, (data, _) in store.keys.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)


def everything(folder: Path) -> dict[str, bytes]:
    """Return what is in a home, but for what it remembers of files outside."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if "cache" not in path.parts}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    opened = Home.open(tmp_path / "home", 2, False)
    with opened.catalog.reading():
        pass
    return opened


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("what", [what for at, what in enumerate(ENTRIES) if at % 5 == 0 and what != "too many bytes"])
def test_a_pull_of_lies_writes_nothing(home: Home, tmp_path: Path, what: str, swaps: bool) -> None:
    remote = tmp_path / "remote"
    spread(remote_of(ENTRIES[what], swaps=swaps), remote)
    before = everything(home.path)
    for refs in (["sql"], []):
        with pytest.raises(LoramgrError) as caught:
            pull(home, refs, PullOptions(f"file:{remote}"))
        assert caught.value.exit_code == 5
    assert everything(home.path) == before
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("part", ["blobs", "manifests", "logs", "heads", "logs/sql"])
def test_links_in_a_folder_are_not_followed(home: Home, tmp_path: Path, part: str) -> None:
    line = Line(tmp_path)
    line.publish({"a": b"abc"})
    store = MemoryStore()
    line.push(LogRemote(store))
    remote = tmp_path / "remote"
    spread(store, remote)
    (remote / part).rename(tmp_path / "elsewhere")
    (remote / part).symlink_to(tmp_path / "elsewhere")
    before = everything(home.path)
    with pytest.raises(LoramgrError) as caught:
        pull(home, ["sql"], PullOptions(f"file:{remote}"))
    assert caught.value.exit_code in (4, 5)
    assert everything(home.path) == before


@pytest.mark.parametrize("part", ["loramgr.json", "heads/sql", "logs/sql", "manifests", "blobs"])
@pytest.mark.parametrize("what", ["pipe", "link", "sparse"])
def test_what_is_no_file_in_a_folder_is_refused(home: Home, tmp_path: Path, part: str, what: str) -> None:
    line = Line(tmp_path)
    line.publish({"a": b"abc"})
    store = MemoryStore()
    line.push(LogRemote(store))
    remote = tmp_path / "remote"
    spread(store, remote)
    path = next(path for path in (remote / part, *(remote / part).rglob("*")) if path.is_file())
    path.rename(tmp_path / "elsewhere")
    if what == "pipe":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to(tmp_path / "elsewhere")  # the right bytes, but not the remote's
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    before = everything(home.path)
    listed = part != "heads/sql" or what == "sparse"  # what is no file is no key, and without a head is no log to list
    for refs in (["sql"], *([[]] if listed else [])):
        with pytest.raises(LoramgrError) as caught:
            pull(home, refs, PullOptions(f"file:{remote}"))
        assert caught.value.exit_code == 5
    assert everything(home.path) == before


@pytest.mark.parametrize("lie", ["other bytes", "short", "long", "missing", "manifest of another"])
def test_a_file_that_lies_gets_no_name(home: Home, tmp_path: Path, lie: str) -> None:
    line = Line(tmp_path)
    line.publish({"a": b"abc"})
    store = MemoryStore()
    line.push(LogRemote(store))
    version = line.versions[0]
    key = content_key("blobs/", version.files[0].digest)
    now = datetime.now(UTC)
    if lie == "missing":
        store.delete(key)
    elif lie == "manifest of another":
        store.keys[content_key("manifests/", version.digest)] = (MANIFEST, now)
    else:
        store.keys[key] = ({"other bytes": b"abd", "short": b"ab", "long": b"abcd"}[lie], now)
    spread(store, tmp_path / "remote")
    before = everything(home.path)
    with pytest.raises(LoramgrError) as caught:
        pull(home, ["sql"], PullOptions(f"file:{tmp_path / 'remote'}"))
    assert caught.value.exit_code == 5
    assert everything(home.path) == before
