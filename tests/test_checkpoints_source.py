import json
import os
from pathlib import Path

import pytest
import torch
from model_files import write_safetensors, write_shards

from loramgr.checkpoints.source import open_checkpoint
from loramgr.errors import IncompatibleError, IntegrityError, LoramgrError, NotFoundError, UncheckedError

TWO = {"a.weight": (2, 2), "b.weight": (3,)}


def test_minilm(minilm_base: Path) -> None:
    checkpoint = open_checkpoint(minilm_base)
    assert len(checkpoint.tensors) == 104
    assert [file.name for file in checkpoint.files] == ["model.safetensors"]
    assert checkpoint.config is not None
    assert checkpoint.config["model_type"] == "bert"
    assert checkpoint.config_bytes == (minilm_base / "config.json").read_bytes()
    assert {"tokenizer.json", "1_Pooling/config.json", "README.md"} <= set(checkpoint.other_files)
    assert not {"config.json", "model.safetensors"} & set(checkpoint.other_files)
    assert checkpoint.index is checkpoint.index_name is None


def test_albert_keeps_one_of_tied_names(albert_base: Path) -> None:
    checkpoint = open_checkpoint(albert_base)
    assert checkpoint.aliases == {
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    }
    assert not checkpoint.aliases.keys() & checkpoint.tensors.keys()
    assert "training_args.bin" not in checkpoint.other_files


def test_order_of_choice(tmp_path: Path) -> None:
    torch.save({"from": torch.tensor([0.0])}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).files[0].kind == "pickle"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"from": "pytorch_model.bin"}}))
    assert open_checkpoint(tmp_path).index_name == "pytorch_model.bin.index.json"
    write_safetensors(tmp_path / "model.safetensors", TWO)
    assert open_checkpoint(tmp_path).files[0].name == "model.safetensors"
    write_shards(tmp_path, {"model-1.safetensors": TWO})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files[0].name == "model-1.safetensors"
    assert checkpoint.index_metadata == {"total_size": 1}
    assert checkpoint.other_files == ()


def test_the_only_safetensors_file_is_the_model(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "odd name.safetensors", TWO)
    assert open_checkpoint(tmp_path).files[0].name == "odd name.safetensors"
    write_safetensors(tmp_path / "other.safetensors", TWO)
    with pytest.raises(IncompatibleError, match=r"odd name\.safetensors, other\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.pth"])
def test_single_file(tmp_path: Path, name: str) -> None:
    if name.endswith(".safetensors"):
        write_safetensors(tmp_path / name, TWO)
    else:
        torch.save({name: torch.zeros(shape) for name, shape in TWO.items()}, tmp_path / name)
    (tmp_path / "config.json").write_text("not read")
    (tmp_path / "link").symlink_to(tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    assert set(checkpoint.tensors) == set(TWO)
    assert (checkpoint.root, checkpoint.config, checkpoint.other_files) == (tmp_path, None, ())


def test_tensors_are_in_the_order_of_their_data(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"z": (1,), "a": (1,), "m": (1,)})
    assert open_checkpoint(tmp_path).files[0].tensors == ("z", "a", "m")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "1.safetensors"}, "b.weight is in a shard and not in the index"),
        ({**dict.fromkeys(TWO, "1.safetensors"), "c": "1.safetensors"}, "c is not in the shard"),
        (dict.fromkeys(TWO, "gone.safetensors"), r"gone\.safetensors .* missing"),
        (dict.fromkeys(TWO, "../1.safetensors"), "leaves the folder"),
        (dict.fromkeys(TWO, "/etc/passwd"), "leaves the folder"),
        (dict.fromkeys(TWO, "sub/1.safetensors"), "leaves the folder"),
        (dict.fromkeys(TWO, ".."), "leaves the folder"),
        (dict.fromkeys(TWO, "a\\b"), "leaves the folder"),
        ({"a.weight": 3}, "no weight_map"),
        ({}, "empty"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, weight_map: dict[str, object], message: str) -> None:
    write_shards(tmp_path, {"1.safetensors": TWO}, weight_map)
    with pytest.raises(IntegrityError, match=message):
        open_checkpoint(tmp_path)


def test_a_name_in_two_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, {"1.safetensors": TWO, "2.safetensors": {"a.weight": (2, 2)}})
    with pytest.raises(IntegrityError, match=r"a\.weight is also in another shard"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"weight_map": []}', b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_damaged_json(tmp_path: Path, name: str, content: bytes) -> None:
    write_safetensors(tmp_path / "model.safetensors", TWO)
    (tmp_path / name).write_bytes(content)
    if name == "config.json" and content.startswith(b'{"'):
        assert open_checkpoint(tmp_path).config == {"weight_map": []}
        return
    with pytest.raises(IntegrityError, match=r"model\.safetensors\.index\.json|config\.json"):
        open_checkpoint(tmp_path)


def test_what_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match=r"no model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(IncompatibleError, match="neither a model folder"):
        open_checkpoint(tmp_path / "notes.txt")
    (tmp_path / "adapter_config.json").write_text("{}")
    write_safetensors(tmp_path / "adapter_model.safetensors", TWO)
    with pytest.raises(IncompatibleError, match="an adapter") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == f"loramgr add {tmp_path}"
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(IncompatibleError, match="neither a model folder"):
        open_checkpoint(tmp_path / "pipe.safetensors")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", TWO)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UncheckedError, match=r"config\.json: cannot be read"):
        open_checkpoint(tmp_path)


def test_weights_without_a_tensor(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {})
    with pytest.raises(IncompatibleError, match="no tensor"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(IncompatibleError, match="Git LFS pointer"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("link", ["model.safetensors", "config.json", "vocab.txt", "folder"])
def test_links_out_of_the_folder(tmp_path: Path, link: str) -> None:
    model, outside = tmp_path / "model", tmp_path / "outside"
    write_safetensors(outside / "model.safetensors", TWO)
    (outside / "config.json").write_text("{}")
    (outside / "vocab.txt").write_text("")
    write_safetensors(model / "model.safetensors", TWO)
    (model / link).unlink(missing_ok=True)
    (model / link).symlink_to(outside / link if link != "folder" else outside)
    with pytest.raises(IncompatibleError, match="outside of the folder"):
        open_checkpoint(model)


def test_what_a_model_carries(tmp_path: Path) -> None:
    carried = ["README.md", ".gitattributes", "tokenizer.json", "1_Pooling/config.json", "2_Dense/model.safetensors"]
    left = ["optimizer.pt", "tf_model.h5", "model.onnx", "onnx/model.onnx", "flax_model.msgpack", "x.gguf",
            ".git/HEAD", ".cache/x", "loramgr-merge.json", "old/model.safetensors", "training_args.bin",
            "pytorch_model.bin.index.json"]  # fmt: skip
    for name in carried + left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    write_safetensors(tmp_path / "model.safetensors", TWO)
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    assert open_checkpoint(tmp_path).other_files == tuple(sorted([*carried, "modules.json"]))


def test_shards_of_pickles_with_tied_names(tmp_path: Path) -> None:
    table = torch.arange(6.0).reshape(3, 2)
    first = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    torch.save(first, tmp_path / "1.bin")
    torch.save({"model.norm.weight": torch.ones(2)}, tmp_path / "2.bin")
    weight_map = {**dict.fromkeys(first, "1.bin"), "model.norm.weight": "2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert [(file.name, file.tensors) for file in checkpoint.files] == [
        ("1.bin", ("model.embed_tokens.weight",)),
        ("2.bin", ("model.norm.weight",)),
    ]
    assert set(checkpoint.tensors) == {"model.embed_tokens.weight", "model.norm.weight"}


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", TWO)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(LoramgrError):
            open_checkpoint(tmp_path)
