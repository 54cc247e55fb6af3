"""The documentation is what the program does: its commands run, its outputs are real, its vectors are right."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loramgr import Workspace, errors
from loramgr.cli.main import COMMANDS

# The bytes of each tensor that docs/digests.md speaks of, as its text gives them.
VECTORS = {
    "a": "0000803f000000400000404000008040",
    "b.weight": "803f00c0",
    "empty": "",
    "scalar": "ffffffffffffffff",
    'é"': "07",
}


def run(command: Sequence[str | Path], **place: Any) -> str:
    """Run a command that must succeed; return its stdout."""
    done = subprocess.run(command, **place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tour(root: Path, minilm_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Return a folder with the examples, and the environment in which `loramgr` is this project's."""
    folder = tmp_path_factory.mktemp("a tour")
    shutil.copytree(root / "examples", folder / "examples")
    command = folder / "bin" / "loramgr"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m loramgr "$@"\n')
    command.chmod(0o755)
    paths = {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(root), "MODEL": str(minilm_base)}
    return folder, os.environ | paths | {"LORAMGR_HOME": str(folder / "tour-home")}


def commands(block: str) -> list[tuple[str, list[str]]]:
    """Split a console block into its commands, each with the lines of output that the README shows."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def test_the_tour_and_the_library_example_run_and_print_what_the_readme_shows(
    readme: str, tour: tuple[Path, dict[str, str]]
) -> None:
    folder, environment = tour
    lines = [each for block in blocks(readme, "console") for each in commands(block)]
    assert len(lines) > 20
    for line, shown in lines:
        printed = run(["bash", "-c", line], cwd=folder, env=environment).splitlines()
        assert not shown or [text for text in printed if text in shown] == shown, line
    for code in blocks(readme, "python"):
        run([sys.executable, "-c", code], cwd=folder, env=environment)


def test_the_tour_has_every_area_of_the_commands(readme: str) -> None:
    lines = [line for block in blocks(readme, "console") for line, _ in commands(block)]
    seen = {word for line in lines for word in line.split()[1:3]}
    assert set(COMMANDS) - seen - {"bind", "untag"} == set()


def test_the_reference_is_what_the_commands_say(root: Path) -> None:
    generate = root / "docs" / "generate.py"
    assert run([sys.executable, generate, "--check"], env=os.environ | {"PYTHONPATH": str(root)}) == ""


def test_the_readme_lists_the_exit_code_of_every_error(readme: str) -> None:
    table = readme.split("## Exit codes")[1]
    codes = {getattr(errors, name).exit_code for name in errors.__all__}
    assert {code for code in codes if f"\n| {code} | " not in table} == set()


def test_the_readme_promises_the_names_that_exist(readme: str, root: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme)
    assert targets
    assert [target for target in targets if not (root / target).exists()] == []


def test_the_digest_vectors_follow_from_their_definition_alone(root: Path) -> None:
    page = (root / "docs" / "digests.md").read_text(encoding="utf-8")
    vectors = page.split("### Test vectors")[1].split("### A real model")[0]
    checked = 0
    for block in blocks(vectors, "text"):
        *lines, digest = block.splitlines()
        assert digest == "sha256:" + hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
        names = [json.loads(line)[0] for line in lines]
        assert names == sorted(names, key=str.encode)
        assert [json.loads(line)[3] for line in lines] == [
            hashlib.sha256(bytes.fromhex(VECTORS[name])).hexdigest() for name in names
        ]
        checked += 1
    assert checked == 4


def plain(value: Any) -> Any:
    """Write whole numbers without a point, which is all that RFC 8785 and json.dumps differ in here."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def test_the_version_digest_follows_from_the_files(root: Path, minilm_base: Path, tmp_path: Path) -> None:
    folder = root / "examples" / "minilm" / "lic-r8-qv"
    workspace = Workspace(tmp_path)
    base = workspace.base_add(minilm_base, name="minilm").digest
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    contents = {path.name: path.read_bytes() for path in sorted(folder.glob("adapter_*"))}
    manifest = {
        "schema": 1,
        "method": "lora",
        "files": [
            {"path": name, "digest": "sha256:" + hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in contents.items()
        ],
        "config": {key: plain(value) for key, value in config.items()},
        "base": base,
    }
    data = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    assert workspace.add(folder).digest == digest
    page = (root / "docs" / "digests.md").read_text(encoding="utf-8")
    assert blocks(page.split("### Test vector\n")[1], "text") == [digest + "\n"]
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == data]


def test_the_digest_of_minilm_follows_from_its_bytes(root: Path, minilm_base: Path) -> None:
    data = (minilm_base / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    lines = []
    for name in sorted(header.keys() - {"__metadata__"}, key=str.encode):
        begin, end = header[name]["data_offsets"]
        content = hashlib.sha256(data[start + begin : start + end]).hexdigest()
        entry = [name, header[name]["dtype"], header[name]["shape"], content]
        lines.append(json.dumps(entry, separators=(",", ":")) + "\n")
    digest = "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()
    page = (root / "docs" / "digests.md").read_text(encoding="utf-8")
    assert f"{len(lines)} tensors:\n\n```text\n{digest}\n```" in page
