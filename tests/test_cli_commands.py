"""Every command on real files: the JSON keys and exit codes that scripts rely on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loramgr.cli.main import run
from loramgr.records import VersionRecord

VERSION_KEYS = {
    "name", "version", "digest", "weights_digest", "base", "method", "format", "rank", "ranks", "alpha", "scaling",
    "target_modules", "parameters", "bytes", "dtype", "files", "parents", "tags", "labels", "metrics", "message",
    "created_at",
}  # fmt: skip
BASE_KEYS = {
    "name", "digest", "source", "revision", "tensors", "parameters", "bytes", "dtype", "architecture", "created_at",
}  # fmt: skip
MODULE_KEYS = {
    "name", "kind", "rank", "alpha", "scaling", "in_features", "out_features", "dtype", "delta_norm",
    "effective_rank",
}  # fmt: skip
MERGE_KEYS = {
    "output", "base_digest", "adapters", "numerics", "modules_merged", "tensors_changed", "tensors_added",
    "tensors_total", "bytes_read", "bytes_written", "device", "kernel", "seconds", "output_digest",
}  # fmt: skip


class Outcome(NamedTuple):
    """What a command line did: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


Call = Callable[..., Outcome]
Read = Callable[..., Any]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function that runs a command line in a home of the test's own."""

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def read(call: Call) -> Read:
    """Return a function that runs a command line with `--json` and returns what it printed."""

    def read(*arguments: str | Path, code: int = 0) -> Any:
        outcome = call(*arguments, "--json")
        assert outcome.code == code, outcome.err
        return json.loads(outcome.out)

    return read


@pytest.fixture
def trained(shared_data: Path) -> Path:
    """Return the folder of adapters trained on the small Llama."""
    return shared_data / "trained" / "tinyllama-char"


@pytest.fixture
def stocked(call: Call, tinyllama_base: Path, trained: Path) -> str:
    """Register the base and two adapters; return the name of the one with two versions."""
    assert call("base", "add", tinyllama_base).code == 0
    for path in (trained / "lic-r8-qv" / "checkpoint-40", trained / "lic-r8-qv", trained / "py-r8-qv"):
        outcome = call("add", path)
        assert outcome.code == 0, outcome.err
    return "lic-r8-qv"


def kind(outcome: Outcome) -> str:
    """Return the kind of the error that a command reported as JSON, stdout being empty."""
    assert outcome.out == ""
    return str(json.loads(outcome.err)["error"]["kind"])


def test_the_record_of_a_version_has_the_keys_of_the_contract() -> None:
    assert {field.name for field in fields(VersionRecord)} == VERSION_KEYS


def test_a_base_from_add_to_remove(read: Read, call: Call, tinyllama_base: Path) -> None:
    added = read("base", "add", tinyllama_base, "--name", "tiny")
    assert added.keys() >= BASE_KEYS
    assert read("base", "list") == [added]
    assert read("base", "show", added["digest"]) == added
    assert read("base", "verify", "tiny") == {"ok": True, "tensors": added["tensors"], "mismatched": []}
    assert kind(call("base", "remove", "tiny", "--json")) == "usage"
    assert (
        read("base", "remove", "tiny", "--dry-run") == read("base", "remove", "tiny", "--yes") == {"removed": ["tiny"]}
    )
    assert read("base", "list") == []


def test_adding_makes_versions_and_the_same_files_are_the_same_version(
    read: Read, call: Call, tinyllama_base: Path, trained: Path
) -> None:
    call("base", "add", tinyllama_base)
    options = ["-m", "first", "--tag", "prod", "--label", "team=a=b", "--metric", "loss=1.585"]
    first = read("add", trained / "lic-r8-qv" / "checkpoint-40", *options)
    assert first.keys() >= VERSION_KEYS | {"created"}
    said = [first[key] for key in ("name", "version", "message", "tags", "labels", "metrics", "created")]
    assert said == ["lic-r8-qv", 1, "first", ["prod"], {"team": "a=b"}, {"loss": 1.585}, True]
    second = read("add", trained / "lic-r8-qv")
    assert (second["version"], second["parents"]) == (2, ["lic-r8-qv@v1"])
    again = read("add", trained / "lic-r8-qv")
    assert (again["version"], again["created"]) == (2, False)


def test_list_and_log_are_lists_of_versions(read: Read, stocked: str) -> None:
    assert [each["name"] for each in read("list")] == ["lic-r8-qv", "py-r8-qv"]
    assert read("list")[0].keys() == VERSION_KEYS
    assert [each["version"] for each in read("log", stocked)] == [2, 1]
    assert len(read("list", "--all-versions")) == 3
    assert len(read("list", "--limit", "1")) == 1
    assert [each["name"] for each in read("list", "--name", "py-*", "--rank", "8", "--method", "lora")] == ["py-r8-qv"]
    assert read("list", "--base", "tinyllama-char") == read("list")


def test_list_filters_by_what_was_said(read: Read, call: Call, stocked: str) -> None:
    for edit in (["metric", f"{stocked}@v1", "acc=0.95"], ["label", f"{stocked}@v1", "state=good", "note="]):
        assert call(*edit).code == 0
    assert [each["version"] for each in read("list", "--metric", "acc>0.9", "--sort", "-metric:acc")] == [1]
    assert [each["version"] for each in read("list", "--label", "state=good")] == [1]
    assert read("list", "--label", "state=good", "--latest-only") == []


def test_edits_show_the_version_as_it_is_afterwards(read: Read, call: Call, stocked: str) -> None:
    first = f"{stocked}@v1"
    assert read("tag", first, "prod")["tags"] == ["prod"]
    assert kind(call("tag", f"{stocked}@v2", "prod", "--json")) == "conflict"
    assert read("tag", f"{stocked}@v2", "prod", "--move")["version"] == 2
    assert read("untag", f"{stocked}@prod")["tags"] == []
    assert read("label", first, "a=1", "b=")["labels"] == {"a": "1", "b": ""}
    assert read("label", first, "--remove", "b")["labels"] == {"a": "1"}
    assert read("metric", first, "acc=0.5")["metrics"] == {"acc": 0.5}
    assert read("metric", first, "--remove", "acc")["metrics"] == {}
    assert read("rename", stocked, "licences")["name"] == "licences"
    assert kind(call("log", stocked, "--json")) == "not_found"


@pytest.mark.parametrize("command", ["label", "metric"])
def test_an_edit_that_says_nothing_is_a_mistake(call: Call, stocked: str, command: str) -> None:
    assert call(command, stocked).code == 2


def test_bind_makes_a_version_with_the_base(read: Read, tinyllama_base: Path, trained: Path) -> None:
    assert read("add", trained / "lic-r8-qv")["base"] is None
    read("base", "add", tinyllama_base)
    bound = read("bind", "lic-r8-qv", "tinyllama-char")
    assert (bound["version"], bound["base"]["name"]) == (2, "tinyllama-char")


def test_remove_asks_shows_and_removes(read: Read, call: Call, stocked: str) -> None:
    assert kind(call("remove", f"{stocked}@v2", "--json")) == "usage"
    removed = {"removed": [f"{stocked}@v2"]}
    assert read("remove", f"{stocked}@v2", "--dry-run") == removed
    assert len(read("log", stocked)) == 2
    assert read("remove", f"{stocked}@v2", "--yes") == removed
    assert len(read("log", stocked)) == 1


def test_a_parent_stays_unless_forced(read: Read, call: Call, stocked: str) -> None:
    assert kind(call("remove", f"{stocked}@v1", "--yes", "--json")) == "conflict"
    assert read("remove", f"{stocked}@v1", "--yes", "--force") == {"removed": [f"{stocked}@v1"]}


def test_inspect_adds_modules_and_whether_it_merges(read: Read, stocked: str, trained: Path) -> None:
    report = read("inspect", stocked, "--spectrum")
    assert report.keys() >= VERSION_KEYS | {"modules", "warnings", "mergeable", "reason"}
    assert (report["mergeable"], report["reason"]) == (True, None)
    assert report["modules"][0].keys() >= MODULE_KEYS | {"spectrum"}
    assert len(report["modules"][0]["spectrum"]) == 8
    on_disk = read("inspect", trained / "lic-r8-qv")
    assert on_disk["weights_digest"] == report["weights_digest"]


def test_export_writes_the_files_as_they_came(read: Read, stocked: str, trained: Path, tmp_path: Path) -> None:
    report = read("export", stocked, tmp_path / "out")
    assert report.keys() == {"output", "files", "notes"}
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (trained / "lic-r8-qv" / file).read_bytes()


def test_merge_to_unmerge(read: Read, call: Call, stocked: str, tmp_path: Path) -> None:
    merged, restored = tmp_path / "merged", tmp_path / "restored"
    report = read("merge", "tinyllama-char", f"{stocked}=0.7", "py-r8-qv=-0.3", "-o", merged, "--verify")
    assert report.keys() >= MERGE_KEYS
    assert [(each["ref"], each["weight"]) for each in report["adapters"]] == [
        ("lic-r8-qv@v2", 0.7),
        ("py-r8-qv@v1", -0.3),
    ]
    status = read("status", merged)
    assert status.keys() >= MERGE_KEYS | {"modified"}
    assert (status["modified"], status["output_digest"]) == ([], report["output_digest"])
    assert read("verify-merge", merged) == {"ok": True, "tensors": report["tensors_total"], "mismatched": []}
    assert call("merge", "tinyllama-char", stocked, "-o", merged).code == 7
    undone = read("unmerge", merged, "-o", restored)
    assert undone == {
        "output": undone["output"],
        "base_digest": report["base_digest"],
        "exact": True,
        "source": "base",
    }
    assert read("base", "add", restored)["digest"] == report["base_digest"]
    assert read("unmerge", merged, "--in-place")["base_digest"] == report["base_digest"]


def test_a_merge_that_was_tampered_with_is_5(read: Read, call: Call, stocked: str, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    read("merge", "tinyllama-char", stocked, "-o", merged)
    flip(merged / "model.safetensors")
    assert read("status", merged)["modified"] != []
    assert read("verify-merge", merged, code=5)["ok"] is False


def test_damage_in_the_store_is_5(read: Read, stocked: str, tmp_path: Path) -> None:
    assert read("verify").keys() >= {"checked", "corrupt", "missing"}
    digest = next(each["digest"] for each in read("inspect", stocked)["files"] if each["path"].endswith("safetensors"))
    blob = next(path for path in (tmp_path / "default-home").rglob("*") if digest[-40:] in path.name)
    blob.chmod(0o644)
    flip(blob)
    report = read("verify", code=5)
    assert any(digest in entry for entry in report["corrupt"])
    assert read("verify", "py-r8-qv")["corrupt"] == []


def test_a_base_that_changed_is_5(read: Read, tinyllama_base: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tinyllama_base, tmp_path / "model", copy_function=shutil.copyfile)
    read("base", "add", model)
    flip(model / "model.safetensors")
    assert read("base", "verify", "model", code=5)["ok"] is False


def test_the_schema_and_the_rebuild(read: Read, stocked: str) -> None:
    schema = read("db", "current")
    assert schema["revision"] == schema["head"]
    assert read("db", "upgrade") == schema
    before = read("list", "--all-versions")
    read("db", "rebuild")
    assert read("list", "--all-versions") == before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["log", "nobody"], 4),
        (["inspect", "lic-r8-qv@v9"], 4),
        (["base", "show", "nobody"], 4),
        (["add", "./no-such-folder"], 4),
        (["status", "./no-such-folder"], 4),
        (["tag", "lic-r8-qv", "Not A Tag"], 2),
        (["tag", "lic-r8-qv", "latest"], 2),
        (["rename", "lic-r8-qv", "../up"], 2),
        (["rename", "lic-r8-qv", "py-r8-qv"], 7),
        (["list", "--metric", "acc"], 2),
        (["list", "--sort", "colour"], 2),
    ],
)
def test_the_exit_code_says_what_went_wrong(call: Call, stocked: str, arguments: list[str], code: int) -> None:
    outcome = call(*arguments, "--json")
    assert (outcome.code, outcome.out) == (code, "")
    assert json.loads(outcome.err)["error"]["message"]


def test_what_does_not_fit_is_6(call: Call, stocked: str, trained: Path, tinygpt2_base: Path, tmp_path: Path) -> None:
    assert call("add", trained / "lic-pissa").code == 6
    assert call("base", "add", tinygpt2_base).code == 0
    outcome = call("merge", "tinygpt2-char", stocked, "-o", tmp_path / "merged")
    assert outcome.code == 6
    assert not (tmp_path / "merged").exists()


def test_people_and_scripts_see_the_same_versions(call: Call, stocked: str) -> None:
    assert "lic-r8-qv@v2" in call("list").out
    assert call("--quiet", "list").out == "lic-r8-qv@v2\npy-r8-qv@v1\n"
    assert call("--quiet", "log", stocked).out == "lic-r8-qv@v2\nlic-r8-qv@v1\n"


def flip(file: Path) -> None:
    """Flip the lowest bit of a file's last byte."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
