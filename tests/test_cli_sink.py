"""Data on stdout, everything else on stderr; one JSON document; nothing destroyed without an answer."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field

import click
import pytest

from loramgr.cli.sink import Mode, Sink, printable
from loramgr.errors import LoramgrError, UsageError
from loramgr.records import ExportReport, MergeCheck, Removal

EXPORT = ExportReport("out/sql", ["adapter_config.json", "adapter_model.safetensors"], ["alpha is implied"])


@dataclass(frozen=True)
class Warned:
    """A record with warnings."""

    name: str = "sql"
    warnings: list[str] = field(default_factory=lambda: ["every lora_B is zero"])


class Terminal(io.StringIO):
    """Standard input on a terminal."""

    def isatty(self) -> bool:
        return True


def test_json_is_one_document_and_the_notes_are_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Sink("json").show(EXPORT)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"output": "out/sql", "files": EXPORT.files, "notes": EXPORT.notes}
    assert captured.err == "note: alpha is implied\n"


def test_a_list_is_a_json_list_even_when_empty(capsys: pytest.CaptureFixture[str]) -> None:
    Sink("json").show([])
    Sink("json").show([Removal(["sql@v1"])])
    assert capsys.readouterr().out == '[]\n[\n  {\n    "removed": [\n      "sql@v1"\n    ]\n  }\n]\n'


def test_people_see_lines_and_quiet_only_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    Sink("human").show(EXPORT)
    assert capsys.readouterr().out.startswith("output  out/sql\nfiles ")
    Sink("quiet").show(EXPORT)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("out/sql\n", "")


@pytest.mark.parametrize("mode", ["human", "json", "quiet"])
def test_warnings_are_never_silent(mode: Mode, capsys: pytest.CaptureFixture[str]) -> None:
    Sink(mode).show(Warned())
    assert capsys.readouterr().err == "warning: every lora_B is zero\n"


def test_nothing_found_is_said_beside_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    Sink("human").show([])
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "nothing found\n")


def test_a_check_that_fails_is_shown_and_ends_with_5(capsys: pytest.CaptureFixture[str]) -> None:
    with click.Context(click.Command("verify-merge")), pytest.raises(click.exceptions.Exit) as ended:
        Sink("json").verdict(MergeCheck(False, 2, ["q.weight"]), False)
    assert ended.value.exit_code == 5
    assert json.loads(capsys.readouterr().out) == {"ok": False, "tensors": 2, "mismatched": ["q.weight"]}
    Sink("json").verdict(MergeCheck(True, 2, []), True)


def test_without_a_terminal_only_yes_is_an_answer() -> None:
    Sink("human").confirm(["sql@v1"], yes=True)
    with pytest.raises(UsageError, match="this removes sql@v1, sql@v2") as refused:
        Sink("human").confirm(["sql@v1", "sql@v2"], yes=False)
    assert "--yes" in str(refused.value.hint)


@pytest.mark.parametrize(("answer", "goes_on"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_on_a_terminal_the_person_is_asked(answer: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    monkeypatch.setattr("sys.stderr", Terminal())
    if goes_on:
        Sink("human").confirm(["sql@v1"], yes=False)
    else:
        with pytest.raises(LoramgrError, match="nothing removed"):
            Sink("human").confirm(["sql@v1"], yes=False)


def test_control_characters_are_escaped_and_line_ends_kept() -> None:
    assert printable("a\x1b]0;title\x07\nβ") == "a\\x1b]0;title\\x07\nβ"
