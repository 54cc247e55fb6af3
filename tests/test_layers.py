"""Who may import whom: cli → workspace → the rooms → the modules below, and no room another one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loramgr

ROOMS = {"store", "catalog", "remotes", "formats", "checkpoints", "algebra"}
SOURCES = Path(loramgr.__file__).parent
LOWER = {path.stem for path in SOURCES.glob("*.py") if not path.stem.startswith("__")}
ALLOWED = {
    "": LOWER | {"workspace", ""},
    "__main__": {"cli"},
    "cli": {"cli", "workspace", "records", "errors", "digests", ""},
    "workspace": {"workspace", "", *ROOMS, *LOWER},
    **{room: {room, "", *LOWER} for room in ROOMS},
    **{module: {"", *LOWER} for module in LOWER},
}
HEAVY = {
    "torch": {
        "algebra",
        "checkpoints",
        "formats",
        "tensors",
        "tensorfile",
        "pickles",
        "products",
        "views",
        "workspace",
    },
    "gguf": {"formats"},
    "numpy": set(),
    "transformers": set(),
    "peft": set(),
    "sqlalchemy": {"catalog"},
    "alembic": {"catalog"},
    "huggingface_hub": {"checkpoints", "workspace", "remotes"},
    "obstore": {"remotes"},
    "boto3": {"remotes"},
    "click": {"cli"},
    "matplotlib": {"workspace"},
}


def area(module: str) -> str:
    """`loramgr.store.blobs` → `store`; the package itself is the empty text."""
    return [*module.split("."), ""][1]


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield every import, at the top or inside a function, as line and absolute name."""
    home = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = [*home[: len(home) - node.level + 1]] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            # `from loramgr import store` imports loramgr.store.
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def violations(root: Path) -> list[str]:
    """Return every import that the layers forbid, as `file:line imports name`."""
    found: list[str] = []
    known = {path.stem if path.is_file() else path.name for path in (root / "loramgr").iterdir()}
    for path in sorted((root / "loramgr").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        for line, name in imported(ast.parse(path.read_text()), module, is_package):
            top = name.split(".")[0]
            target = area(name) if area(name) in known else ""
            forbidden = target not in ALLOWED[area(module)] if top == "loramgr" else not _may(area(module), top)
            if forbidden:
                found.append(f"{path.relative_to(root)}:{line} imports {name}")
    return found


def _may(room: str, package: str) -> bool:
    return package not in HEAVY or room in HEAVY[package]


def top_level(tree: ast.AST) -> Iterator[str]:
    """Yield what importing a module imports: not inside functions, not under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name.split(".")[0] for name in names)
        elif not (isinstance(node, ast.FunctionDef) or _for_type_checkers(node)):
            yield from top_level(node)


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def test_every_import_follows_the_layers(root: Path) -> None:
    assert violations(root) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("store/blobs.py", "from loramgr.catalog import tables"),
        ("store/blobs.py", "def f():\n    from loramgr import catalog"),
        ("formats/peft.py", "from ..algebra import merge"),
        ("catalog/tables.py", "import torch"),
        ("cli/main.py", "import loramgr.store.blobs"),
        ("digests.py", "import loramgr.workspace"),
        ("workspace/home.py", "import click"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    for room in ("store", "catalog", "algebra", "formats", "cli", "workspace"):
        (tmp_path / "loramgr" / room).mkdir(parents=True)
    (tmp_path / "loramgr" / file).write_text(line)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize("package", ["torch", "alembic", "huggingface_hub", "matplotlib", "obstore", "boto3"])
def test_heavy_packages_are_imported_where_they_are_used(root: Path, package: str) -> None:
    # What these do is torch through and through; others import them inside functions.
    computing = {"algebra", "tensors.py"} if package == "torch" else set()
    loads = [
        path
        for path in sorted((root / "loramgr").rglob("*.py"))
        if path.relative_to(root / "loramgr").parts[0] not in computing | {"migrations"}
        and package in top_level(ast.parse(path.read_text()))
    ]
    assert loads == []


def test_one_module_draws(root: Path) -> None:
    drawing = {
        path.name
        for path in (root / "loramgr").rglob("*.py")
        for _, name in imported(ast.parse(path.read_text()), "loramgr", is_package=True)
        if name.split(".")[0] == "matplotlib"
    }
    assert drawing == {"plotting.py"}


def test_every_module_is_of_a_readable_size(root: Path) -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (root / "loramgr").rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
