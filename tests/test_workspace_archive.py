"""A whole home in one archive: it restores elsewhere, and an archive that lies imports nothing."""

from __future__ import annotations

import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from model_files import write_safetensors
from peft_files import write_adapter

from loramgr import (
    AddOptions,
    ConflictError,
    IncompatibleError,
    IntegrityError,
    NotFoundError,
    VersionQuery,
    Workspace,
)
from loramgr.digests import digest_bytes

Members = list[tuple[tarfile.TarInfo, bytes]]
EVERY = VersionQuery(all_versions=True)


@pytest.fixture
def home(tmp_path: Path) -> Workspace:
    """Return a home with a base, two adapters, a removed version and edits."""
    workspace = Workspace(tmp_path / "source")
    write_safetensors(tmp_path / "base" / "model.safetensors", {"m.q.weight": (6, 4)})
    workspace.base_add(tmp_path / "base", "tiny")
    for alpha in (2, 4, 8):
        workspace.add(write_adapter(tmp_path / "x", lora_alpha=alpha), AddOptions(base="tiny"))
    workspace.add(write_adapter(tmp_path / "y", lora_alpha=3), AddOptions(tags=["prod"], message="why"))
    workspace.remove("x@v1", force=True)
    workspace.metric("x@v2", {"acc": 0.5})
    workspace.rename("y", "z")
    return workspace


@pytest.fixture
def archive(home: Workspace, tmp_path: Path) -> Path:
    """Return that home's archive."""
    home.home_export(tmp_path / "home.tar")
    return tmp_path / "home.tar"


@pytest.fixture
def other(tmp_path: Path) -> Workspace:
    """Return another home, which is empty."""
    workspace = Workspace(tmp_path / "other")
    assert workspace.list() == []
    return workspace


def answers(workspace: Workspace) -> list[object]:
    """Return what a home says of everything it has."""
    versions = workspace.list(EVERY)
    assert workspace.verify().corrupt == workspace.verify().missing == []
    return [versions, workspace.log("x"), workspace.history(), workspace.base_list(), workspace.du()]


def files(workspace: Workspace) -> dict[str, bytes]:
    """Return every file of a home's store."""
    root = workspace.home / "store"
    collected = [path for kind in ("blobs", "manifests", "entries") for path in (root / kind).rglob("*")]
    return {str(path.relative_to(root)): path.read_bytes() for path in collected if path.is_file()}


def members(archive: Path) -> Members:
    with tarfile.open(archive, "r:") as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def write(archive: Path, content: Members) -> None:
    """Write members as `tarfile` does, with the two empty blocks that loramgr ends an archive with."""
    blocks = [info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512) for info, data in content]
    archive.write_bytes(b"".join(blocks) + bytes(1024))


def test_an_archive_restores_the_home_elsewhere(home: Workspace, other: Workspace, archive: Path) -> None:
    exported = home.home_export(archive.with_name("again.tar"))
    assert other.home_import(archive) == exported
    assert (exported.versions, exported.bytes) == (3, sum(map(len, files(home).values())))
    assert answers(other) == answers(home)
    assert files(other) == files(home)
    other.export("z@prod", archive.parent / "out")
    assert (archive.parent / "out" / "adapter_config.json").read_bytes() == (
        archive.parent / "y" / "adapter_config.json"
    ).read_bytes()
    other.db_rebuild()
    assert answers(other) == answers(home)


def test_the_same_home_gives_the_same_bytes_and_tar_can_read_them(home: Workspace, archive: Path) -> None:
    home.home_export(archive.with_name("again.tar"))
    assert archive.with_name("again.tar").read_bytes() == archive.read_bytes()
    names = [info.name for info, _ in members(archive)]
    assert names[0] == "loramgr-home.json"
    assert set(names[1:]) == {name[:-63] + name[-62:] for name in files(home)}
    assert not any("cache" in name or "sqlite" in name for name in names)


def test_an_export_takes_no_name_that_is_taken(home: Workspace, archive: Path) -> None:
    before = archive.read_bytes()
    with pytest.raises(ConflictError, match="there is something already"):
        home.home_export(archive)
    assert archive.read_bytes() == before


def test_a_damaged_home_is_not_exported(home: Workspace, tmp_path: Path) -> None:
    blob = home.home / "store" / home_blob(home)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(IntegrityError, match="damaged"):
        home.home_export(tmp_path / "home.tar")
    blob.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        home.home_export(tmp_path / "home.tar")
    assert [path.name for path in tmp_path.iterdir() if "home.tar" in path.name] == []


def home_blob(home: Workspace) -> str:
    digest = home.list()[0].files[1].digest.removeprefix("sha256:")
    return f"blobs/{digest[:2]}/{digest[2:]}"


def test_what_only_removed_versions_need_may_be_gone(home: Workspace, other: Workspace, tmp_path: Path) -> None:
    removed = home.history("x@v1")[-1]
    config = removed.content["summary"]["files"][0]["digest"].removeprefix("sha256:")
    (home.home / "store" / "blobs" / config[:2] / config[2:]).unlink()
    home.home_export(tmp_path / "home.tar")
    other.home_import(tmp_path / "home.tar")
    assert other.list(EVERY) == home.list(EVERY)


def test_importing_again_changes_nothing(home: Workspace, other: Workspace, archive: Path) -> None:
    other.home_import(archive)
    before = (answers(other), files(other))
    again = other.home_import(archive)
    assert (again.versions, again.bytes) == (0, 0)
    assert home.home_import(archive).versions == 0
    assert (answers(other), files(other)) == before


def test_the_longer_log_goes_on(home: Workspace, other: Workspace, archive: Path, tmp_path: Path) -> None:
    other.home_import(archive)
    home.add(write_adapter(tmp_path / "x", lora_alpha=16))
    home.rename("z", "y")
    later = home.home_export(tmp_path / "later.tar")
    imported = other.home_import(tmp_path / "later.tar")
    assert imported.versions == 1
    assert 0 < imported.bytes < later.bytes
    assert answers(other) == answers(home)
    other.home_import(archive)  # what is older is a part of what is here
    assert answers(other) == answers(home)


def test_names_that_were_exchanged_meanwhile(home: Workspace, other: Workspace, archive: Path, tmp_path: Path) -> None:
    other.home_import(archive)
    for old, new in (("x", "free"), ("z", "x"), ("free", "z")):
        home.rename(old, new)
    home.home_export(tmp_path / "later.tar")
    other.home_import(tmp_path / "later.tar")
    assert other.list(EVERY) == home.list(EVERY)


def fork(home: Workspace, other: Workspace, tmp_path: Path) -> str:
    home.metric("x@v2", {"acc": 0.6})
    other.metric("x@v2", {"acc": 0.7})
    return "went on in both places"


def taken(home: Workspace, other: Workspace, tmp_path: Path) -> str:
    other.rename("z", "aside")
    other.add(write_adapter(tmp_path / "z", lora_alpha=7))
    home.metric("z", {"acc": 1})
    return "went on in both places|taken"


@pytest.mark.parametrize("happen", [fork, taken])
def test_what_contradicts_is_refused_and_nothing_changes(
    home: Workspace, other: Workspace, archive: Path, tmp_path: Path, happen: Callable[..., str]
) -> None:
    other.home_import(archive)
    words = happen(home, other, tmp_path)
    home.home_export(tmp_path / "later.tar")
    before = (answers(other), files(other))
    with pytest.raises(ConflictError, match=words):
        other.home_import(tmp_path / "later.tar")
    assert (answers(other), files(other)) == before


def test_a_name_of_another_log_is_refused(other: Workspace, archive: Path, tmp_path: Path) -> None:
    other.add(write_adapter(tmp_path / "x", lora_alpha=9))
    before = (other.list(EVERY), files(other))
    with pytest.raises(ConflictError, match="'x' is taken by another adapter"):
        other.home_import(archive)
    assert (other.list(EVERY), files(other)) == before


def test_a_damaged_blob_here_is_made_good(home: Workspace, other: Workspace, archive: Path) -> None:
    other.home_import(archive)
    blob = other.home / "store" / home_blob(other)
    blob.chmod(0o644)
    blob.write_bytes(b"rot")
    other.home_import(archive)
    assert answers(other) == answers(home)


Change = Callable[[Members], Members]


def last(**values: object) -> Change:
    """Return what gives the header of the last member other values."""

    def change(content: Members) -> Members:
        for name, value in values.items():
            setattr(content[-1][0], name, value)
        return content

    return change


def typed(kind: bytes) -> Change:
    """Return what makes the last member something else than a file."""

    def change(content: Members) -> Members:
        (info, _) = last(type=kind, linkname="/etc/passwd", size=0)(content)[-1]
        return [*content[:-1], (info, b"")]

    return change


def sized(difference: int) -> Change:
    """Return what makes the last member claim another size."""

    def change(content: Members) -> Members:
        content[-1][0].size += difference
        return content

    return change


def flipped(content: Members) -> Members:
    info, data = content[-1]
    return [*content[:-1], (info, bytes([data[0] ^ 1]) + data[1:])]


def miscounted(content: Members) -> Members:
    info, data = content[0]
    data = data.replace(b'"blobs": ', b'"blobs": 1')
    info.size = len(data)
    return [(info, data), *content[1:]]


NAMES = ("../../evil", "/etc/evil", "blobs/../../evil", "cache/aa", f"blobs/{'0' * 63}", f"trash/{'0' * 64}")
LIES: dict[str, Change] = {
    **{name: last(name=name) for name in NAMES},
    "another digest": last(name=f"blobs/{'f' * 64}"),
    "symlink": typed(tarfile.SYMTYPE),
    "hard link": typed(tarfile.LNKTYPE),
    "device": typed(tarfile.CHRTYPE),
    "folder": typed(tarfile.DIRTYPE),
    "too long": sized(512),
    "too short": sized(-1),
    "twice": lambda content: [*content, content[-1]],
    "out of order": lambda content: [*content[:-2], content[-1], content[-2]],
    "one less": lambda content: content[:-1],
    "a flipped bit": flipped,
    "executable": last(mode=0o777),
    "miscounted": miscounted,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_forged_archive_imports_nothing(other: Workspace, archive: Path, lie: str) -> None:
    write(archive, members(archive))
    untouched = archive.read_bytes()
    write(archive, LIES[lie](members(archive)))
    assert archive.read_bytes() != untouched
    before = {path: path.is_file() and path.read_bytes() for path in archive.parent.rglob("*")}
    with pytest.raises(IntegrityError):
        other.home_import(archive)
    after = {path: path.is_file() and path.read_bytes() for path in archive.parent.rglob("*")}
    assert {path for path in before.keys() ^ after.keys() if path.name != "lock"} == set()
    assert other.list() == []


def test_what_write_makes_is_an_archive(other: Workspace, archive: Path) -> None:
    exported = archive.read_bytes()
    write(archive, members(archive))
    assert archive.read_bytes() == exported


def test_every_truncation_and_continuation_is_refused(other: Workspace, archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    changed = tmp_path / "changed.tar"
    for size in (0, 1, 511, 512, 1024, len(data) // 2, len(data) - 1024, len(data) - 512, len(data) - 1):
        changed.write_bytes(data[:size])
        with pytest.raises(IntegrityError):
            other.home_import(changed)
    for more in (b"\0", bytes(512), b"more"):
        changed.write_bytes(data + more)
        with pytest.raises(IntegrityError, match="goes on"):
            other.home_import(changed)
    assert other.list() == []


def test_the_archive_of_a_newer_loramgr_is_refused(other: Workspace, archive: Path) -> None:
    content = members(archive)
    info, data = content[0]
    write(archive, [(info, data.replace(b'"format": 1', b'"format": 2')), *content[1:]])
    with pytest.raises(IncompatibleError, match="newer loramgr"):
        other.home_import(archive)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"adapter_config.json"', b'"../adapter_conf.js"'),
        (b'"path":"adapter_config.json"', b'"path":"adapter_confih.json"'),
        (b'"name":"x"', b'"name":"X"'),
        (b'"kind":"publish"', b'"kind":"polish"'),
    ],
)
def test_entries_that_say_what_no_command_says_are_refused(
    other: Workspace, archive: Path, old: bytes, new: bytes
) -> None:
    """All digests of the forged log are right: only what it says is not."""
    digests: dict[bytes, bytes] = {}
    content: Members = []
    entries = [data for info, data in members(archive) if info.name.startswith("entries")]
    while entries:  # first those whose predecessor is done
        data = next(
            each for each in entries if not any(later is not each and hexdigest(later) in each for later in entries)
        )
        entries.remove(data)
        before = hexdigest(data)
        for was, now in digests.items():
            data = data.replace(was, now)
        data = data.replace(old, new)
        digests[before] = hexdigest(data)
        content.append((info_of(f"entries/{hexdigest(data).decode()}", data), data))
    rest = [(info, data) for info, data in members(archive) if not info.name.startswith("entries")]
    content.sort(key=lambda member: member[0].name)
    size = sum(len(data) for _, data in [*content, *rest[1:]])
    described = rest[0][1][: rest[0][1].index(b'"bytes"')] + b'"bytes": %d}' % size
    write(archive, [(info_of("loramgr-home.json", described), described), *content, *rest[1:]])
    with pytest.raises(IntegrityError):
        other.home_import(archive)
    assert other.list() == []


def hexdigest(data: bytes) -> bytes:
    return digest_bytes(data).removeprefix("sha256:").encode()


def info_of(name: str, data: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o444
    return info


def test_there_has_to_be_an_archive(other: Workspace, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        other.home_import(tmp_path / "absent.tar")
    (tmp_path / "text").write_text("a text of no interest" * 100)
    with pytest.raises(IntegrityError, match="not a home archive"):
        other.home_import(tmp_path / "text")


def test_an_export_is_one_moment_of_a_home_that_others_write_to(home: Workspace, tmp_path: Path) -> None:
    done = threading.Event()

    def go_on() -> None:
        writer, value = Workspace(home.home), 0
        while not done.is_set():
            writer.metric("x@v3", {"step": (value := value + 1)})
            writer.add(write_adapter(tmp_path / "w", lora_alpha=100 + value))

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        for at in range(5):
            home.home_export(tmp_path / f"{at}.tar")
    finally:
        done.set()
        thread.join()
    for at in range(5):
        restored = Workspace(tmp_path / f"restored-{at}")
        restored.home_import(tmp_path / f"{at}.tar")
        assert restored.verify().corrupt == restored.verify().missing == []
        if at:
            restored.home_import(tmp_path / f"{at - 1}.tar")
            assert restored.home_import(tmp_path / f"{at}.tar").versions == 0
