"""What a command may import, looked at in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import json, sys
from loramgr.cli.main import run
code = run(sys.argv[1:])
print(json.dumps({"code": code, "modules": sorted({name.split(".")[0] for name in sys.modules})}), file=sys.stderr)
"""
HEAVY = {"alembic", "huggingface_hub", "numpy", "sqlalchemy", "torch", "tqdm", "transformers"}


def imports(*arguments: str, home: Path, **environment: str) -> set[str]:
    """Run a command line and return the heavy packages that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"LORAMGR_HOME": str(home)} | environment,
    )
    outcome = json.loads(done.stderr.splitlines()[-1])
    assert outcome["code"] == 0, done.stderr
    return HEAVY & set(outcome["modules"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Return a home with one adapter, made by another process."""
    home = tmp_path_factory.mktemp("home")
    adapter = root / "examples" / "minilm" / "lic-r8-qv"
    command = [sys.executable, "-m", "loramgr", "--home", home, "add", adapter, "--name", "lic"]
    subprocess.run(command, check=True, capture_output=True)
    return home


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["base", "--help"], ["merge", "--help"], ["db", "-h"]]
)
def test_help_and_version_import_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    assert imports(*arguments, home=tmp_path) == set()
    assert list(tmp_path.iterdir()) == []


def test_completion_imports_nothing_heavy(tmp_path: Path) -> None:
    words = {"_LORAMGR_COMPLETE": "bash_complete", "COMP_WORDS": "loramgr merge --ver", "COMP_CWORD": "2"}
    code = f"import atexit\natexit.register(lambda: print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr))\n"
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + code + RUN],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | words,
    )
    assert done.stdout == "plain,--verify\n"
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["log", "lic", "--json"], ["tag", "lic", "prod", "--move"], ["label", "lic", "a=b"], ["base", "list"]],
)
def test_catalog_commands_import_neither_torch_nor_alembic(home: Path, arguments: list[str]) -> None:
    assert imports(*arguments, home=home) <= {"sqlalchemy"}


def test_the_check_can_fail(home: Path) -> None:
    assert "torch" in imports("inspect", "lic", home=home)
