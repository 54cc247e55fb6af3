"""What `inspect` says of paths that are no adapters, and that it needs neither torch nor time for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from foreign_files import write_mlx_folder
from peft_files import write_adapter

from loramgr import FileReport, IncompatibleError, InspectReport, IntegrityError, NotFoundError, Workspace
from loramgr.tensorfile import TensorSpec, encode_header

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("home"))


def told(workspace: Workspace, path: Path) -> FileReport:
    report = workspace.inspect(str(path))
    assert isinstance(report, FileReport)
    assert not report.mergeable
    return report


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("adapter_model.safetensors", POINTER, "git-lfs-pointer"),
        ("x.pt", b"", "empty"),
        ("notes.md", "Grüße".encode(), "text"),
        ("tokenizer.json", b'{"version": "1.0"}', "tokenizer"),
        ("config.json", b'{"model_type": "llama"}', "model-configuration"),
        ("x.json", b"[1]", "json"),
        ("optimizer.pt", b"\x80\x04.", "training-state"),
        ("training_args.bin", b"PK\x03\x04", "training-state"),
        ("x.gz", b"\x1f\x8b\x08", "archive"),
    ],
)
def test_by_the_first_bytes(workspace: Workspace, tmp_path: Path, name: str, data: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert told(workspace, tmp_path / name).kind == kind


def test_archives(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "a", "a")
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        file.add(tmp_path / "a", "a")
    assert {told(workspace, tmp_path / f"x.{end}").kind for end in ("zip", "tar")} == {"archive"}


def test_pickles(workspace: Workspace, tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    torch.save(torch.optim.Adam(layer.parameters()).state_dict(), tmp_path / "state.bin")
    assert told(workspace, tmp_path / "state.bin").kind == "optimizer-state"
    with pytest.raises(IncompatibleError, match=r"state.bin: not an adapter, but the state of an optimizer$"):
        workspace.add(tmp_path / "state.bin")
    torch.save({"model.embed_tokens.weight": torch.ones(2, 2)}, tmp_path / "model.bin")
    assert told(workspace, tmp_path / "model.bin").kind == "base-model"
    torch.save({"a": [1]}, tmp_path / "other.bin")
    assert told(workspace, tmp_path / "other.bin").kind == "unreadable"


def test_models_and_files_of_nobody(workspace: Workspace, shared_data: Path) -> None:
    base = shared_data / "bases" / "tinyllama-char"
    for path in (base, base / "model.safetensors"):
        report = told(workspace, path)
        assert report.kind == "base-model"
        assert report.hint == f"loramgr base add {path}"
    unknown = told(workspace, shared_data / "found" / "sam-lora-ranks" / "lora_rank4.safetensors")
    assert (unknown.kind, len(unknown.unexplained)) == ("unknown-tensors", 48)
    alone = shared_data / "trained" / "tinyllama-char" / "lic-r8-qv" / "adapter_model.safetensors"
    assert isinstance(workspace.inspect(str(alone)), InspectReport)


def test_an_adapter_has_its_evidence(workspace: Workspace, tmp_path: Path) -> None:
    report = workspace.inspect(str(write_mlx_folder(tmp_path / "adapter")))
    assert isinstance(report, InspectReport)
    assert (report.format, report.method, report.scaling) == ("mlx", "lora", 3.0)
    assert report.evidence[0] == "adapter_config.json has fine_tune_type 'lora' and no peft_type"
    assert len(report.modules) == 4


def test_weights_without_their_configuration(workspace: Workspace, tmp_path: Path) -> None:
    spec = TensorSpec("base_model.model.q.lora_A.weight", "F32", (1, 1))
    (tmp_path / "adapter_model.safetensors").write_bytes(encode_header([spec], None) + bytes(4))
    assert told(workspace, tmp_path / "adapter_model.safetensors").kind == "peft-weights"


def test_damaged_and_missing_files_are_errors(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(IntegrityError, match="the header claims"):
        workspace.inspect(str(tmp_path / "x.safetensors"))
    with pytest.raises(NotFoundError, match="no such file or folder"):
        workspace.inspect(str(tmp_path / "nowhere"))


def test_a_large_file_takes_milliseconds_and_no_torch(tmp_path: Path) -> None:
    size = 1 << 30
    header = encode_header([TensorSpec("model.embed_tokens.weight", "F32", (size // 4,))], None)
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    code = (
        "import json, sys, time; from pathlib import Path; from loramgr.formats.registry import told_instead\n"
        f"start = time.perf_counter(); told = told_instead(Path({str(path)!r})); taken = time.perf_counter() - start\n"
        "print(json.dumps([told.kind, 'torch' in sys.modules, taken]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kind, has_torch, taken = json.loads(done.stdout)
    assert (kind, has_torch) == ("base-model", False)
    assert taken < 0.1


@pytest.mark.parametrize(
    ("name", "data", "error", "hint"),
    [
        ("x.zip", b"PK\x03\x04" + bytes(40), IncompatibleError, "unpack it"),
        ("x.safetensors", b"\x89PNG" + bytes(40), IncompatibleError, "name the folder"),
        ("tokenizer.json", b'{"version": "1.0"}', IncompatibleError, "name the folder"),
        ("optimizer.pt", b"\x80\x02param_groups", IncompatibleError, "name the folder"),
        ("x.pt", POINTER, IncompatibleError, "git lfs pull"),
        ("x.bin", b"", IntegrityError, "again"),
    ],
)
def test_what_is_no_adapter_is_added_by_nobody(
    workspace: Workspace, tmp_path: Path, name: str, data: bytes, error: type[Exception], hint: str
) -> None:
    (tmp_path / name).write_bytes(data)
    what = told(workspace, tmp_path / name).what
    with pytest.raises(error, match=f"{name}: not an adapter, but {what}$") as caught:
        workspace.add(tmp_path / name)
    assert hint in caught.value.hint


@pytest.mark.parametrize(("data", "kind"), [(POINTER, "git-lfs-pointer"), (b"", "empty")])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_folder_says_which_of_its_files_is_none(
    workspace: Workspace, tmp_path: Path, name: str, data: bytes, kind: str
) -> None:
    (write_adapter(tmp_path / "a") / name).write_bytes(data)
    report = told(workspace, tmp_path / "a")
    assert (report.kind, report.what.split(" is ")[0]) == (kind, f"a folder whose {name}")
    assert report.hint in ("git lfs pull", "download or save it again")


def test_a_pipe_is_not_waited_for_and_a_path_told_once(workspace: Workspace, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert told(workspace, tmp_path / "pipe.safetensors").kind == "special-file"
    torch.save([1], tmp_path / "list.bin")
    assert told(workspace, tmp_path / "list.bin").what.endswith("read: holds a list, not a dictionary of tensors")


def test_a_damaged_header_is_not_taken_for_a_pickle(workspace: Workspace, tmp_path: Path) -> None:
    header = b"s" + b" " * 0x27F  # its length begins as a pickle does
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(IntegrityError, match="safetensors header is not valid JSON"):
        workspace.inspect(str(tmp_path / "x.safetensors"))
