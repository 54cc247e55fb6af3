import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Hub, serve
from model_files import write_safetensors, write_shards

from loramgr.checkpoints.hub import HubAddress, parse_address
from loramgr.checkpoints.source import open_checkpoint
from loramgr.errors import UsageError

# The client reads its settings when it is imported, so every fetch is a process of its own.
FETCH = """
import json, sys
from loramgr.checkpoints.hub import fetch
from loramgr.errors import LoramgrError
for source in sys.argv[1:]:
    try:
        folder, commit = fetch(source)
        print(json.dumps({"folder": str(folder), "commit": commit}))
    except LoramgrError as error:
        print(json.dumps({"code": error.exit_code, "message": error.message, "hint": error.hint}))
"""
CONFIG = b'{"model_type": "llama"}'
TWO = {"a.weight": (2, 2), "b.weight": (3,)}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    write_safetensors(tmp_path / "one" / "model.safetensors", TWO)
    others = {"config.json": CONFIG, "tokenizer.json": b"{}", "README.md": b"#", "1_Pooling/config.json": b"{}",
              "pytorch_model.bin": b"x", "tf_model.h5": b"x", "onnx/model.onnx": b"x", "odd [1].txt": b"x"}  # fmt: skip
    single = {**contents(tmp_path / "one"), **others}
    write_shards(tmp_path / "two", {"1.safetensors": {"a": (2,)}, "2.safetensors": {"b": (2,)}})
    write_safetensors(tmp_path / "two" / "consolidated.safetensors", TWO)
    sharded = {**contents(tmp_path / "two"), "config.json": CONFIG}
    incomplete = {name: data for name, data in sharded.items() if name != "2.safetensors"}
    escaping = {**sharded, "model.safetensors.index.json": b'{"weight_map": {"a": "../../etc/passwd"}}'}
    repositories = {"org/single": single, "org/sharded": sharded, "org/incomplete": incomplete,
                    "org/escaping": escaping, "org/adapter": {"adapter_config.json": b"{}"},
                    "org/empty": {"README.md": b""}}  # fmt: skip
    refusals = {"org/gated": (403, "GatedRepo"), "org/secret": (401, "RepoNotFound"), "org/broken": (500, ""),
                "org/forbidden": (403, "")}  # fmt: skip
    with serve(Hub(repositories, refusals)) as served:
        yield served


def fetch(home: Path, url: str, *sources: str, **settings: str) -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **settings,
    }
    command = [sys.executable, "-c", FETCH, *sources]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://org/name", HubAddress("org/name", None)),
        ("hf://gpt2", HubAddress("gpt2", None)),
        ("hf://org/na.me-1_b@refs/pr/1", HubAddress("org/na.me-1_b", "refs/pr/1")),
    ],
)
def test_addresses(text: str, address: HubAddress) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize("text", ["", "hf://", "org/name", "hf://a/b/c", "hf://a b/c", "hf://a/b@", "https://x/y/z"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="not an address"):
        parse_address(text)


def test_what_is_fetched(hub: Hub, tmp_path: Path) -> None:
    single, sharded = fetch(tmp_path / "home", hub.url, "hf://org/single", "hf://org/sharded@v1")
    assert single["commit"] == sharded["commit"] == COMMIT
    opened = open_checkpoint(Path(single["folder"]))
    assert set(opened.tensors) == set(TWO)
    assert opened.other_files == ("1_Pooling/config.json", "README.md", "odd [1].txt", "tokenizer.json")
    assert [file.name for file in open_checkpoint(Path(sharded["folder"])).files] == ["1.safetensors", "2.safetensors"]
    unwanted = {"pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "consolidated.safetensors"}
    assert not unwanted & set(hub.downloads)


def test_what_was_fetched_is_there_offline(hub: Hub, tmp_path: Path) -> None:
    (online,) = fetch(tmp_path / "home", hub.url, "hf://org/single")
    asked = len(hub.downloads)
    offline = fetch(tmp_path / "home", hub.url, "hf://org/single", "hf://org/sharded", HF_HUB_OFFLINE="1")
    assert offline[0] == online
    assert offline[1]["code"] == 3
    assert "not in the local cache" in offline[1]["message"]
    assert len(hub.downloads) == asked


def test_refusals_in_words(hub: Hub, tmp_path: Path) -> None:
    expected = {
        "hf://org/nowhere": (4, "no such repository", "check the name"),
        "hf://org/secret": (4, "no such repository", "hf auth login"),
        "hf://org/single@v9": (4, "no such revision", "check the name"),
        "hf://org/gated": (3, "terms to be accepted", "hf auth login"),
        "hf://org/forbidden": (3, "cannot be asked", "hf auth login"),
        "hf://org/broken": (3, "cannot be asked", "try again"),
        "hf://org/adapter": (6, "an adapter", "loramgr add"),
        "hf://org/empty": (4, r"no model.safetensors", ""),
        "hf://org/incomplete": (5, "lacks 2.safetensors", ""),
        "hf://org/escaping": (5, "leaves the folder", ""),
    }
    answers = fetch(tmp_path / "home", hub.url, *expected)
    for (source, (code, message, hint)), answer in zip(expected.items(), answers, strict=True):
        assert (answer.get("code"), message in answer["message"]) == (code, True), (source, answer)
        assert hint in (answer["hint"] or ""), source
        assert source in answer["message"]


def test_nobody_answers(tmp_path: Path) -> None:
    (answer,) = fetch(tmp_path / "home", "http://127.0.0.1:9", "hf://org/single")
    assert answer["code"] == 3
    assert "cannot be asked" in answer["message"]
