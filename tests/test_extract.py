"""Adapters out of full fine-tunes: what becomes of every tensor, what a merge with them gives, and what is refused."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_models import CONFIG, CONV, UP, Q, moved, save, tensors

from loramgr import (
    AddOptions,
    DerivedVersion,
    ExtractOptions,
    IncompatibleError,
    LoramgrError,
    NotFoundError,
    UsageError,
    Workspace,
)
from loramgr.adapter import LowRank, Replacement
from loramgr.cli.main import run
from loramgr.formats import read_adapter

NAMED = AddOptions(name="made")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "home", jobs=2)


@pytest.fixture
def base(workspace: Workspace, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Register the toy base as `base` and return its tensors."""
    weights = tensors()
    workspace.base_add(save(tmp_path / "base", weights), name="base")
    return weights


def extracted(
    workspace: Workspace, weights: dict[str, torch.Tensor], folder: Path, **options: object
) -> tuple[DerivedVersion, Path]:
    """Save a fine-tune, extract an adapter of it and return the record and the folder of its files."""
    chosen = ExtractOptions(**({"rank": 3} | options))  # type: ignore[arg-type]
    record = workspace.extract(save(folder / "tuned", weights), "base", chosen, NAMED)
    workspace.export(f"made@v{record.version}", folder / "adapter")
    return record, folder / "adapter"


def merged(workspace: Workspace, output: Path, base: str = "base") -> dict[str, torch.Tensor]:
    workspace.merge(base, ["made"], output)
    return load_file(output / "model.safetensors")


def test_every_tensor_becomes_what_it_is(workspace: Workspace, base: dict[str, torch.Tensor], tmp_path: Path) -> None:
    tuned = moved(base, f"{Q}.weight", f"{CONV}.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight")
    tuned[f"{Q}.bias"] = base[f"{Q}.bias"] + 1
    record, folder = extracted(workspace, tuned, tmp_path)
    updates = read_adapter(folder).updates
    kinds = {name: update.kind if isinstance(update, LowRank) else type(update) for name, update in updates.items()}
    assert kinds == {
        f"{Q}.weight": "linear",
        f"{Q}.bias": Replacement,
        f"{CONV}.weight": "conv",
        "lm_head.weight": Replacement,
        "model.layers.0.input_layernorm.weight": Replacement,
    }
    conv = updates[f"{CONV}.weight"]
    assert isinstance(conv, LowRank)
    assert (conv.lora_A.spec.shape, conv.lora_B.spec.shape) == ((3, 12, 3), (16, 3, 1))
    assert (record.name, record.method, record.parents, record.rank) == ("made", "extract", [], 3)
    assert [each.name for each in record.errors] == [CONV, Q]
    found = merged(workspace, tmp_path / "out")
    for name, tensor in tuned.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=2e-6), name  # factors and sum in float32
    for name in (f"{UP}.weight", "model.embed_tokens.weight", f"{Q}.bias", "lm_head.weight"):
        assert torch.equal(found[name], tuned[name])


@pytest.mark.parametrize("folder", ["bert_ft", "bert_ft_10k_25s"])
def test_a_merge_of_a_real_extraction_is_the_base_and_the_reported_delta(
    rxnfp_bases: Path, tmp_path: Path, folder: str
) -> None:
    workspace = Workspace(tmp_path / "home", jobs=2)
    workspace.base_add(rxnfp_bases / "bert_pretrained", name="base")
    record = workspace.extract(rxnfp_bases / folder, "base", ExtractOptions(rank=8), NAMED)
    workspace.export("made", tmp_path / "adapter")
    weights, tuned = (
        torch.load(rxnfp_bases / name / "pytorch_model.bin", map_location="cpu", weights_only=True)
        for name in ("bert_pretrained", folder)
    )
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = merged(workspace, tmp_path / "out")
    left, all_of_it = 0.0, 0.0
    assert len(record.errors) == 73  # six matrices in each of twelve layers, and the pooler
    for each in record.errors:
        lora_A, lora_B = (factors[f"base_model.model.{each.name}.lora_{end}.weight"].double() for end in "AB")
        name = f"bert.{each.name.removeprefix('bert.')}.weight"
        delta = tuned[f"{each.name}.weight"].double() - weights[name].double()
        error = float((delta - lora_B @ lora_A).norm())
        assert math.isclose(each.relative_error, error / float(delta.norm()), rel_tol=1e-6)
        assert torch.equal(found[name], (weights[name].double() + lora_B @ lora_A).float())
        left, all_of_it = left + error**2, all_of_it + float(delta.norm()) ** 2
    assert record.relative_error is not None
    assert math.isclose(record.relative_error, math.sqrt(left / all_of_it), rel_tol=1e-6)
    for name, tensor in tuned.items():
        target = name if name.startswith(("bert.", "classifier.")) else f"bert.{name}"
        if f"{target.removesuffix('.weight')}" not in {f"bert.{e.name.removeprefix('bert.')}" for e in record.errors}:
            assert torch.equal(found[target], tensor), name


def test_peft_loads_what_was_extracted_of_a_gpt2_and_computes_the_fine_tune(
    tinygpt2_base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    names = [
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.1.attn.c_proj.weight",
        "transformer.h.1.mlp.c_fc.weight",
    ]
    weights = load_file(tinygpt2_base / "model.safetensors")
    tuned = moved(weights, *names)
    tuned["transformer.h.0.attn.c_attn.bias"] = weights["transformer.h.0.attn.c_attn.bias"] + 0.1
    tuned["transformer.ln_f.weight"] = weights["transformer.ln_f.weight"] * 1.1
    config = json.loads((tinygpt2_base / "config.json").read_text())
    folder = save(tmp_path / "tuned", tuned, config)
    workspace = Workspace(tmp_path / "home", jobs=2)
    workspace.base_add(tinygpt2_base, name="base")
    record = workspace.extract(folder, "base", ExtractOptions(rank=3), NAMED)
    assert sorted(f"{each.name}.weight" for each in record.errors) == names
    workspace.export("made", tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    tokens = torch.arange(20)[None]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # what PEFT and transformers say to each other
        expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tinygpt2_base), tmp_path / "adapter")
        assert torch.allclose(live(tokens).logits, expected, atol=1e-4)
    found = merged(workspace, tmp_path / "out")
    assert all(torch.allclose(found[name], tensor, atol=2e-6) for name, tensor in tuned.items())


def test_a_tie_that_peft_does_not_see_is_told_and_merged(
    tinygpt2_base: Path, workspace: Workspace, tmp_path: Path
) -> None:
    weights = load_file(tinygpt2_base / "model.safetensors")
    tuned = moved(weights, "transformer.wte.weight")
    folder = save(tmp_path / "tuned", tuned, json.loads((tinygpt2_base / "config.json").read_text()))
    workspace.base_add(tinygpt2_base, name="base")
    record = workspace.extract(folder, "base", ExtractOptions(rank=3), NAMED)
    assert any(note.startswith("transformer.wte.weight: tied to the output head") for note in record.notes)
    found = merged(workspace, tmp_path / "out")
    assert found.keys() == weights.keys()
    assert torch.equal(found["transformer.wte.weight"], tuned["transformer.wte.weight"])


def test_tied_names_stay_tied_where_the_fine_tune_ties_them(tmp_path: Path, workspace: Workspace) -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    weights = {name: tensor for name, tensor in tensors().items() if name != "lm_head.weight"}
    workspace.base_add(save(tmp_path / "base", weights, config), name="base")
    tuned = moved(weights, "model.embed_tokens.weight", f"{Q}.weight")
    workspace.extract(save(tmp_path / "tied", tuned, config), "base", ExtractOptions(rank=3), NAMED)
    found = merged(workspace, tmp_path / "one")
    assert "lm_head.weight" not in found
    assert torch.equal(found["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"])
    head = moved({"lm_head.weight": weights["model.embed_tokens.weight"]}, "lm_head.weight", seed=5)
    own = save(tmp_path / "untied", {**tuned, **head}, CONFIG)
    workspace.extract(own, "base", ExtractOptions(rank=3), NAMED)
    found = merged(workspace, tmp_path / "two")
    assert torch.equal(found["lm_head.weight"], head["lm_head.weight"])
    assert torch.equal(found["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"])


def test_a_head_that_the_fine_tune_ties_and_the_base_does_not_follows_the_embeddings(
    workspace: Workspace, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tuned = {name: tensor for name, tensor in moved(base, f"{Q}.weight").items() if name != "lm_head.weight"}
    folder = save(tmp_path / "tuned", tuned, CONFIG | {"tie_word_embeddings": True})
    workspace.extract(folder, "base", ExtractOptions(rank=3), NAMED)
    assert torch.equal(merged(workspace, tmp_path / "out")["lm_head.weight"], base["model.embed_tokens.weight"])


def test_a_resized_vocabulary_a_new_head_and_a_prefix_are_carried(
    workspace: Workspace, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tuned = moved(base, f"{UP}.weight")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tuned[name] = torch.cat([base[name], torch.ones(2, 24)])
    tuned["score.weight"] = torch.ones(3, 24)
    tuned = {f"wrapped.{name}" if name.startswith("model.") else name: tensor for name, tensor in tuned.items()}
    extracted(workspace, tuned, tmp_path)
    found = merged(workspace, tmp_path / "out")
    assert torch.equal(found["model.embed_tokens.weight"], tuned["wrapped.model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], tuned["lm_head.weight"])
    assert torch.equal(found["score.weight"], tuned["score.weight"])
    assert torch.allclose(found[f"{UP}.weight"], tuned[f"wrapped.{UP}.weight"], atol=2e-6)


def test_the_difference_is_taken_of_the_stored_values_whatever_their_dtypes(
    workspace: Workspace, tmp_path: Path
) -> None:
    weights = tensors(torch.bfloat16)
    workspace.base_add(save(tmp_path / "base", weights), name="base")
    tuned = moved({name: tensor.float() for name, tensor in weights.items()}, f"{Q}.weight")
    record, folder = extracted(workspace, tuned, tmp_path, energy=0.999, rank=None)
    assert [each.name for each in record.errors] == [Q]
    factors = load_file(folder / "adapter_model.safetensors")
    assert set(factors) == {f"base_model.model.{Q}.lora_{end}.weight" for end in "AB"}
    delta = tuned[f"{Q}.weight"].double() - weights[f"{Q}.weight"].double()
    lora_A, lora_B = (factors[f"base_model.model.{Q}.lora_{end}.weight"].double() for end in "AB")
    assert float((delta - lora_B @ lora_A).norm() / delta.norm()) <= math.sqrt(0.001)


def test_factors_that_would_be_no_smaller_are_kept_as_the_matrix(
    workspace: Workspace, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tuned = moved(base, f"{Q}.weight", f"{UP}.weight", rank=20)
    record, folder = extracted(workspace, tuned, tmp_path, energy=1.0, rank=None)
    assert record.errors == []
    assert record.relative_error == 0
    assert any("kept whole" in note for note in record.notes)
    assert all(isinstance(update, Replacement) for update in read_adapter(folder).updates.values())
    assert torch.equal(merged(workspace, tmp_path / "out")[f"{Q}.weight"], tuned[f"{Q}.weight"])


def test_the_recipe_and_what_is_said_are_published(
    workspace: Workspace, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = save(tmp_path / "tuned", moved(base, f"{Q}.weight"))
    said = AddOptions(name="made", message="m", tags=["t"], labels={"k": "v"}, metrics={"acc": 0.5})
    record = workspace.extract(folder, "base", ExtractOptions(max_error=0.1), said)
    assert (record.message, record.tags, record.labels, record.metrics) == ("m", ["t"], {"k": "v"}, {"acc": 0.5})
    recipe = workspace.history("made")[0].content["recipe"]
    assert recipe["finetuned"] == workspace.base_add(folder, name="tuned").digest
    assert (recipe["method"], recipe["max_error"], recipe["base"]) == ("extract", 0.1, record.base.digest)  # type: ignore[union-attr]
    again = workspace.extract("tuned", "base", ExtractOptions(max_error=0.1), NAMED)
    assert (again.version, again.created) == (1, False)


def _unreadable(folder: Path, base: dict[str, torch.Tensor]) -> Path:
    path = save(folder, base) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return folder


BAD = {
    "the base itself": (save, IncompatibleError, "nothing to extract"),
    "another model": (
        lambda folder, base: save(folder, {f"x.{at}.weight": torch.ones(3, 3) for at in range(2)}),
        IncompatibleError,
        "another architecture",
    ),
    "another model with a head of the same shape": (
        lambda folder, base: save(
            folder, {"lm_head.weight": base["lm_head.weight"], "blocks.0.mix.weight": torch.ones(3, 3)}
        ),
        IncompatibleError,
        "no layer of it is one of the base's .* another architecture",
    ),
    "NaN in a matrix": (
        lambda folder, base: save(folder, base | {f"{Q}.weight": base[f"{Q}.weight"] * math.nan}),
        IncompatibleError,
        rf"{Q}.weight: NaN or infinite values in ",
    ),
    "infinity in a norm": (
        lambda folder, base: save(folder, base | {"lm_head.weight": base["lm_head.weight"] * math.inf}),
        IncompatibleError,
        "lm_head.weight: NaN or infinite values in ",
    ),
    "quantized": (
        lambda folder, base: save(folder, base, CONFIG | {"quantization_config": {"quant_method": "gptq"}}),
        IncompatibleError,
        "tuned is quantized: quantization_config says gptq",
    ),
    "eight bits": (
        lambda folder, base: save(folder, base | {f"{Q}.weight": base[f"{Q}.weight"].to(torch.float8_e4m3fn)}),
        IncompatibleError,
        f"{Q}.weight is F8_E4M3 in ",
    ),
    "truncated": (_unreadable, LoramgrError, "truncated or damaged"),
    "nothing there": (lambda folder, base: folder, NotFoundError, "no such file or folder"),
    "empty": (lambda folder, base: folder.mkdir() or folder, NotFoundError, "no model.safetensors"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_by_name_and_publishes_nothing(
    workspace: Workspace, base: dict[str, torch.Tensor], tmp_path: Path, what: str
) -> None:
    make, error, said = BAD[what]
    folder = make(tmp_path / "tuned", base)  # type: ignore[no-untyped-call]
    with pytest.raises(error, match=said):
        workspace.extract(folder, "base", ExtractOptions(rank=2), NAMED)
    assert workspace.list() == []
    assert list((tmp_path / "home" / "store" / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    "goal", [{}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}, {"max_error": 1.0}, {"rank": 1, "energy": 0.5}]
)
def test_goals_without_sense_are_usage_errors(workspace: Workspace, goal: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        workspace.extract("./nowhere", "base", ExtractOptions(**goal), NAMED)  # type: ignore[arg-type]


def test_a_changed_integer_is_refused_and_a_new_one_noted(
    workspace: Workspace, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tuned = moved(base, f"{Q}.weight") | {"position_ids": torch.arange(4)}
    folder = save(tmp_path / "tuned", tuned)
    record = workspace.extract(folder, "base", ExtractOptions(rank=2), NAMED)
    assert any(note.startswith("position_ids: no plain floats") for note in record.notes)
    workspace.base_add(folder, name="with-integers")
    other = save(
        tmp_path / "other",
        tuned | {"position_ids": torch.arange(4) + 1, f"{UP}.weight": base[f"{Q}.weight"].repeat(2, 1)[:32]},
    )
    with pytest.raises(IncompatibleError, match="position_ids is I64") as caught:
        workspace.extract(other, "with-integers", ExtractOptions(rank=2), NAMED)
    assert "--exact" in str(caught.value.hint)


def test_the_command_line_shows_the_errors_and_the_json_contract(
    base: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "tuned", moved(base, f"{Q}.weight"))
    home = ["--home", str(tmp_path / "home")]
    assert run([*home, "extract", str(folder), "--base", "base", "--name", "made", "--rank", "3"]) == 0
    shown = capsys.readouterr().out
    assert "RELATIVE ERROR" in shown
    assert shown.splitlines()[-1].split()[:2] == [Q, "3"]
    assert run([*home, "--json", "extract", str(folder), "--base", "base", "--name", "other", "--rank", "3"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["name"], record["method"], record["created"]) == ("other", "extract", True)
    assert 0 <= record["relative_error"] < 1e-6
    assert [each["name"] for each in record["errors"]] == [Q]
    assert run([*home, "extract", str(folder), "--base", "base", "--name", "made", "--rank", "0"]) == 2
    assert run([*home, "extract", str(tmp_path / "base"), "--base", "base", "--name", "made"]) == 6
    assert run([*home, "extract", str(tmp_path / "nowhere"), "--base", "base", "--name", "made"]) == 4
