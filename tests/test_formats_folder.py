from __future__ import annotations

import re
from pathlib import Path

import pytest
from peft_files import write_adapter

from loramgr.errors import IncompatibleError, NotFoundError, UsageError
from loramgr.formats import adapter_folder, kept_files, read_adapter

KEPT = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "vocab.txt"]
TEMPLATES = ["additional_chat_templates/tools.jinja", "chat_template.jinja"]
STATE = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin", "trainer_state.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter beside the files of a training run."""
    folder = write_adapter(tmp_path / "adapter")
    (folder / "additional_chat_templates").mkdir()
    (folder / "runs").mkdir()
    others = ["README.md", "tokenizer.json", "vocab.txt", "adapter_model.bin", "notes.txt", "runs/events", *TEMPLATES]
    for name in (*others, *STATE):
        (folder / name).write_text("{}")
    return folder


def test_what_a_version_keeps(folder: Path) -> None:
    assert kept_files(folder, []) == sorted([*KEPT, *TEMPLATES])
    assert kept_files(folder / "adapter_config.json", ()) == kept_files(folder, [])


def test_globs_keep_more(folder: Path) -> None:
    more = kept_files(folder, ["notes.*", "runs/*", "optimizer.pt"])
    assert set(more) - set(kept_files(folder, [])) == {"notes.txt", "runs/events", "optimizer.pt"}
    assert set(STATE) < set(kept_files(folder, ["**/*"]))


def test_the_bin_file_counts_only_alone(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.bin" in kept_files(folder, [])


@pytest.mark.parametrize("pattern", ["../x", "/etc/*", "a/../../b", "", "a**"])
def test_a_glob_stays_in_the_folder(folder: Path, pattern: str) -> None:
    with pytest.raises(UsageError, match="--include"):
        kept_files(folder, [pattern])


def test_a_glob_that_names_nothing(folder: Path) -> None:
    for pattern in ("*.json5", "runs"):
        with pytest.raises(NotFoundError, match="no such file"):
            kept_files(folder, [pattern])


@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors", "adapter_config.json"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    outside = (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(outside)
    with pytest.raises(IncompatibleError, match="outside") as caught:
        kept_files(folder, [])
    assert str(folder / name) in caught.value.message
    assert str(outside) in caught.value.message
    if name != "README.md":
        with pytest.raises(IncompatibleError):
            read_adapter(folder)


def test_a_link_inside_the_folder_is_followed(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("notes.txt")
    assert "README.md" in kept_files(folder, [])
    (folder / "notes.txt").unlink()
    with pytest.raises(NotFoundError, match="leads to nothing"):
        kept_files(folder, [])


def test_the_cache_of_hugging_face_is_read(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "c0ffee", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    source = write_adapter(tmp_path / "source")
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert kept_files(snapshot, []) == ["adapter_config.json", "adapter_model.safetensors"]
    assert read_adapter(snapshot).ranks == {"m.q": 2}


def test_the_folder_of_a_path(folder: Path, tmp_path: Path) -> None:
    for path in (folder, folder / "adapter_config.json", folder / "adapter_model.safetensors"):
        assert adapter_folder(path) == folder
    with pytest.raises(IncompatibleError, match=r"adapter_model.safetensors beside it is the file that counts"):
        adapter_folder(folder / "adapter_model.bin")
    with pytest.raises(NotFoundError, match="no such file or folder"):
        adapter_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        (["config.json", "model.safetensors"], "this is a whole model", "loramgr base add"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "this is a whole model", "loramgr base add"),
        (["optimizer.pt", "trainer_state.json"], "only the state of a training run", "name the folder"),
        (["run/checkpoint-9.txt"], "no adapter_config.json$", "name the folder"),
        (["checkpoint-5/adapter_config.json", "checkpoint-9/adapter_config.json"], "beneath it", "checkpoint-5, .*-9"),
    ],
)
def test_a_folder_without_an_adapter_says_what_it_is(tmp_path: Path, files: list[str], message: str, hint: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(NotFoundError, match=message) as caught:
        read_adapter(tmp_path)
    assert re.search(hint, caught.value.hint or "")


def test_missing_weights(folder: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        (folder / name).unlink()
    with pytest.raises(NotFoundError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        read_adapter(folder)
