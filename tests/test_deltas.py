"""Which updates of several adapters are of one parameter, and deltas as products."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft_files import write_adapter
from safetensors.torch import load_file, save_file

from loramgr.adapter import Adapter, LowRank
from loramgr.errors import IncompatibleError
from loramgr.formats import read_adapter
from loramgr.workspace.deltas import aligned, product_of, renamed


@pytest.fixture
def trained(shared_data: Path) -> Path:
    return shared_data / "trained"


def low_rank(adapter: Adapter) -> dict[str, LowRank]:
    return {name: update for name, update in adapter.updates.items() if isinstance(update, LowRank)}


def test_products_are_the_dense_deltas(trained: Path) -> None:
    folder = trained / "tinyllama-char" / "py-r16-all-rslora"
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, update in low_rank(read_adapter(folder)).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        lora_A, lora_B = (tensors[f"{module}.{factor}.weight"].double() for factor in ("lora_A", "lora_B"))
        product = product_of(update)
        assert torch.allclose(product.rows(slice(None)), 4.0 * lora_B @ lora_A, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("adapter", "word"), [("lic-r8-dora", "DoRA"), ("lic-emb", "whole parameter")])
def test_what_is_no_product_is_refused(trained: Path, adapter: str, word: str) -> None:
    updates = low_rank(read_adapter(trained / "tinyllama-char" / adapter)).values()
    update = next(each for each in updates if each.magnitude is not None or each.table is not None)
    with pytest.raises(IncompatibleError, match=word):
        product_of(update)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    folder = write_adapter(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.m.q.lora_B.weight"][1, 1] = value
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(IncompatibleError, match=r"m\.q\.lora_B\.weight holds NaN or infinite"):
        product_of(low_rank(read_adapter(folder))["m.q.weight"])


def test_adapters_are_matched_with_and_without_a_prefix(trained: Path) -> None:
    whole = read_adapter(trained / "minilm" / "lic-r8-qv")
    bare = replace(whole, updates={name.removeprefix("bert."): update for name, update in whole.updates.items()})
    for first, second in ((whole, bare), (bare, whole)):
        found = aligned([first, second, first])
        assert found.keys() == first.updates.keys()
        assert all(len(updates) == 3 and None not in updates for updates in found.values())


def test_what_one_adapter_lacks_is_none(trained: Path) -> None:
    few, many = (read_adapter(trained / "tinyllama-char" / name) for name in ("lic-r8-qv", "py-r16-all-rslora"))
    found = aligned([few, many])
    assert list(found) == sorted(many.updates)
    assert found["model.layers.0.mlp.up_proj.weight"] == [None, many.updates["model.layers.0.mlp.up_proj.weight"]]


Q = "self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("names", "known", "expected"),
    [
        ([f"layers.0.{Q}"], [f"model.layers.0.{Q}"], [f"model.layers.0.{Q}"]),
        ([f"model.language_model.layers.0.{Q}"], [f"model.layers.0.{Q}"], [f"model.layers.0.{Q}"]),
        ([f"language_model.model.layers.0.{Q}"], [f"model.language_model.layers.0.{Q}"],
         [f"model.language_model.layers.0.{Q}"]),
        ([f"model.layers.0.{Q}", "lm_head.weight"], [f"layers.0.{Q}", "lm_head.weight"],
         [f"layers.0.{Q}", "lm_head.weight"]),
        ([f"encoder.layers.0.{Q}"], [f"decoder.layers.0.{Q}"], [f"encoder.layers.0.{Q}"]),
        ([f"model.layers.1.{Q}"], [f"layers.0.{Q}"], [f"model.layers.1.{Q}"]),
        (["bert.embeddings.word.weight"], ["embeddings.word.weight"], ["embeddings.word.weight"]),
        ([f"layers.{n}.{Q}" for n in (0, 1)], [f"vision.layers.0.{Q}", *(f"text.layers.{n}.{Q}" for n in (0, 1))],
         [f"text.layers.{n}.{Q}" for n in (0, 1)]),
        ([f"layers.0.{Q}"], [], [f"layers.0.{Q}"]),
    ],
)  # fmt: skip
def test_prefixes_are_resolved(names: list[str], known: list[str], expected: list[str]) -> None:
    assert list(renamed(names, known).values()) == expected


def test_two_prefixes_that_fit_are_refused_by_name() -> None:
    with pytest.raises(IncompatibleError, match=r"layers\.0.* as text\.layers\.0.* as vision\.layers\.0.*ambiguous"):
        renamed([f"layers.0.{Q}"], [f"vision.layers.0.{Q}", f"text.layers.0.{Q}"])


def test_two_names_that_become_one_are_refused() -> None:
    names = [f"model.layers.0.{Q}", "model.extra.weight", "extra.weight"]
    with pytest.raises(IncompatibleError, match=r"extra\.weight and model\.extra\.weight are both extra\.weight"):
        renamed(names, [f"layers.0.{Q}"])
