"""The catalog's answers: references, filters, orders, and refusals."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from logbook import Logbook, summary
from sqlalchemy import func, literal_column, select
from sqlalchemy.engine.interfaces import CacheStats

from loramgr.catalog.catalog import Catalog
from loramgr.catalog.engine import open_engine
from loramgr.catalog.query import VersionQuery
from loramgr.catalog.tables import Log as LogTable
from loramgr.digests import digest_bytes
from loramgr.errors import (
    ConflictError,
    IncompatibleError,
    IntegrityError,
    LoramgrError,
    NotFoundError,
    UncheckedError,
    UsageError,
)
from loramgr.log import Entry
from loramgr.records import BaseReference, FileRecord, VersionRecord


@pytest.fixture(scope="module")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Logbook(tmp_path_factory.mktemp("empty") / "home").home


@pytest.fixture
def book(tmp_path: Path, empty_home: Path) -> Logbook:
    shutil.copytree(empty_home, tmp_path / "home")
    return Logbook(tmp_path / "home")


def refs(versions: list[VersionRecord]) -> list[str]:
    return [f"{version.name}@v{version.version}" for version in versions]


def listed(book: Logbook, **query: Any) -> list[str]:
    with book.catalog.reading() as reader:
        return refs(reader.versions(VersionQuery(**query)))


def resolved(book: Logbook, ref: str) -> VersionRecord:
    with book.catalog.reading() as reader:
        return reader.version(ref)


def test_record_says_what_was_published(book: Logbook) -> None:
    base = book.add_base("minilm")
    book.publish("sql")
    files = [{"path": path, "digest": digest_bytes(path.encode()), "bytes": 3} for path in ("b", "a/c")]
    entry = book.publish(
        "sql",
        parents=[{"ref": "sql@v1", "digest": digest_bytes(b"sql 1")}],
        message="better",
        tags=["prod", "best"],
        labels={"team": "search"},
        metrics={"acc": 0.5, "steps": 3},
        base=base,
        files=files,
        ranks={"b": 4, "a": 8},
    )
    said = summary()
    assert resolved(book, "sql") == VersionRecord(
        name="sql",
        version=2,
        digest=digest_bytes(b"sql 2"),
        weights_digest=said["weights_digest"],
        base=BaseReference("minilm", base),
        method="lora",
        format="peft",
        rank=8,
        ranks={"a": 8, "b": 4},
        alpha=16.0,
        scaling=2.0,
        target_modules=["q_proj"],
        parameters=1000,
        bytes=4000,
        dtype="F32",
        files=[FileRecord(path, digest_bytes(path.encode()), 3) for path in ("a/c", "b")],
        parents=["sql@v1"],
        tags=["best", "prod"],
        labels={"team": "search"},
        metrics={"acc": 0.5, "steps": 3.0},
        message="better",
        created_at=entry.time,
    )


def test_references(book: Logbook) -> None:
    book.publish("sql", tags=["first"])
    book.publish("sql")
    digest = digest_bytes(b"sql 1")
    meant = {"sql": 2, "sql@latest": 2, "sql@v1": 1, "sql@first": 1, f"sql@{digest[:20]}": 1, digest[:20]: 1, digest: 1}
    assert {ref: resolved(book, ref).version for ref in meant} == meant


@pytest.mark.parametrize("ref", ["sql@v3", "sql@none", "sql@sha256:00", "sha256:00", "sqk", "sql@v3000000000"])
def test_absent_reference(book: Logbook, ref: str) -> None:
    book.publish("sql", version="sha256:" + "1" * 64)
    with pytest.raises(NotFoundError, match=ref) as error:
        resolved(book, ref)
    assert error.value.hint is not None
    assert "loramgr" in error.value.hint


def test_close_name_is_suggested(book: Logbook) -> None:
    book.publish("sentiment")
    with pytest.raises(NotFoundError) as error:
        resolved(book, "sentimant")
    assert error.value.hint is not None
    assert "did you mean sentiment" in error.value.hint


def test_ambiguous_digest_lists_the_candidates(book: Logbook) -> None:
    for name in ("a", "b"):
        book.publish(name, version="sha256:" + "1" * 64)
    with pytest.raises(UsageError, match=r"a@v1, b@v1"):
        resolved(book, "sha256:11")
    assert resolved(book, "b@sha256:11").name == "b"


def test_moved_and_dropped_tag(book: Logbook) -> None:
    book.publish("sql", tags=["prod"])
    book.publish("sql")
    book.add("tag", "sql", tag="prod", number=2)
    assert resolved(book, "sql@prod").version == 2
    assert resolved(book, "sql@v1").tags == []
    book.add("untag", "sql", tag="prod")
    with pytest.raises(NotFoundError):
        resolved(book, "sql@prod")


def test_labels_and_metrics_are_set_and_dropped(book: Logbook) -> None:
    book.publish("sql", labels={"a": "1", "b": "2"}, metrics={"acc": 0.5})
    book.add("label", "sql", number=1, labels={"a": None, "b": "3", "c": ""})
    book.add("metric", "sql", number=1, metrics={"acc": None, "loss": 1})
    assert resolved(book, "sql").labels == {"b": "3", "c": ""}
    assert resolved(book, "sql").metrics == {"loss": 1.0}


def test_rename_keeps_the_log_and_frees_the_old_name(book: Logbook) -> None:
    book.publish("old")
    book.publish("old", parents=[{"ref": "old@v1", "digest": digest_bytes(b"old 1")}])
    book.add("rename", "new", **{"from": "old"})
    book.publish("old", version=digest_bytes(b"another"))
    with book.catalog.reading() as reader:
        assert refs(reader.log("new")) == ["new@v2", "new@v1"]
        assert refs(reader.log("old")) == ["old@v1"]
        assert reader.children("new@v1") == ["new@v2"]
        assert reader.children("old@v1") == []


def test_rename_onto_a_taken_name_is_refused_even_when_that_one_is_removed(book: Logbook) -> None:
    book.publish("a")
    book.publish("b")
    book.add("remove", "b", numbers=[1], whole=True)
    with pytest.raises(ConflictError, match="removed adapter"):
        book.add("rename", "b", **{"from": "a"})
    assert listed(book) == ["a@v1"]
    assert len(list(book.entries())) == 3


def test_removed_version_is_gone_with_its_tags_and_its_number_is_not_used_again(book: Logbook) -> None:
    book.publish("sql")
    book.publish("sql", tags=["prod"])
    book.add("remove", "sql", numbers=[2], whole=False)
    assert resolved(book, "sql").version == 1
    for ref in ("sql@v2", "sql@prod", digest_bytes(b"sql 2")):
        with pytest.raises(NotFoundError):
            resolved(book, ref)
    assert listed(book, tag="prod") == []
    book.publish("sql")
    assert listed(book, all_versions=True) == ["sql@v3", "sql@v1"]


def test_removed_adapter_continues_its_log(book: Logbook) -> None:
    book.publish("sql", tags=["prod"])
    book.add("remove", "sql", numbers=[1], whole=True)
    assert listed(book) == []
    with book.catalog.reading() as reader:
        state = reader.log_state("adapter", "sql")
        assert state is not None
        assert (state.removed, state.next_number) == (True, 2)
        with pytest.raises(NotFoundError):
            reader.log("sql")
    book.publish("sql")
    with book.catalog.reading() as reader:
        assert refs(reader.log("sql")) == ["sql@v2"]
        assert reader.log("sql")[0].tags == []


def test_children_of_any_adapter(book: Logbook) -> None:
    book.publish("base-run")
    parent = {"ref": "base-run@v1", "digest": digest_bytes(b"base-run 1")}
    book.publish("child", parents=[parent])
    book.publish("child", parents=[{"ref": "child@v1", "digest": digest_bytes(b"child 1")}, parent])
    book.publish("stranger", parents=[{"ref": "other@v1", "digest": digest_bytes(b"base-run 1")}])
    with book.catalog.reading() as reader:
        assert reader.children("base-run") == ["child@v1", "child@v2"]
    book.add("remove", "child", numbers=[1], whole=False)
    with book.catalog.reading() as reader:
        assert reader.children("base-run") == ["child@v2"]


def test_version_of_the_same_files(book: Logbook) -> None:
    files = [FileRecord(path, digest_bytes(path.encode()), 1) for path in "ab"]
    book.publish("sql", files=[{"path": file.path, "digest": file.digest, "bytes": 1} for file in files])
    book.publish("sql")
    with book.catalog.reading() as reader:
        found = reader.find_version_by_files("sql", files)
        assert found is not None
        assert found.version == 1
        assert reader.find_version_by_files("sql", files[:1]) is None
        assert reader.find_version_by_files("sql", [*files, FileRecord("c", files[0].digest, 1)]) is None
        assert reader.find_version_by_files("sql", [files[0], FileRecord("b", files[0].digest, 1)]) is None
        assert reader.find_version_by_files("other", files) is None


@pytest.fixture
def shelf(book: Logbook) -> Logbook:
    base = book.add_base("minilm")
    book.publish("alpha", rank=4, metrics={"acc": 0.8}, labels={"team": "a"}, base=base, modules=["l.0.attn.q_proj"])
    book.publish("alpha", rank=8, metrics={"acc": 0.9}, tags=["prod"], bytes=10, modules=["l.0.attn.q_proj", "l.0.up"])
    book.publish("beta", rank=None, method="ia3", metrics={"acc": 0.7}, bytes=30, modules=["q_proj_extra", "up"])
    book.publish("gamma", rank=16, metrics={"loss": 1}, labels={"team": "a", "x": "y"}, bytes=20, modules=["a_proj"])
    return book


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, ["alpha@v2", "beta@v1", "gamma@v1"]),
        ({"all_versions": True}, ["alpha@v2", "alpha@v1", "beta@v1", "gamma@v1"]),
        ({"base": "minilm"}, ["alpha@v1"]),
        ({"base": "minilm", "latest_only": True}, []),
        ({"base": digest_bytes(b"base")}, ["alpha@v1"]),
        ({"base": digest_bytes(b"unregistered")}, []),
        ({"name": "*a"}, ["alpha@v2", "beta@v1", "gamma@v1"]),
        ({"name": "[!ab]*"}, ["gamma@v1"]),
        ({"name": "a?pha"}, ["alpha@v2"]),
        ({"tag": "prod"}, ["alpha@v2"]),
        ({"labels": (("team", "a"),)}, ["alpha@v1", "gamma@v1"]),
        ({"labels": (("team", "a"), ("x", "y"))}, ["gamma@v1"]),
        ({"method": "ia3"}, ["beta@v1"]),
        ({"rank": 4}, ["alpha@v1"]),
        ({"rank": 4, "latest_only": True}, []),
        ({"target": "q_proj"}, ["alpha@v2"]),
        ({"target": "attn.q_proj", "all_versions": True}, ["alpha@v2", "alpha@v1"]),
        ({"target": "up"}, ["alpha@v2", "beta@v1"]),
        ({"target": "proj"}, []),
        ({"metrics": ("acc>0.7",)}, ["alpha@v2"]),
        ({"metrics": ("acc>=0.7",)}, ["alpha@v2", "beta@v1"]),
        ({"metrics": ("acc<0.85", "acc!=0.7")}, ["alpha@v1"]),
        ({"metrics": ("acc = 0.7",)}, ["beta@v1"]),
        ({"metrics": ("loss<=1",)}, ["gamma@v1"]),
        ({"sort": "rank"}, ["alpha@v2", "gamma@v1", "beta@v1"]),
        ({"sort": "-rank"}, ["gamma@v1", "alpha@v2", "beta@v1"]),
        ({"sort": "bytes"}, ["alpha@v2", "gamma@v1", "beta@v1"]),
        ({"sort": "-name"}, ["gamma@v1", "beta@v1", "alpha@v2"]),
        ({"sort": "-created", "limit": 1}, ["gamma@v1"]),
        ({"sort": "metric:acc"}, ["beta@v1", "alpha@v2", "gamma@v1"]),
        ({"sort": "-metric:acc", "limit": 2, "all_versions": True}, ["alpha@v2", "alpha@v1"]),
        ({"sort": "parameters"}, ["alpha@v2", "beta@v1", "gamma@v1"]),
        ({"limit": 0}, []),
    ],
)
def test_filters_orders_and_limits(shelf: Logbook, query: dict[str, Any], expected: list[str]) -> None:
    assert listed(shelf, **query) == expected


@pytest.mark.parametrize(
    "query",
    [{"metrics": (text,)} for text in ("acc", "acc>", ">1", "acc>x", "acc>nan", "acc=>1", "a>1>2", "")]
    + [{"sort": key} for key in ("", "size", "metric:", "--name")]
    + [{"limit": -1}],
)
def test_malformed_query_is_a_usage_error(shelf: Logbook, query: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        listed(shelf, **query)


def test_number_of_statements_does_not_grow_with_the_rows(book: Logbook) -> None:
    from sqlalchemy import event

    def statements() -> int:
        seen: list[str] = []
        with book.catalog.reading() as reader:
            event.listen(reader._connection, "before_cursor_execute", lambda *given: seen.append(given[2]))
            reader.versions(VersionQuery(all_versions=True))
        return len(seen)

    book.publish("a")
    few = statements()
    for name in "bcdef":
        book.publish(name, labels={"k": name}, tags=["t"])
    assert statements() == few <= 6


def test_bases(book: Logbook) -> None:
    digest = book.add_base("minilm")
    other = book.add_base("albert", b"other")
    with book.catalog.reading() as reader:
        assert [base.name for base in reader.bases()] == ["albert", "minilm"]
        for text in ("minilm", digest, digest[:12], digest[7:13]):
            assert reader.base(text).digest == digest
        assert [base.name for base in reader.bases_with_digest(other)] == ["albert"]
        for text in ("minilmm", digest[7:12], "sha256:" + "0" * 20, "/models/x"):
            with pytest.raises(NotFoundError, match=text):
                reader.base(text)


def test_ambiguous_base(book: Logbook) -> None:
    for name, rest in (("a", "1"), ("b", "2")):
        numbers = {"tensors": 1, "parameters": 1, "bytes": 4, "dtype": "F32", "architecture": None}
        book.add("add", name, "base", digest="sha256:abcdef" + rest * 58, source="/x", revision=None, **numbers)
    with book.catalog.reading() as reader:
        with pytest.raises(UsageError, match=r"a \(abcdef1.*b \(abcdef2"):
            reader.base("abcdef")
        assert reader.base("abcdef1").name == "a"


def test_removed_base_is_gone_until_it_is_added_again(book: Logbook) -> None:
    digest = book.add_base("minilm")
    book.publish("sql", base=digest)
    book.add("remove", "minilm", "base")
    with book.catalog.reading() as reader:
        assert reader.bases() == []
        with pytest.raises(NotFoundError):
            reader.base("minilm")
        assert refs(reader.versions_of_base(digest)) == ["sql@v1"]
    assert resolved(book, "sql").base == BaseReference(None, digest)
    book.add_base("minilm")
    assert resolved(book, "sql").base == BaseReference("minilm", digest)


def test_entries_that_verify_asks_for(book: Logbook) -> None:
    entries = [book.publish("a").digest, book.publish("b").digest]
    entries.append(book.add("remove", "b", numbers=[1], whole=False).digest)
    with book.catalog.reading() as reader:
        assert list(reader.entry_digests()) == sorted(entries)
        (live,) = reader.versions(VersionQuery(all_versions=True))
        assert live.digest == digest_bytes(b"a 1")
        assert [file.digest for file in live.files] == [digest_bytes(b"config")]


def test_stale_head_is_a_conflict(book: Logbook) -> None:
    book.publish("sql")
    stale = book.entry("tag", "sql", tag="a", number=1)
    book.add("tag", "sql", tag="b", number=1)
    with pytest.raises(ConflictError, match="moved on"):
        book.append(stale)
    assert resolved(book, "sql").tags == ["b"]


def test_second_first_entry_of_a_name_is_a_conflict(book: Logbook) -> None:
    first = book.entry("publish", "sql", number=1)
    book.publish("sql")
    content = book.publish("other").content
    with pytest.raises(ConflictError, match="taken"):
        book.append(Entry("adapter", "publish", "sql", None, first.time, "tester", content))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("tag", {"tag": "x", "number": 9}),
        ("tag", {"tag": "x", "number": 2}),
        ("untag", {"tag": "absent"}),
        ("label", {"number": 2, "labels": {"a": "b"}}),
        ("label", {"number": 1}),
        ("metric", {"number": 1, "metrics": {"a": {"deep": 1}}}),
        ("remove", {"numbers": [1, 9], "whole": False}),
        ("publish", {"number": 1}),
        ("publish", {"number": 2, "summary": {}}),
    ],
)
def test_entry_that_contradicts_its_log_is_refused_and_changes_nothing(
    book: Logbook, kind: str, content: dict[str, Any]
) -> None:
    book.publish("sql")
    book.publish("sql")
    book.add("remove", "sql", numbers=[2], whole=False)
    with book.catalog.reading() as reader:
        before = reader.log_state("adapter", "sql")
    with pytest.raises(IntegrityError, match="log entry"):
        book.add(kind, "sql", **content)
    with book.catalog.reading() as reader:
        assert reader.log_state("adapter", "sql") == before
        assert reader.compare(book.entries()) == []


def test_failure_in_the_block_rolls_back(book: Logbook) -> None:
    published = book.publish("other")

    def fail_after_an_entry() -> None:
        with book.catalog.writing() as writer:
            writer.append(replace(published, name="sql"))
            raise KeyError

    with pytest.raises(KeyError):
        fail_after_an_entry()
    assert listed(book) == ["other@v1"]


def test_catalog_of_another_store(book: Logbook) -> None:
    with pytest.raises(IntegrityError, match="another store"):
        Catalog.open(book.catalog.path, "11111111-0000-0000-0000-000000000000")


@pytest.mark.parametrize(("revision", "hint"), [("0000", "loramgr db upgrade"), ("9999", "upgrade loramgr")])
def test_other_schema_is_refused(book: Logbook, revision: str, hint: str) -> None:
    with sqlite3.connect(book.catalog.path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    connection.close()
    with pytest.raises(IncompatibleError, match=revision) as error:
        Catalog.open(book.catalog.path, book.store.uuid)
    assert error.value.hint == hint


@pytest.mark.parametrize("damage", [b"", b"not a database, but long enough to look at" * 20])
def test_damaged_catalog(book: Logbook, damage: bytes) -> None:
    book.catalog.path.write_bytes(damage)
    with pytest.raises(IntegrityError, match=r"catalog\.sqlite3") as error:
        Catalog.open(book.catalog.path, book.store.uuid)
    assert error.value.hint == "loramgr db rebuild"


def test_a_flipped_bit_in_the_schema_is_damage_and_no_bug(book: Logbook) -> None:
    path = book.catalog.path
    with sqlite3.connect(path) as connection:
        statements = [sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master") if sql]
    connection.close()
    sound = path.read_bytes()
    refused = 0
    for statement in statements:
        begin = sound.index(statement.encode())
        for place in range(begin, begin + len(statement), 23):
            path.write_bytes(sound[:place] + bytes([sound[place] | 0x80]) + sound[place + 1 :])
            try:
                with Catalog.open(path, book.store.uuid).reading() as reader:
                    reader.bases()
            except IntegrityError as error:
                refused += "damaged" in str(error) or "no schema" in str(error)
    assert refused > len(statements)


def test_folder_in_place_of_the_catalog(book: Logbook) -> None:
    book.catalog.path.unlink()
    book.catalog.path.mkdir()
    with pytest.raises(UncheckedError):
        Catalog.open(book.catalog.path, book.store.uuid)


def test_lost_catalog_with_a_journal_is_not_made_anew(book: Logbook) -> None:
    book.catalog.path.rename(book.home / "catalog.sqlite3-journal")
    with pytest.raises(IntegrityError, match="journal"):
        Catalog.open(book.catalog.path, book.store.uuid)
    assert not book.catalog.path.exists()
    assert sorted(path.name for path in book.home.iterdir()) == ["catalog.sqlite3-journal", "store"]


def test_locked_catalog(book: Logbook) -> None:
    impatient = Catalog.open(book.catalog.path, book.store.uuid, busy_seconds=0.05)
    with book.catalog.writing():
        with pytest.raises(ConflictError, match="another process"), impatient.writing():
            pass
        with impatient.reading() as reader:
            assert reader.versions() == []


def test_reader_sees_one_state(book: Logbook) -> None:
    published = book.publish("a")
    impatient = Catalog.open(book.catalog.path, book.store.uuid, busy_seconds=0.05)
    with book.catalog.reading() as reader:
        assert refs(reader.versions()) == ["a@v1"]
        with pytest.raises(ConflictError), impatient.writing() as writer:
            writer.append(replace(published, name="b"))
        assert refs(reader.versions()) == ["a@v1"]


APPEND = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from logbook import Logbook
from loramgr.errors import ConflictError
book, done = Logbook(Path(sys.argv[1])), 0
while done < 15:
    try:
        book.publish("shared", message=sys.argv[3])
        done += 1
    except ConflictError:
        pass
"""


def test_two_processes_publish_at_once(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    processes = [subprocess.Popen([sys.executable, "-c", APPEND, tmp_path, here, who]) for who in ("first", "second")]
    assert [process.wait() for process in processes] == [0, 0]
    book = Logbook(tmp_path)
    with book.catalog.reading() as reader:
        versions = reader.log("shared")
        known = set(reader.entry_digests())
        assert reader.compare(entry for entry in book.entries() if entry.digest in known) == []
    assert [version.version for version in versions] == list(range(30, 0, -1))
    assert sorted(version.message for version in versions) == ["first"] * 15 + ["second"] * 15


READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 77
exec "$2" -c '
import sys
from pathlib import Path
from loramgr.catalog.catalog import Catalog
from loramgr.errors import LoramgrError
from loramgr.log import Entry
from loramgr.store.store import Store
home = Path(sys.argv[1])
store = Store.open(home / "store")
catalog = Catalog.open(home / "catalog.sqlite3", store.uuid)
with catalog.reading() as reader:
    assert reader.version("sql").version == 1
try:
    with catalog.writing() as writer:
        writer.append(Entry("base", "remove", "x", None, "", "", {}))
    sys.exit(8)
except LoramgrError as error:
    sys.exit(0 if "read-only" in error.message else 9)
' "$1"
"""


def test_read_only_catalog_is_read_and_refuses_writes_in_words(book: Logbook) -> None:
    book.publish("sql")
    book.catalog.path.chmod(0o444)
    if not os.access(book.catalog.path, os.W_OK):
        with pytest.raises(LoramgrError, match="read-only"):
            book.publish("sql")
        assert resolved(book, "sql").version == 1
        return
    # Root may write any file; only a mount stops it.
    command = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", str(book.home), sys.executable]
    code = subprocess.run(command, check=False).returncode
    if code in (1, 77):
        pytest.skip("this system does not let root mount")
    assert code == 0


def test_a_statement_is_compiled_once_for_all_catalogs(tmp_path: Path) -> None:
    statement = select(func.count()).where(literal_column("7") == 7).select_from(LogTable)
    hits = []
    for name in ("one", "other"):
        book = Logbook(tmp_path / name)
        with open_engine(book.catalog.path).connect() as connection:
            found = connection.execute(statement)
            hits.append(found.context.cache_hit)
            assert found.scalar() == 0
        book.publish("sql")
        with open_engine(book.catalog.path).connect() as connection:
            assert connection.execute(statement).scalar() == 1
    assert hits == [CacheStats.CACHE_MISS, CacheStats.CACHE_HIT]
