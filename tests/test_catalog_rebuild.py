"""The catalog is an index: whatever happened, its rows come again from the log entries, column for column."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from logbook import Logbook

from loramgr.catalog.catalog import Catalog
from loramgr.catalog.chains import follow
from loramgr.catalog.query import VersionQuery
from loramgr.catalog.rebuild import rebuild
from loramgr.catalog.tables import Table
from loramgr.digests import digest_bytes
from loramgr.errors import ConflictError, IntegrityError
from loramgr.log import Entry
from loramgr.needs import needs_of

NAMES = ("a", "b", "c")
TEXTS = st.text(max_size=5).filter(lambda text: text.isprintable())
ACTIONS = st.tuples(
    st.sampled_from(
        ["publish", "tag", "untag", "label", "metric", "rename", "remove", "whole", "restore", "back", "base", "unbase"]
    ),
    st.sampled_from(NAMES),
    st.integers(1, 3),
    st.dictionaries(TEXTS, st.none() | TEXTS, max_size=3),
    st.dictionaries(
        TEXTS, st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9), max_size=3
    ),
)


@pytest.fixture(scope="module")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Logbook(tmp_path_factory.mktemp("empty") / "home").home


@pytest.fixture
def book(tmp_path: Path, empty_home: Path) -> Logbook:
    shutil.copytree(empty_home, tmp_path / "home")
    return Logbook(tmp_path / "home")


def rows(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    with closing(sqlite3.connect(path)) as connection:
        tables = [*(table.name for table in Table.metadata.sorted_tables), "alembic_version"]
        return {table: sorted(connection.execute(f"SELECT * FROM {table}"), key=repr) for table in tables}


def act(book: Logbook, what: str, name: str, number: int, labels: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Do one thing, if the catalog lets us."""
    other = NAMES[number % 3]
    made: dict[str, Callable[[], Entry]] = {
        "publish": lambda: book.publish(
            name,
            parents=[{"ref": f"{other}@v1", "digest": digest_bytes(f"{other} 1".encode())}],
            tags=["t", f"t{number}"],
            labels={key: value for key, value in labels.items() if value is not None},
            metrics={key: value for key, value in metrics.items() if value is not None},
            rank=None if number == 1 else number,
            alpha=number,
        ),
        "tag": lambda: book.add("tag", name, tag="t", number=number),
        "untag": lambda: book.add("untag", name, tag="t"),
        "label": lambda: book.add("label", name, number=number, labels=labels),
        "metric": lambda: book.add("metric", name, number=number, metrics=metrics),
        "rename": lambda: book.add("rename", other, **{"from": name}),
        "remove": lambda: book.add("remove", name, numbers=[number], whole=False),
        "whole": lambda: book.add("remove", name, numbers=[], whole=True),
        "restore": lambda: book.add("restore", name, numbers=[number], whole=False),
        "back": lambda: book.add("restore", name, numbers=[number], whole=True),
        "base": lambda: book.entry("remove", name, "base") and book.append(base_entry(book, name, number)),
        "unbase": lambda: book.add("remove", name, "base"),
    }
    before = rows(book.catalog.path)
    try:
        made[what]()
    except (ConflictError, IntegrityError):
        assert rows(book.catalog.path) == before


def base_entry(book: Logbook, name: str, number: int) -> Entry:
    numbers = {"tensors": number, "parameters": number, "bytes": number}
    said = {"source": "/x", "revision": None, "dtype": "F32", "architecture": None}
    return book.entry("add", name, "base", digest=digest_bytes(b"%d" % number), **numbers, **said)


@settings(
    max_examples=8, deadline=None, phases=[Phase.reuse, Phase.generate], suppress_health_check=[HealthCheck.too_slow]
)
@given(actions=st.lists(ACTIONS, min_size=1, max_size=25))
def test_rebuild_gives_the_same_rows_after_any_life(
    tmp_path_factory: pytest.TempPathFactory, empty_home: Path, actions: list[Any]
) -> None:
    home = tmp_path_factory.mktemp("life") / "home"
    shutil.copytree(empty_home, home)
    book = Logbook(home)
    for action in actions:
        act(book, *action)
    before = rows(book.catalog.path)
    with book.catalog.reading() as reader:
        assert reader.compare(book.entries()) == []
        needs = needs_of(follow(book.entries()).logs)
        live = reader.versions(VersionQuery(all_versions=True))
        files = {file.digest for version in live for file in version.files}
        assert needs.manifests.keys() == {version.digest for version in live}
        assert needs.blobs.keys() == files | {base.digest for base in reader.bases()}
    report = rebuild(book.catalog.path, book.store.uuid, book.entries())
    assert rows(book.catalog.path) == before
    assert (report.entries, report.forks) == (len(before["entries"]), [])
    assert sorted(path.name for path in home.iterdir()) == ["catalog.sqlite3", "store"]
    shutil.rmtree(home)


def test_comparison_names_every_changed_row(book: Logbook) -> None:
    book.publish("a", tags=["t"], labels={"k": "v"})
    with closing(sqlite3.connect(book.catalog.path)) as connection, connection:
        connection.execute("UPDATE versions SET rank = 9, message = 'x'")
        connection.execute("DELETE FROM tags")
        connection.execute("INSERT INTO metrics VALUES ((SELECT root FROM logs), 1, 'acc', 1.0)")
    with book.catalog.reading() as reader:
        found = reader.compare(book.entries())
    assert [line.split(" ")[0] for line in found] == ["versions", "metrics", "tags"]
    assert [line.split(": ")[1] for line in found] == [
        "differs from the logs in rank, message",
        "not in the logs",
        "missing from the catalog",
    ]


@pytest.mark.parametrize("damage", [None, b"", b"no database at all" * 100])
def test_lost_or_damaged_catalog_is_made_again(book: Logbook, damage: bytes | None) -> None:
    book.publish("a", tags=["t"])
    before = rows(book.catalog.path)
    book.catalog.path.unlink()
    (book.home / "catalog.sqlite3-journal").write_bytes(b"the journal of what was lost")
    if damage is not None:
        book.catalog.path.write_bytes(damage)
    rebuild(book.catalog.path, book.store.uuid, book.entries())
    assert rows(book.catalog.path) == before
    assert sorted(path.name for path in book.home.iterdir()) == ["catalog.sqlite3", "store"]


def test_stored_entry_without_a_commit_becomes_the_newest(book: Logbook) -> None:
    book.publish("a")
    orphan = book.entry("tag", "a", tag="t", number=1)
    book.store.entries.put_bytes(orphan.encode())
    rebuild(book.catalog.path, book.store.uuid, book.entries())
    with book.catalog.reading() as reader:
        assert reader.version("a@t").version == 1


def test_fork_follows_the_committed_branch_and_is_reported(book: Logbook) -> None:
    book.publish("a")
    orphan = book.entry("tag", "a", tag="orphan", number=1)
    book.store.entries.put_bytes(orphan.encode())
    book.add("tag", "a", tag="kept", number=1)
    before = rows(book.catalog.path)
    report = rebuild(book.catalog.path, book.store.uuid, book.entries())
    assert report.forks == [orphan.digest]
    assert rows(book.catalog.path) == before
    assert book.store.entries.contains(orphan.digest)


def test_broken_chain_is_refused_and_the_old_catalog_stays(book: Logbook) -> None:
    first = book.publish("a")
    book.publish("a")
    before = rows(book.catalog.path)
    entries = [entry for entry in book.entries() if entry != first]
    with pytest.raises(IntegrityError, match=first.digest):
        rebuild(book.catalog.path, book.store.uuid, entries)
    assert rows(book.catalog.path) == before
    assert sorted(path.name for path in book.home.iterdir()) == ["catalog.sqlite3", "store"]


def test_senseless_entry_is_named(book: Logbook) -> None:
    entry = book.publish("a")
    bad = replace(entry, kind="tag", predecessor=entry.digest, content={"tag": "t", "number": 7})
    with pytest.raises(IntegrityError, match=bad.digest):
        rebuild(book.catalog.path, book.store.uuid, [entry, bad])


WAIT_AND_TAG = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from logbook import Logbook
from loramgr.errors import ConflictError
book = Logbook(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
try:
    book.add("tag", "a", tag="late", number=1)
except ConflictError as error:
    sys.exit(7 if "replaced" in error.message else 8)
"""


def test_writer_that_waited_for_a_rebuild_does_not_write_into_the_old_file(book: Logbook) -> None:
    book.publish("a")
    command = [sys.executable, "-c", WAIT_AND_TAG, str(book.home), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()

        def entries() -> Any:
            process.stdin.write("go\n")
            process.stdin.flush()
            time.sleep(0.7)  # long enough for the other process to open the old file and wait for its lock
            yield from book.entries()

        rebuild(book.catalog.path, book.store.uuid, entries())
        code = process.wait()
    assert code == 7
    assert Catalog.open(book.catalog.path, book.store.uuid)
