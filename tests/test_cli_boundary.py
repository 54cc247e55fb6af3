"""Every error becomes words, a hint and the exit code that scripts rely on."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from typing import NoReturn

import click
import pytest

from loramgr import errors
from loramgr.cli.boundary import guarded
from loramgr.errors import ConflictError, LoramgrError

TAKEN = ConflictError("tag prod is taken by sql@v3", "loramgr tag sql@v4 prod --move")


def failing(error: BaseException) -> click.Command:
    """Return a command that raises the error."""

    @click.command()
    @click.option("--json", is_flag=True)
    @click.option("--debug", is_flag=True)
    def command(**_: bool) -> NoReturn:
        raise error

    return command


def reported(error: BaseException, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command that raises the error; return the exit code and what stderr says, stdout being empty."""
    code = guarded(failing(error), arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


@pytest.mark.parametrize("name", errors.__all__)
def test_an_expected_error_is_its_message_its_hint_and_its_code(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error: LoramgrError = getattr(errors, name)("sql@v3 is gone", "loramgr log sql")
    assert reported(error, capsys) == (error.exit_code, "error: sql@v3 is gone\nhint: loramgr log sql\n")


def test_with_json_an_error_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    code, stderr = reported(TAKEN, capsys, "--json")
    assert code == 7
    assert json.loads(stderr) == {"error": {"kind": "conflict", "message": TAKEN.message, "hint": TAKEN.hint}}


def test_an_error_without_a_hint_says_null(capsys: pytest.CaptureFixture[str]) -> None:
    _, stderr = reported(LoramgrError("nothing removed"), capsys, "--json")
    assert json.loads(stderr)["error"]["hint"] is None


def test_only_debug_shows_where_an_expected_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Traceback" not in reported(TAKEN, capsys)[1]
    assert "Traceback" in reported(TAKEN, capsys, "--debug")[1]
    assert "Traceback" in json.loads(reported(TAKEN, capsys, "--debug", "--json")[1])["error"]["traceback"]


@pytest.mark.parametrize(
    ("number", "code", "kind", "words"),
    [
        (errno.ENOSPC, 1, "failed", "disk full"),
        (errno.EROFS, 1, "failed", "not writable"),
        (errno.EACCES, 1, "failed", "not writable"),
        (errno.EIO, 3, "unchecked", "device reports an error"),
        (errno.ENOENT, 4, "not_found", "no such file"),
        (errno.EISDIR, 1, "failed", "Is a directory"),
    ],
)
def test_what_the_system_refuses_is_worded(
    number: int, code: int, kind: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, stderr = reported(OSError(number, "Is a directory", "home/blobs"), capsys, "--json")
    error = json.loads(stderr)["error"]
    assert (found, error["kind"]) == (code, kind)
    assert error["message"].startswith("home/blobs: ")
    assert words in error["message"]


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    code, stderr = reported(KeyboardInterrupt(), capsys)
    assert (code, stderr.strip()) == (130, "interrupted; nothing half done")


def test_anything_else_is_a_bug_and_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, stderr = reported(ZeroDivisionError("division by zero"), capsys)
    assert code == 1
    assert "Traceback" in stderr
    assert "this is a bug in loramgr: ZeroDivisionError: division by zero" in stderr
    assert json.loads(reported(ZeroDivisionError("x"), capsys, "--json")[1])["error"]["kind"] == "bug"


def test_a_mistake_in_the_call_is_2_also_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, stderr = reported(TAKEN, capsys, "--json", "--frobnicate")
    assert code == 2
    assert json.loads(stderr)["error"] == {
        "kind": "usage",
        "message": "No such option '--frobnicate'.",
        "hint": "loramgr --help",
    }


def test_json_after_the_separator_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(TAKEN, capsys, "--", "--json")[1].startswith("error: ")


def test_control_characters_of_a_message_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(LoramgrError("tensor \x1b[2Jq.weight"), capsys)[1] == "error: tensor \\x1b[2Jq.weight\n"


def test_a_reader_that_has_gone_is_no_complaint() -> None:
    code = (
        "import sys; from loramgr.cli.boundary import guarded; import click\n"
        "sys.exit(guarded(click.Command('x', callback=lambda: print('x' * 2_000_000)), []))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_working_folder_that_is_gone_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = reported(FileNotFoundError(errno.ENOENT, "No such file or directory"), capsys)
    assert code == 4
    assert said.startswith("error: the folder that the command was called in is no longer there\nhint: cd . ")
