"""The table of commands, and what every command has."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click
import pytest

from loramgr import __version__
from loramgr.cli.lazy import LazyGroup
from loramgr.cli.main import cli, run


def contexts(context: click.Context) -> Iterator[click.Context]:
    """Yield every command below a group."""
    group = context.command
    assert isinstance(group, LazyGroup)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        below = click.Context(command, context, name)
        yield below
        if isinstance(command, LazyGroup):
            yield from contexts(below)


EVERY = {each.command_path: each for each in contexts(click.Context(cli, info_name="loramgr"))}


def listed(context: click.Context) -> str:
    assert context.parent is not None
    group = context.parent.command
    assert isinstance(group, LazyGroup)
    return group.table[str(context.info_name)].short_help


@pytest.mark.parametrize("path", EVERY)
def test_the_table_says_what_the_command_says_of_itself(path: str) -> None:
    assert EVERY[path].command.get_short_help_str(limit=200) == listed(EVERY[path])


@pytest.mark.parametrize("path", EVERY)
def test_every_command_has_help_and_every_option_a_sentence(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*path.split()[1:], "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: {path} ")
    options = [parameter for parameter in EVERY[path].command.params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


@pytest.mark.parametrize("path", [path for path, each in EVERY.items() if not isinstance(each.command, click.Group)])
def test_every_command_takes_json_after_its_name(path: str) -> None:
    assert "--json" in {text for parameter in EVERY[path].command.params for text in parameter.opts}


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"loramgr {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lst"], "Did you mean list?"),
        (["base", "shwo"], "Did you mean show?"),
        (["qqq"], "No such command 'qqq'."),
        ([], "Missing command."),
        (["tag", "lic"], "Missing argument 'TAG'."),
        (["merge", "base", "lic"], "Give -o DIR for a new folder, or --in-place."),
        (["merge", "base", "lic", "-o", "out", "--in-place"], "Give -o DIR for a new folder, or --in-place."),
        (["switch", "merged"], "Missing argument 'REF[=WEIGHT]...'."),
        (["label", "lic", "colour"], "'colour' is not of the form KEY=VALUE."),
        (["metric", "lic", "acc=high"], "'high' in 'acc=high' is not a number."),
        (["unmerge", "merged", "-o", "base", "--in-place"], "exclude each other"),
    ],
)
def test_a_mistake_is_2_and_says_what_to_do(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    plain = capsys.readouterr()
    assert (plain.out, words in plain.err) == ("", True)
    assert "--help" in plain.err
    assert run([*arguments, "--json"]) == 2
    assert words in json.loads(capsys.readouterr().err)["error"]["message"]
