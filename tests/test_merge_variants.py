"""Adapters as PEFT itself writes them, merged and compared with the live model: variants, tied names, new heads."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_files import tiny_gpt2, tiny_llama
from safetensors.torch import load_file, save_file

from loramgr import AddOptions, IncompatibleError, MergeOptions, Workspace

os.environ["HF_HUB_OFFLINE"] = "1"
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers warn of what these tests do on purpose

LLAMA = ["q_proj", "v_proj"]


def _trained(model: Any, config: Any) -> Any:
    """Wrap the model and give every trainable parameter random values, as if it had been trained."""
    from peft import get_peft_model

    live = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return live.eval()


def _logits(model: Any, rows: int = 16) -> torch.Tensor:
    tokens = torch.arange(12).reshape(2, 6) % rows
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=tokens).logits
    return result


def _save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def _merged(tmp_path: Path, base: Path, adapter: Path, options: MergeOptions | None = None) -> Any:
    """Merge through the command's own use case and return the report."""
    workspace = Workspace(tmp_path / "home")
    record = workspace.base_add(base, "base")
    version = workspace.add(adapter, AddOptions(name="adapter", base="base"))
    report = workspace.merge("base", ["adapter"], tmp_path / "merged", options)
    assert version.base is not None
    assert version.base.digest == record.digest
    assert workspace.verify_merge(tmp_path / "merged").ok
    assert workspace.unmerge(tmp_path / "merged", tmp_path / "restored").base_digest == record.digest
    same = [
        path.name for path in base.iterdir() if (tmp_path / "restored" / path.name).read_bytes() != path.read_bytes()
    ]
    assert same == []
    assert {path.name for path in base.iterdir()} == {path.name for path in (tmp_path / "restored").iterdir()}
    return report


def _check(tmp_path: Path, model: Any, config: Any, auto: str = "AutoModelForCausalLM", **saving: Any) -> Any:
    """Merge an adapter of the model and compare the merged model with PEFT's live one; return the report."""
    import transformers

    base = _save(copy.deepcopy(model), tmp_path / "base")
    live = _trained(model, config)
    live.save_pretrained(tmp_path / "adapter", **saving)
    report = _merged(tmp_path, base, tmp_path / "adapter")
    merged, info = getattr(transformers, auto).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys"))
    expected = _logits(live)
    assert (expected - _logits(merged)).abs().max() <= 1e-5 * expected.abs().max()
    return report


def _lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": LLAMA, "task_type": "CAUSAL_LM", **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 3},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 1}},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["norm"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens"], "use_dora": True},
        {"target_modules": ["lm_head", "v_proj"]},
        {"trainable_token_indices": [1, 5]},
        {"trainable_token_indices": {"embed_tokens": [0, 15]}},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal", "r": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llama_variants(options: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    _check(tmp_path, tiny_llama(tied), _lora(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn", "c_proj", "c_fc"]},
        {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
        {"target_modules": ["c_attn"], "bias": "all"},
        {"target_modules": ["c_attn"], "bias": "lora_only"},
        {"target_modules": ["c_attn"], "lora_bias": True},
        {"target_modules": ["c_attn", "wte"]},
        {"target_modules": ["wpe"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]},
    ],
    ids=str,
)
def test_gpt2_variants(options: dict[str, Any], tmp_path: Path) -> None:
    _check(tmp_path, tiny_gpt2(), _lora(**{"fan_in_fan_out": True, **options}))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_update_of_one_tied_name_unties_the_model(target: str, tmp_path: Path) -> None:
    report = _check(tmp_path, tiny_llama(tied=True), _lora(target_modules=[target]))
    assert report.tensors_added == ["lm_head.weight"]
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    assert "untied" in report.notes[0]


def test_ensure_weight_tying_keeps_the_model_tied(tmp_path: Path) -> None:
    report = _check(tmp_path, tiny_llama(tied=True), _lora(target_modules=["embed_tokens"], ensure_weight_tying=True))
    assert report.tensors_added == []
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is True


def test_keep_tied_moves_both_names_as_pefts_merge_does(tmp_path: Path) -> None:
    base = _save(tiny_llama(tied=True), tmp_path / "base")
    live = _trained(tiny_llama(tied=True), _lora(target_modules=["embed_tokens"]))
    live.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    report = _merged(tmp_path, base, tmp_path / "adapter", MergeOptions(keep_tied=True))
    assert report.tensors_added == []
    assert report.tensors_changed == 1


@pytest.mark.parametrize("saved", [[], ["embed_tokens", "lm_head"]], ids=["embeddings", "modules_to_save"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_resized_vocabulary_comes_with_its_tokenizer(saved: list[str], tied: bool, tmp_path: Path) -> None:
    import transformers

    model = tiny_llama(tied)
    base = _save(copy.deepcopy(model), tmp_path / "base")
    (base / "tokenizer.json").write_text('{"version": "of the base"}')
    model.resize_token_embeddings(19, mean_resizing=False)
    live = _trained(model, _lora(modules_to_save=saved or None))
    live.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    (tmp_path / "adapter/tokenizer.json").write_text('{"version": "of the adapter"}')
    _merged(tmp_path, base, tmp_path / "adapter")

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = _logits(live, rows=19)
    assert merged.config.vocab_size == 19
    assert expected.shape[-1] == 19
    assert (expected - _logits(merged, rows=19)).abs().max() <= 1e-5 * expected.abs().max()
    assert "of the adapter" in (tmp_path / "merged/tokenizer.json").read_text()
    assert "of the base" in (tmp_path / "restored/tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("make", "targets", "architecture"),
    [
        (tiny_llama, LLAMA, "LlamaForSequenceClassification"),
        (tiny_gpt2, ["c_attn"], "GPT2ForSequenceClassification"),
    ],
)
def test_a_trained_head_makes_a_classifier_of_a_language_model(
    make: Callable[[], Any], targets: list[str], architecture: str, tmp_path: Path
) -> None:
    import transformers

    base = _save(make(), tmp_path / "base")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=5, pad_token_id=0)
    live = _trained(classifier, _lora(target_modules=targets, task_type="SEQ_CLS"))
    live.save_pretrained(tmp_path / "adapter")
    report = _merged(tmp_path, base, tmp_path / "adapter")

    config = json.loads((tmp_path / "merged/config.json").read_text())
    merged, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", pad_token_id=0, output_loading_info=True
    )
    assert config["architectures"] == [architecture]
    assert len(config["id2label"]) == 5
    assert report.tensors_added == ["score.weight"]
    assert not info["missing_keys"]
    assert torch.allclose(_logits(live), _logits(merged), atol=1e-6)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_change_nothing_but_the_files(shards: int, tmp_path: Path) -> None:
    model = tiny_llama()
    whole = _save(copy.deepcopy(model), tmp_path / "whole")
    size = sum(tensor.numel() * 4 for tensor in load_file(whole / "model.safetensors").values())
    base = _save(copy.deepcopy(model), tmp_path / "base", max_shard_size=size // shards + 1 if shards > 1 else size)
    live = _trained(model, _lora(target_modules="all-linear"))
    live.save_pretrained(tmp_path / "adapter")
    report = _merged(tmp_path, base, tmp_path / "adapter")
    reference = Workspace(tmp_path / "home").merge(str(whole), ["adapter"], tmp_path / "one")

    assert report.output_digest == reference.output_digest
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == len(list(base.glob("*.safetensors")))
    assert report.base_digest == Workspace(tmp_path / "home").status(whole).base_digest


def test_a_pickled_base_becomes_safetensors_and_comes_back_as_it_was(tmp_path: Path) -> None:
    model = tiny_gpt2()
    safe, pickled = _save(copy.deepcopy(model), tmp_path / "safe"), tmp_path / "base"
    pickled.mkdir()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "config.json").write_bytes((safe / "config.json").read_bytes())
    live = _trained(model, _lora(target_modules=["c_attn"], fan_in_fan_out=True))
    live.save_pretrained(tmp_path / "adapter")
    report = _merged(tmp_path, pickled, tmp_path / "adapter")
    reference = Workspace(tmp_path / "home").merge(str(safe), ["adapter"], tmp_path / "one")

    assert report.base_digest == reference.base_digest
    assert report.output_digest == reference.output_digest
    assert (tmp_path / "merged/model.safetensors").exists()
    assert not (tmp_path / "merged/pytorch_model.bin").exists()


@pytest.mark.parametrize(
    ("name", "base", "keys"),
    [
        ("lora_mlp", "mlp", {"lin0.weight"}),
        ("lora_mlp_modules_to_save", "mlp", {"lin0.weight"}),  # it saved lin1 as the base has it
        ("lora_emb_conv1d", "emb_conv1d", {"emb.weight", "conv1d.weight"}),
        ("lora_conv2d", "conv2d", {"conv2d.weight"}),
    ],
)
def test_adapters_of_peft_0_6_give_the_outputs_recorded_then(
    name: str, base: str, keys: set[str], shared_data: Path, tmp_path: Path
) -> None:
    folder = shared_data / "found" / f"peft-regression-{name}"
    stored = load_file(shared_data / f"found/toy-base-{base}.safetensors")
    source = tmp_path / "toy.safetensors"
    save_file(stored, source)
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(source, "toy")
    workspace.merge("toy", [str(folder)], tmp_path / "merged")
    after = load_file(tmp_path / "merged/toy.safetensors")

    expected = torch.load(folder / "output.pt", map_location="cpu", weights_only=True)
    assert {key for key in stored if not torch.equal(stored[key], after[key])} == keys
    assert (_TOYS[base](after) - expected).abs().max() <= 2e-5
    assert workspace.unmerge(tmp_path / "merged").base_digest == workspace.base_show("toy").digest


def _mlp(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = torch.arange(90).reshape(9, 10).float()
    hidden = torch.nn.functional.linear(inputs, weights["lin0.weight"], weights["lin0.bias"]).relu()
    return torch.nn.functional.linear(hidden, weights["lin1.weight"], weights["lin1.bias"]).log_softmax(-1)


def _emb_conv1d(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    embedded = torch.nn.functional.embedding(torch.arange(90).reshape(9, 10), weights["emb.weight"])
    hidden = (embedded @ weights["conv1d.weight"] + weights["conv1d.bias"]).relu().flatten(1)
    return torch.nn.functional.linear(hidden, weights["lin0.weight"], weights["lin0.bias"]).log_softmax(-1)


def _conv2d(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = torch.arange(90).float().reshape(2, 5, 3, 3)
    hidden = torch.nn.functional.conv2d(inputs, weights["conv2d.weight"], weights["conv2d.bias"]).relu().flatten(1)
    return torch.nn.functional.linear(hidden, weights["lin0.weight"], weights["lin0.bias"]).log_softmax(-1)


_TOYS = {"mlp": _mlp, "emb_conv1d": _emb_conv1d, "conv2d": _conv2d}


def test_two_heads_need_a_choice(minilm_base: Path, shared_data: Path, tmp_path: Path) -> None:
    workspace, folder = Workspace(tmp_path / "home"), shared_data / "trained/minilm"
    workspace.base_add(minilm_base, "minilm")
    first, second = (workspace.add(folder / name) for name in ("lic-r8-qv", "py-r8-qv"))
    asked = [f"{first.name}=0.5", f"{second.name}=0.5"]

    with pytest.raises(IncompatibleError, match=r"classifier\.(bias|weight)"):
        workspace.merge("minilm", asked, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

    report = workspace.merge("minilm", asked, tmp_path / "merged", MergeOptions(replacements_of=first.name))
    head = load_file(folder / "lic-r8-qv/adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(load_file(tmp_path / "merged/model.safetensors")["classifier.weight"], head)
    assert any("whatever the weight" in note for note in report.notes)
    assert workspace.verify_merge(tmp_path / "merged").ok
