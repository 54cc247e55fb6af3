from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from peft_files import write_adapter

from loramgr.errors import IncompatibleError, IntegrityError, LoramgrError, UncheckedError
from loramgr.formats import read_adapter

PROBE = """
import sys
from pathlib import Path
from loramgr.formats import examine, kept_files, read_adapter
path = Path(sys.argv[1])
adapter = read_adapter(path)
examine(adapter), kept_files(path, [])
print([name for name in ("torch", "numpy", "sqlalchemy", "transformers") if name in sys.modules])
"""


def _imported(path: Path, root: Path, before: str = "") -> str:
    command = [sys.executable, "-c", before + PROBE, path]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout.strip()


def test_a_safetensors_adapter_is_read_without_torch(tmp_path: Path, root: Path) -> None:
    folder = write_adapter(tmp_path)
    assert _imported(folder, root) == "[]"
    assert _imported(folder, root, before="import torch\n") != "[]"  # the test above can fail


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _point(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")


def _lie(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"shape":[2,4]', b'"shape":[9,4]'))


@pytest.mark.parametrize(
    ("name", "damage", "error", "message"),
    [
        ("adapter_model.safetensors", _truncate, IntegrityError, "truncated"),
        ("adapter_model.safetensors", _lie, IntegrityError, "needs 144 bytes"),
        ("adapter_model.safetensors", _point, IncompatibleError, "Git LFS pointer"),
        ("adapter_config.json", _point, IncompatibleError, "Git LFS pointer"),
        ("adapter_config.json", _truncate, IntegrityError, "not valid JSON"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, damage: object, error: type[LoramgrError], message: str) -> None:
    folder = write_adapter(tmp_path)
    damage(folder / name)  # type: ignore[operator]
    with pytest.raises(error, match=message) as caught:
        read_adapter(folder)
    assert name in caught.value.message


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    import torch

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run",)

    folder = write_adapter(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.m.q.lora_A.weight": Payload()}, folder / "adapter_model.bin")
    with pytest.raises(IncompatibleError, match="code to be run"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "lora", "peft_type": ...}, "no rule of mlx-lm's explains the tensor"),
        ({"peft_type": ...}, "no peft_type"),
        ({"peft_type": 3}, "no peft_type"),
    ],
)
def test_adapters_of_other_kinds(tmp_path: Path, config: dict[str, object], message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        read_adapter(write_adapter(tmp_path, **config))


def test_what_cannot_be_looked_at_is_no_pass(tmp_path: Path) -> None:
    with pytest.raises(UncheckedError, match="cannot be read: File name too long"):
        read_adapter(tmp_path / ("x" * 300))
