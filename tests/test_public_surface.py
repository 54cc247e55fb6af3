"""What `import loramgr` offers, and that it costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import loramgr
from loramgr import errors, records


def test_every_public_name_can_be_imported() -> None:
    assert {name for name in loramgr.__all__ if getattr(loramgr, name, None) is None} == set()


def test_the_package_offers_the_workspace_with_its_options_the_records_and_the_errors() -> None:
    own = {
        "AddOptions",
        "ComposeOptions",
        "ExtractOptions",
        "MergeOptions",
        "PullOptions",
        "PushOptions",
        "ReadHints",
        "ResizeOptions",
        "Retention",
        "VersionQuery",
        "Workspace",
        "__version__",
    }
    live = {"Composition", "LiveModel", "attach"}
    assert set(loramgr.__all__) == own | live | set(errors.__all__) | set(records.__all__)


def test_what_type_checkers_see_is_what_the_package_offers(root: Path) -> None:
    tree = ast.parse((root / "loramgr" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in ast.walk(block) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(loramgr.__all__) - {"__version__"}
    assert loramgr.__dir__() == sorted(loramgr.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Repository'"):
        loramgr.Repository  # noqa: B018


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    code = "import sys, loramgr; print(sorted(m for m in sys.modules if m.startswith('loramgr.')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_has_a_code_a_kind_and_words(name: str) -> None:
    error = getattr(errors, name)("it broke", "loramgr list")
    assert error.exit_code in {1, 2, 3, 4, 5, 6, 7}
    assert error.kind
    assert (str(error), error.hint) == ("it broke", "loramgr list")


def test_every_module_says_what_it_offers(root: Path) -> None:
    silent = []
    for path in sorted((root / "loramgr").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        if path.stem.startswith("__") or "migrations" in path.parts:
            continue
        module = import_module(name)
        missing = [public for public in getattr(module, "__all__", ()) if not hasattr(module, public)]
        if not hasattr(module, "__all__") or missing or not module.__doc__:
            silent.append(name)
    assert silent == []
