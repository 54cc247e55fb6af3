"""The wheel, installed elsewhere: it brings its migrations and works outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without the checkout on any path; return its stdout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LORAMGR"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built without the network."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, root, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` of an environment with the wheel in it; what it depends on is found in ours."""
    folder = tmp_path_factory.mktemp("an environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    # After the environment's own packages, so the checkout's editable install is not what runs.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return python.parent


def test_the_wheel_has_the_migrations_the_types_and_the_licence_and_nothing_else_of_ours(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"loramgr/migrations/env.py", "loramgr/py.typed"} <= set(names)
    assert [name for name in names if name.startswith("loramgr/migrations/versions/0001")]
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"loramgr"}


def test_the_installed_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import loramgr; print(loramgr.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))
    assert run(installed / "loramgr", "--help", cwd=tmp_path).startswith("Usage: loramgr ")
    home = tmp_path / "home"
    schema = json.loads(run(installed / "loramgr", "--home", home, "--json", "db", "upgrade", cwd=tmp_path))
    assert schema["revision"] == schema["head"]
    assert json.loads(run(installed / "loramgr", "--home", home, "--json", "list", cwd=tmp_path)) == []
