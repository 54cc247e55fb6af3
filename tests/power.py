"""A model of what a disk holds after a power cut: what a process wrote, less any of it that was not yet synced.

The journal is taken from a real run, by strace. A write to a file is safe once that file was synced after it; a name,
new or gone, once its folder was. All else may be on the disk or not, each for itself, and a write in part.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TRACED = (
    *("open", "openat", "creat", "write", "writev", "pwrite64", "pwritev", "ftruncate", "truncate", "fallocate"),
    *("copy_file_range", "sendfile", "fsync", "fdatasync", "sync", "syncfs", "sync_file_range", "symlink", "symlinkat"),
    *("rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir"),
)
_NAMING = (
    *("mkdir", "mkdirat", "rmdir", "unlink", "unlinkat", "link", "linkat", "rename", "renameat", "renameat2"),
    *("symlink", "symlinkat"),
)
OPTIONS = ["-y", "-xx", "-s", str(1 << 24), "-e", f"trace={','.join(TRACED)}"]
SECTOR = 512
NOTHING = "nothing unsynced is there"

_LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+)", re.DOTALL)
_ARGUMENT = re.compile(r'"(?:[^"\\]|\\.)*"|[^,<"]+(?:<[^>]*>)?')
_NUMBER = re.compile(r"\d+")
_UNFINISHED, _RESUMED = re.compile(r"(\d+) +(.*) <unfinished \.\.\.>$"), re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)$")


@dataclass(eq=False)
class Node:
    """A file or folder, whatever its names; `source` is where its content was before the run, None for a new one."""

    source: Path | None = None
    names: dict[str, Node] | None = None


@dataclass(frozen=True)
class Write:
    """Bytes put at an offset of a file; data of None changes its size to `offset`."""

    node: Node
    offset: int
    data: bytes | None


@dataclass(frozen=True)
class Naming:
    """Entries of folders that change together; a node of None takes the name away."""

    edits: tuple[tuple[Node, str, Node | None], ...]


@dataclass(frozen=True)
class Sync:
    """A file or folder made durable; None is the whole file system."""

    node: Node | None


Step = Write | Naming | Sync
Keeps = Callable[[Step], bool | int]


@dataclass
class Journal:
    """What happened below a folder, in order; `root` is the folder as it was before."""

    root: Node
    steps: list[Step] = field(default_factory=list)

    @classmethod
    def read(cls, log: Path, folder: Path, before: Path) -> Journal:
        """Read strace's log of a run in `folder`, which was a copy of the folder `before`."""
        reading = _Reading(cls(_load(before)), folder)
        for call, arguments, result in _calls(log.read_text()):
            reading.follow(call, arguments, result)
        return reading.journal

    def restore(self, length: int, keeps: Keeps, target: Path) -> None:
        """Write the disk after the first `length` steps; of those that were not synced, the ones that `keeps` names.

        For a write `keeps` may return how many of its bytes are on the disk.
        """
        steps, safe = self.steps[:length], self._safe(length)
        contents: dict[int, bytearray] = {}
        folders: dict[int, dict[str, Node]] = {}
        for step in steps:
            if isinstance(step, Write):
                kept = len(step.data or b"") + 1 if (id(step.node), id(step)) in safe else int(keeps(step))
                _write(contents.setdefault(id(step.node), _content(step.node)), step, kept)
            elif isinstance(step, Naming):
                kept_whole = keeps(step)
                for folder, name, node in step.edits:
                    if kept_whole or (id(folder), id(step)) in safe:
                        entries = folders.setdefault(id(folder), dict(folder.names or {}))
                        entries.pop(name, None)
                        entries.update({name: node} if node is not None else {})
        _lay_out(self.root, target, contents, folders, {})

    def _safe(self, length: int) -> set[tuple[int, int]]:
        """Return the steps that were synced, each with the file or folder it was synced in."""
        safe: set[tuple[int, int]] = set()
        waiting: dict[int, list[int]] = {}
        for step in self.steps[:length]:
            if isinstance(step, Sync):
                for node in [*waiting] if step.node is None else [id(step.node)]:
                    safe.update((node, each) for each in waiting.pop(node, ()))
            else:
                nodes = [step.node] if isinstance(step, Write) else [folder for folder, _, _ in step.edits]
                for node in nodes:
                    waiting.setdefault(id(node), []).append(id(step))
        return safe


def fates(seed: str, rounds: int) -> Iterator[tuple[str, Keeps]]:
    """Yield ways in which a disk may treat what was not synced, each with its name."""
    yield NOTHING, lambda step: 0
    yield "names without data", lambda step: isinstance(step, Naming)
    yield "data without names", lambda step: len(step.data or b"") + 1 if isinstance(step, Write) else 0
    for number in range(rounds):
        yield f"at random {number}", _at_random(random.Random(f"{seed} {number}"))


def _at_random(generator: random.Random) -> Keeps:
    def keeps(step: Step) -> bool | int:
        if isinstance(step, Naming):
            return generator.random() < 0.5
        assert isinstance(step, Write)
        size = len(step.data or b"")
        return generator.choice([0, size + 1, generator.randrange(size // SECTOR + 1) * SECTOR])

    return keeps


def _write(content: bytearray, step: Write, kept: int) -> None:
    if step.data is None:
        if kept:
            del content[step.offset :]
            content.extend(bytes(step.offset - len(content)))
        return
    data = step.data[:kept]
    if data:
        content.extend(bytes(max(0, step.offset - len(content))))
        content[step.offset : step.offset + len(data)] = data


def _content(node: Node) -> bytearray:
    return bytearray(node.source.read_bytes() if node.source is not None else b"")


def _lay_out(
    node: Node,
    target: Path,
    contents: dict[int, bytearray],
    folders: dict[int, dict[str, Node]],
    placed: dict[int, Path],
) -> None:
    """Write files and folders; `placed` are the files that have a name by now: a second one becomes a link."""
    if node.names is None:
        if id(node) in placed:
            target.hardlink_to(placed[id(node)])
        else:
            target.write_bytes(contents[id(node)] if id(node) in contents else _content(node))
        placed[id(node)] = target
        return
    target.mkdir()
    for name, child in folders.get(id(node), node.names).items():
        _lay_out(child, target / name, contents, folders, placed)


def _load(path: Path) -> Node:
    if path.is_dir():
        return Node(names={child.name: _load(child) for child in path.iterdir()})
    return Node(source=path)


class _Reading:
    """Follows the calls: which node has which name by now."""

    def __init__(self, journal: Journal, folder: Path) -> None:
        self.journal = journal
        self._folder = folder
        self._now: dict[int, dict[str, Node]] = {}
        self._offsets: dict[tuple[str, int], int] = {}

    def follow(self, call: str, arguments: list[str], result: int) -> None:
        """Note what a call did that gave `result`; NotImplementedError for one that this model does not know."""
        if result < 0:
            return
        if call in ("sync", "syncfs"):
            self.journal.steps.append(Sync(None))
        elif call in ("open", "openat", "creat"):
            self._open(call, arguments)
        elif call in _NAMING:
            self._rename(call, _paths(arguments), arguments)
        elif call in ("sendfile", "copy_file_range"):
            self._copy(call, arguments, result)
        elif node := self._find(_described(arguments[0])):
            self._change(call, node, arguments, result)

    def _change(self, call: str, node: Node, arguments: list[str], result: int) -> None:
        if call in ("fsync", "fdatasync"):
            self.journal.steps.append(Sync(node))
        elif call in ("write", "pwrite64"):
            self._write(call, node, arguments, result)
        elif call == "ftruncate":
            self.journal.steps.append(Write(node, int(arguments[1]), None))
        elif call == "sync_file_range":
            return  # it begins to write, and promises nothing
        elif call == "fallocate":
            self._reserve(node, int(arguments[2]) + int(arguments[3]))
        else:
            raise NotImplementedError(f"{call}({arguments})")

    def _open(self, call: str, arguments: list[str]) -> None:
        path, flags = _paths(arguments)[0], arguments[2 if call == "openat" else 1]
        if self._place(path) is None:
            return
        node = self._find(path)
        if node is None and "O_CREAT" in flags:
            node = Node()
            self._name([(path, node)])
        elif node is not None and "O_TRUNC" in flags and node.names is None:
            self.journal.steps.append(Write(node, 0, None))
        self._offsets = {key: offset for key, offset in self._offsets.items() if key[1] != id(node)}

    def _write(self, call: str, node: Node, arguments: list[str], result: int) -> None:
        key = (arguments[0].partition("<")[0], id(node))
        offset = int(arguments[3]) if call == "pwrite64" else self._offsets.get(key, 0)
        self.journal.steps.append(Write(node, offset, _decoded(arguments[1])[:result]))
        if call == "write":
            self._offsets[key] = offset + result

    def _reserve(self, node: Node, size: int) -> None:
        """Note that a file became longer, unless it is as long."""
        length = len(self._read_node(node))
        if size > length:
            self.journal.steps.append(Write(node, size, None))

    def _copy(self, call: str, arguments: list[str], result: int) -> None:
        """Note a copy in the kernel, whose offsets strace prints as they were and as they are after it."""
        source, start, target, end = arguments[1], arguments[2], arguments[0], ""
        if call == "copy_file_range":
            source, start, target, end = arguments[:4]
        node = self._find(_described(target))
        if node is None:
            return
        key = (target.partition("<")[0], id(node))
        offset = int(_NUMBER.findall(end)[0]) if end else self._offsets.get(key, 0)
        begin = int(_NUMBER.findall(start)[0])
        data = self._read(_described(source))[begin : begin + result]
        self.journal.steps.append(Write(node, offset, bytes(data)))
        if not end:
            self._offsets[key] = offset + result

    def _read(self, path: Path | None) -> bytearray:
        """Return what a file holds by now."""
        node = self._find(path)
        if node is None:
            assert path is not None
            return bytearray(path.read_bytes())
        return self._read_node(node)

    def _read_node(self, node: Node) -> bytearray:
        content = _content(node)
        for step in self.journal.steps:
            if isinstance(step, Write) and step.node is node:
                _write(content, step, len(step.data or b"") + 1)
        return content

    def _rename(self, call: str, paths: list[Path], arguments: list[str]) -> None:
        if any(self._place(path) is None for path in paths):
            return
        if call.startswith("symlink"):
            raise NotImplementedError(f"{call}({arguments})")
        nodes = [self._find(path) for path in paths]
        if call.startswith("mkdir"):
            self._name([(paths[0], Node(names={}))])
        elif call in ("rmdir", "unlink", "unlinkat"):
            self._name([(paths[0], None)])
        elif call.startswith("link"):
            self._name([(paths[1], nodes[0])])
        elif "RENAME_EXCHANGE" in arguments[-1]:
            self._name([(paths[0], nodes[1]), (paths[1], nodes[0])])
        else:
            self._name([(paths[0], None), (paths[1], nodes[0])])

    def _name(self, changes: list[tuple[Path, Node | None]]) -> None:
        edits = []
        for path, node in changes:
            folder = self._place(path)
            assert folder is not None
            entries = self._entries(folder)
            entries.pop(path.name, None)
            entries.update({path.name: node} if node is not None else {})
            edits.append((folder, path.name, node))
        self.journal.steps.append(Naming(tuple(edits)))

    def _entries(self, folder: Node) -> dict[str, Node]:
        return self._now.setdefault(id(folder), dict(folder.names or {}))

    def _place(self, path: Path | None) -> Node | None:
        """Return the folder that a path is in, None when it is elsewhere."""
        if path is None or not path.is_relative_to(self._folder) or path == self._folder:
            return None
        return self._find(path.parent)

    def _find(self, path: Path | None) -> Node | None:
        if path is None or not path.is_relative_to(self._folder):
            return None
        node: Node | None = self.journal.root
        for part in path.relative_to(self._folder).parts:
            node = self._entries(node).get(part) if node is not None and node.names is not None else None
        return node


def _calls(text: str) -> Iterator[tuple[str, list[str], int]]:
    """Yield the name, arguments and result of each call, in the order in which they ended."""
    begun: dict[str, str] = {}
    for line in text.splitlines():
        whole = line
        if match := _UNFINISHED.match(line):
            begun[match[1]] = match[2]
            continue
        if match := _RESUMED.match(line):
            whole = f"{match[1]} {begun.pop(match[1])}{match[2]}"
        if match := _LINE.match(whole):
            yield (
                match[2],
                [argument for each in _ARGUMENT.findall(match[3]) if (argument := each.strip())],
                int(match[4]),
            )


def _decoded(text: str) -> bytes:
    return bytes.fromhex(text.strip('"').replace("\\x", ""))


def _described(argument: str) -> Path | None:
    """Return the path of an open file that strace printed as `number<path>`."""
    _, _, path = argument.partition("<")
    return Path(_decoded(path.rstrip(">")).decode()) if path else None


def _paths(arguments: list[str]) -> list[Path]:
    """Return the paths a call names, each absolute: the `…at` calls say which folder theirs are relative to."""
    found, start = [], None
    for argument in arguments:
        if argument.startswith('"'):
            path = Path(_decoded(argument).decode())
            found.append(path if start is None else start / path)
            start = None
        elif "<" in argument:
            start = _described(argument)
    return found
