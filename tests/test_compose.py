"""`compose` and `recompose` on real adapters: what the results compute, what is recorded, what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramgr import (
    AddOptions,
    ComposeOptions,
    DerivedVersion,
    IncompatibleError,
    LoramgrError,
    NotFoundError,
    UsageError,
    Workspace,
)
from loramgr.algebra.composing.methods import METHODS
from loramgr.cli.main import run

os.environ["HF_HUB_OFFLINE"] = "1"

LIC, PY = "lic-r8-qv", "py-r8-qv"
HALVES = [(LIC, 0.5), (PY, 0.5)]
TINY = (LIC, PY, "lic-r4-all", "py-r16-all-rslora", "lic-r8-dora", "py-r8-lmhead-saved", "lic-emb", "lic-rankpattern")


@pytest.fixture(scope="module")
def workspace(tinyllama_base: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Return a home with the small Llama and its adapters, which tests may add to."""
    made = Workspace(tmp_path_factory.mktemp("composing") / "home")
    made.base_add(tinyllama_base)
    for name in TINY:
        made.add(shared_data / "trained/tinyllama-char" / name)
    return made


@pytest.fixture
def own(workspace: Workspace, tmp_path: Path) -> Workspace:
    """Return a copy of that home, to take something away from."""
    shutil.copytree(workspace.home, tmp_path / "home")
    return Workspace(tmp_path / "home")


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Return the deltas of a PEFT adapter in float64, from its files alone."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    found = {}
    for key, lora_A in tensors.items():
        if not key.endswith((".lora_A.weight", ".lora_embedding_A")):
            continue
        lora_B = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        module = key.removeprefix("base_model.model.").partition(".lora_")[0]
        rank = lora_A.shape[0]
        alpha = next(
            (a for name, a in config.get("alpha_pattern", {}).items() if module.endswith(name)), config["lora_alpha"]
        )
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found[module] = scaling * lora_B.double() @ lora_A.double()
    return found


def exported(workspace: Workspace, version: DerivedVersion, folder: Path) -> Path:
    workspace.export(f"{version.name}@v{version.version}", folder)
    return folder


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    whole = math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in wanted.values()))
    return math.sqrt(sum(float((found[name] - wanted[name]).norm()) ** 2 for name in wanted)) / whole


@pytest.fixture(scope="module")
def loss(
    workspace: Workspace, tinyllama_base: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., float]:
    """Return a function from a reference to the loss on the licence texts of the base with it merged in."""
    from transformers import AutoModelForCausalLM

    tokens = load_file(shared_data / "eval/tinyllama-char.safetensors")["lic"]
    model = AutoModelForCausalLM.from_pretrained(tinyllama_base).eval()

    def loss(ref: str) -> float:
        output = tmp_path_factory.mktemp("merged") / "model"
        workspace.merge("tinyllama-char", [ref], output)
        model.load_state_dict(load_file(output / "model.safetensors"))
        with torch.no_grad():
            found: float = model(input_ids=tokens, labels=tokens).loss.item()
        return found

    return loss


@pytest.mark.parametrize(
    ("options", "most"),
    [
        (ComposeOptions("linear"), 1.617),
        (ComposeOptions("linear", rank=8), 1.622),
        (ComposeOptions("svd"), 1.622),
        (ComposeOptions("ties"), 1.635),
        (ComposeOptions("ties_mergekit"), 1.635),
        (ComposeOptions("ties", space="core"), 1.635),
        (ComposeOptions("magnitude_prune"), 1.622),
        (ComposeOptions("slerp"), 1.622),
    ],
    ids=lambda value: f"{value.method}-{value.rank}-{value.space}" if isinstance(value, ComposeOptions) else "",
)
def test_two_tasks_in_one_adapter_are_as_good_as_they_can_be(
    options: ComposeOptions, most: float, workspace: Workspace, loss: Callable[..., float]
) -> None:
    made = workspace.compose(HALVES, "tasks", options)
    assert 1.585 < loss(f"tasks@v{made.version}") <= most


def test_dare_is_as_good_as_it_can_be(workspace: Workspace, loss: Callable[..., float]) -> None:
    losses = []
    for seed in range(20):
        made = workspace.compose(HALVES, "dare", ComposeOptions("dare_linear", seed=seed))
        losses.append(loss(f"dare@v{made.version}"))
    assert statistics.median(losses) <= 1.86
    assert len({round(each, 4) for each in losses}) > 10


@pytest.mark.parametrize("names", [
    {LIC: 0.5, PY: 0.5}, {LIC: 0.7, "py-r16-all-rslora": -0.3}, {"lic-rankpattern": 1.5, "lic-r4-all": 1.0, PY: 0.1},
])  # fmt: skip
def test_linear_is_the_dense_sum(
    names: dict[str, float], workspace: Workspace, shared_data: Path, tmp_path: Path
) -> None:
    made = workspace.compose(list(names.items()), "sum")
    wanted: dict[str, torch.Tensor] = {}
    for name, weight in names.items():
        for module, tensor in deltas(shared_data / "trained/tinyllama-char" / name).items():
            wanted[module] = wanted.get(module, torch.zeros_like(tensor)) + weight * tensor
    found = deltas(exported(workspace, made, tmp_path / "sum"))
    assert made.relative_error is not None
    assert distance(found, wanted) == pytest.approx(made.relative_error, rel=1e-3, abs=1e-12)
    assert made.relative_error <= 2**-23  # of the rounding of lora_B to float32; lora_A is as it was

    short = workspace.compose(list(names.items()), "short", ComposeOptions(rank=4))
    found = deltas(exported(workspace, short, tmp_path / "short"))
    assert distance(found, wanted) == pytest.approx(short.relative_error, rel=1e-6)
    dropped = math.sqrt(sum(float(torch.linalg.svdvals(tensor)[4:].norm()) ** 2 for tensor in wanted.values()))
    whole = math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in wanted.values()))
    assert short.relative_error == pytest.approx(dropped / whole, rel=1e-6)
    assert max(short.ranks.values()) == 4
    assert {each.name for each in short.errors} == wanted.keys()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("combination", "options"), [
    ("cat", ComposeOptions("linear")), ("svd", ComposeOptions("svd")),
])  # fmt: skip
def test_the_result_is_that_of_peft_where_peft_is_exact(
    combination: str,
    options: ComposeOptions,
    workspace: Workspace,
    tinyllama_base: Path,
    shared_data: Path,
    tmp_path: Path,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = shared_data / "trained/tinyllama-char"
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tinyllama_base), folder / LIC, adapter_name="lic"
    )
    model.load_adapter(folder / PY, adapter_name="py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["lic", "py"], [0.7, 0.3], "both", combination_type=combination)
    wanted = {
        name.removeprefix("base_model.model."): module.get_delta_weight("both").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    made = workspace.compose([(LIC, 0.7), (PY, 0.3)], f"peft-{combination}", options)
    found = deltas(exported(workspace, made, tmp_path / "both"))
    assert distance(found, wanted) <= 1e-5  # PEFT computes in float32


def test_peft_opens_what_is_composed_and_target_modules_keep_their_names(
    workspace: Workspace, tinyllama_base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = workspace.compose([LIC, "py-r16-all-rslora=0.25"], "opened")
    folder = exported(workspace, made, tmp_path / "both")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tinyllama_base), folder)
    assert {"q_proj", "v_proj"} < set(made.target_modules)
    assert made.base is not None
    assert made.base.name == "tinyllama-char"
    assert workspace.inspect("opened").mergeable


def test_linear_has_the_same_digest_everywhere(workspace: Workspace) -> None:
    made = workspace.compose(HALVES, "both")
    assert made.weights_digest == "sha256:49f9ed669b0840e3d609291ba31d8685651f92b7929fa43fcd60167b312d2c57"


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_with_weight_1_is_given_back_byte_for_byte(method: str, workspace: Workspace) -> None:
    density = 1.0 if "density" in METHODS[method].takes else None
    for name in (LIC, "py-r16-all-rslora", "lic-r8-dora", "lic-emb"):
        before = workspace.inspect(name)
        made = workspace.compose([name], f"same-{method}", ComposeOptions(method, density=density))
        assert (made.weights_digest, made.digest) == (before.weights_digest, before.digest)
        assert made.relative_error == 0
        assert workspace.recompose(f"same-{method}@v{made.version}").same


def test_a_version_has_its_parents_and_its_recipe(workspace: Workspace) -> None:
    told = AddOptions(message="both tasks", tags=["prod"], labels={"k": "v"}, metrics={"loss": 1.6})
    made = workspace.compose([f"{LIC}=0.5", (PY, 1)], "told", ComposeOptions("dare_ties", density=0.8, seed=3), told)
    assert made.parents == [f"{LIC}@v1", f"{PY}@v1"]
    assert (made.message, made.tags, made.labels, made.metrics) == ("both tasks", ["prod"], {"k": "v"}, {"loss": 1.6})
    assert (made.method, workspace.log("told")[0].method) == ("dare_ties", "lora")
    recipe = workspace.history("told@v1")[0].content["recipe"]
    assert recipe["operation"] == "compose"
    assert {key: recipe[key] for key in ("method", "rank", "density", "seed", "space", "dtype")} == {
        "method": "dare_ties", "rank": None, "density": 0.8, "seed": 3, "space": "dense", "dtype": None,
    }  # fmt: skip
    assert [each["weight"] for each in recipe["inputs"]] == [0.5, 1]
    assert [each["digest"] for each in recipe["inputs"]] == [workspace.log(name)[0].digest for name in (LIC, PY)]
    assert recipe["versions"]["torch"] == torch.__version__
    assert recipe["relative_error"] == pytest.approx(made.relative_error)


def test_the_same_again_is_the_version_that_is_there(workspace: Workspace) -> None:
    first, second = (workspace.compose(HALVES, "again", ComposeOptions("dare_linear")) for _ in range(2))
    assert first.created
    assert not second.created
    assert second.version == 1


@pytest.mark.parametrize("method", METHODS)
def test_recompose_gives_the_same_digest(method: str, workspace: Workspace) -> None:
    made = workspace.compose(HALVES, f"re-{method}", ComposeOptions(method, dtype="bfloat16"))
    report = workspace.recompose(made.name)
    assert (report.ref, report.method) == (f"re-{method}@v1", method)
    assert (report.same, report.relative_distance) == (True, 0.0)
    assert report.recomposed_digest == report.weights_digest == made.weights_digest


def test_a_weight_of_minus_zero_is_recomposed_as_it_was(own: Workspace) -> None:
    own.compose([(LIC, -0.0), f"{PY}=1"], "minus")
    own.compose([f"{LIC}=-0", (PY, 1)], "text")
    assert own.recompose("minus").same
    assert own.recompose("text").same


def test_recompose_finds_inputs_that_were_renamed(own: Workspace) -> None:
    own.compose(HALVES, "both")
    own.rename(LIC, "licences")
    assert own.recompose("both").same


def test_recompose_tells_the_distance_where_the_weights_are_others(workspace: Workspace, tmp_path: Path) -> None:
    made = workspace.compose(HALVES, "plain")
    folder = exported(workspace, made, tmp_path / "both")
    recipe = workspace.history("plain@v1")[0].content["recipe"]
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    scaled = {name: tensor * 1.25 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(scaled, folder / "adapter_model.safetensors", {"format": "pt"})
    workspace.add(folder, AddOptions(name="other", recipe=recipe))
    report = workspace.recompose("other")
    assert not report.same
    assert report.relative_distance == pytest.approx(0.2, rel=1e-7)  # of what is stored, rounded to float32


def test_recompose_names_the_inputs_that_are_gone(own: Workspace) -> None:
    own.compose(HALVES, "both")
    own.remove(PY, force=True)
    with pytest.raises(NotFoundError, match=f"gone: {PY}@v1 .sha256:") as caught:
        own.recompose("both")
    assert caught.value.hint == f"loramgr restore {PY}@v1"


def test_what_was_not_composed_cannot_be_recomposed(workspace: Workspace, shared_data: Path) -> None:
    workspace.compose([LIC], "same")  # whose entry has the same version digest and a recipe
    with pytest.raises(IncompatibleError, match="lic-r8-qv@v1 has no recipe"):
        workspace.recompose(LIC)
    with pytest.raises(UsageError, match="is a path"):
        workspace.recompose(str(shared_data / "trained/tinyllama-char" / LIC))


BAD: list[tuple[list[Any], ComposeOptions, type[LoramgrError], str]] = [
    ([], ComposeOptions(), UsageError, "no adapter"),
    (HALVES, ComposeOptions("average"), UsageError, "no method 'average'"),
    (HALVES, ComposeOptions(rank=0), UsageError, "rank 0"),
    (HALVES, ComposeOptions(density=0.5), UsageError, "linear takes no --density"),
    (HALVES, ComposeOptions("ties", seed=1), UsageError, "ties takes no --seed"),
    (HALVES, ComposeOptions("ties", density=0.0), UsageError, "density 0.0"),
    (HALVES, ComposeOptions("ties", density=1.1), UsageError, "density 1.1"),
    (HALVES, ComposeOptions("ties", density=math.nan), UsageError, "density nan"),
    (HALVES, ComposeOptions("della", epsilon=-0.1), UsageError, "width -0.1"),
    (HALVES, ComposeOptions("dare_ties", seed=-1), UsageError, "seed -1"),
    (HALVES, ComposeOptions("ties", space="sparse"), UsageError, "'sparse'"),
    (HALVES, ComposeOptions(dtype="int8"), UsageError, "'int8'"),
    ([(LIC, 0), (PY, 0.0)], ComposeOptions(), UsageError, "all weights are zero"),
    ([(LIC, math.nan)], ComposeOptions(), UsageError, "nan"),
    ([(LIC, math.inf)], ComposeOptions(), UsageError, "inf"),
    ([f"{LIC}=much"], ComposeOptions(), UsageError, "'much' is not a number"),
    (["nobody"], ComposeOptions(), NotFoundError, "nobody"),
    (["./folder"], ComposeOptions(), UsageError, "is a path"),
    ([(LIC, 1), (LIC, -1)], ComposeOptions(), IncompatibleError, "cancel"),
    ([(LIC, 1), (LIC, -1)], ComposeOptions("magnitude_prune"), IncompatibleError, "cancel"),
    ([(LIC, 1e-60)], ComposeOptions(), IncompatibleError, "rounds to zero in F32"),
    ([(LIC, 1e60)], ComposeOptions(), IncompatibleError, "q_proj: the result is too large"),
    ([(LIC, 1e200)], ComposeOptions(), IncompatibleError, "q_proj: the result is too large for"),
    ([LIC, "lic-r8-dora"], ComposeOptions(), IncompatibleError, "lic-r8-dora@v1 is a DoRA adapter"),
    ([("lic-r8-dora", 0.5)], ComposeOptions(), IncompatibleError, "DoRA"),
    ([("py-r8-lmhead-saved", 0.5), LIC], ComposeOptions(), IncompatibleError, "lm_head.weight is replaced .* to 0.5"),
    (["py-r8-lmhead-saved", LIC], ComposeOptions("ties"), IncompatibleError, "lm_head.weight .* ties combines deltas"),
    ([LIC, PY, "lic-r4-all"], ComposeOptions("slerp"), UsageError, "not 3"),
]  # fmt: skip


@pytest.mark.parametrize(("adapters", "options", "error", "words"), BAD, ids=[words for *_, words in BAD])
def test_bad_input_is_refused_by_name_and_changes_nothing(
    adapters: list[Any], options: ComposeOptions, error: type[LoramgrError], words: str, workspace: Workspace
) -> None:
    before = workspace.history()
    with pytest.raises(error, match=words):
        workspace.compose(adapters, "bad", options)
    assert workspace.history() == before
    assert not list((workspace.home / "store/scratch").iterdir())


def test_a_larger_rank_and_density_1_are_exact(workspace: Workspace) -> None:
    exact = workspace.compose(HALVES, "large")
    assert workspace.compose(HALVES, "large", ComposeOptions(rank=1000)).digest == exact.digest
    pruned = workspace.compose(HALVES, "pruned", ComposeOptions("magnitude_prune", density=1))
    assert pruned.relative_error is not None
    assert pruned.relative_error <= 1e-6
    assert workspace.compose([(LIC, 1), (LIC, 1)], "twice").ranks == exact.ranks


def test_saved_modules_are_combined_where_their_weights_sum_to_1(workspace: Workspace, tmp_path: Path) -> None:
    head = "base_model.model.lm_head.weight"

    def stored(version: DerivedVersion, name: str) -> torch.Tensor:
        return load_file(exported(workspace, version, tmp_path / name) / "adapter_model.safetensors")[head]

    workspace.export("py-r8-lmhead-saved", tmp_path / "own")
    original = load_file(tmp_path / "own/adapter_model.safetensors")[head]
    assert torch.equal(stored(workspace.compose(["py-r8-lmhead-saved", LIC], "a"), "a"), original)
    folder = tmp_path / "own"
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    save_file({**tensors, head: original * 3}, folder / "adapter_model.safetensors", {"format": "pt"})
    workspace.add(folder, AddOptions(name="thrice"))
    mixed = workspace.compose([("py-r8-lmhead-saved", 0.75), ("thrice", 0.25)], "b")
    assert torch.equal(stored(mixed, "b"), (original.double() * 0.75 + original.double() * 3 * 0.25).float())
    kept = workspace.compose([("py-r8-lmhead-saved", 1), ("py-r8-lmhead-saved", 1)], "c", ComposeOptions("ties"))
    assert torch.equal(stored(kept, "c"), original)


def test_a_table_that_is_the_bases_own_changes_nothing(own: Workspace, shared_data: Path, tmp_path: Path) -> None:
    made = own.compose([("lic-emb", 0.5), (LIC, 0.5)], "both")
    found = deltas(exported(own, made, tmp_path / "both"))
    assert "model.embed_tokens" in found
    wanted = deltas(shared_data / "trained/tinyllama-char/lic-emb")["model.embed_tokens"]
    assert float((found["model.embed_tokens"] - wanted / 2).norm() / wanted.norm()) <= 1e-7
    own.base_remove("tinyllama-char", force=True)
    with pytest.raises(IncompatibleError, match=r"replaces the whole of model\.embed_tokens\.weight"):
        own.compose([("lic-emb", 0.5), (LIC, 0.5)], "other")


def test_adapters_of_different_bases_are_refused(own: Workspace, tinygpt2_base: Path, shared_data: Path) -> None:
    own.base_add(tinygpt2_base)
    own.add(shared_data / "trained/tinygpt2-char/lic-r8-qv", AddOptions(name="gpt"))
    with pytest.raises(IncompatibleError, match=r"lic-r8-qv@v1 belongs to the base tinyllama-char, gpt@v1 to tinygpt2"):
        own.compose([LIC, "gpt"], "both")


def test_prefixes_dtypes_and_unknown_bases(shared_data: Path, tmp_path: Path) -> None:
    """The same adapter under other names, in bfloat16, of an unknown base: its deltas are added all the same."""
    source, workspace = shared_data / "trained/tinyllama-char" / LIC, Workspace(tmp_path / "home")
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    tensors = {
        name.replace("base_model.model.model.", "base_model.model."): tensor.bfloat16()
        for name, tensor in load_file(source / "adapter_model.safetensors").items()
    }
    save_file(tensors, other / "adapter_model.safetensors", {"format": "pt"})
    workspace.add(source)
    workspace.add(other)
    made = workspace.compose([(LIC, 0.5), ("other", 0.5)], "both")
    wanted = deltas(source)
    second = {f"model.{name}": tensor for name, tensor in deltas(other).items()}
    assert second.keys() == wanted.keys()
    found = deltas(exported(workspace, made, tmp_path / "both"))
    assert distance(found, {name: (wanted[name] + second[name]) / 2 for name in wanted}) <= 1e-6
    assert any("other@v1 records no base" in note for note in made.notes)
    unknown = workspace.compose(["other", ("other", 0.5)], "unknown")
    assert not any("records no base" in note for note in unknown.notes)  # there are no others


def test_values_that_are_no_numbers_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    workspace.export(LIC, tmp_path / "nan")
    tensors = load_file(tmp_path / "nan/adapter_model.safetensors")
    name = min(tensors)
    tensors[name][0, 0] = math.nan
    (tmp_path / "nan/adapter_model.safetensors").unlink()
    save_file(tensors, tmp_path / "nan/adapter_model.safetensors", {"format": "pt"})
    workspace.add(tmp_path / "nan", AddOptions(name="nan", force=True))
    with pytest.raises(IncompatibleError, match=name.replace(".", r"\.")):
        workspace.compose([(LIC, 0.5), ("nan", 0.5)], "both")
    with pytest.raises(IncompatibleError, match=r"^nan@v1: NaN"):
        workspace.compose(["nan"], "alone")


def test_minilm_adapters_with_heads_and_biases(minilm_base: Path, shared_data: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(minilm_base, "minilm")
    for name in ("lic-r8-qv", "lic-r16-qv", "py-r8-biaslora", "lic-r8-qv-bf16"):
        workspace.add(shared_data / "trained/minilm" / name, AddOptions(base="minilm"))
    made = workspace.compose(
        ["lic-r8-qv=0.5", "lic-r16-qv=0.25", "lic-r8-qv-bf16=0.25"], "both", ComposeOptions(rank=16)
    )
    assert made.base is not None
    assert workspace.inspect("both").mergeable
    workspace.merge("minilm", ["both"], tmp_path / "merged")
    heads = [
        load_file(shared_data / "trained/minilm" / name / "adapter_model.safetensors")
        for name in ("lic-r8-qv", "lic-r16-qv", "lic-r8-qv-bf16")
    ]
    key = "base_model.model.classifier.weight"
    wanted = heads[0][key].double() / 2 + heads[1][key].double() / 4 + heads[2][key].double() / 4
    assert torch.equal(load_file(tmp_path / "merged/model.safetensors")["classifier.weight"], wanted.float())
    with pytest.raises(IncompatibleError, match="is replaced"):
        workspace.compose(["lic-r8-qv", "py-r8-biaslora"], "other")


def test_the_commands(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(workspace.home), "--json"]
    line = [
        "compose",
        f"{LIC}=0.5",
        f"{PY}=0.5",
        "--name",
        "cli",
        "--method",
        "ties",
        "--density",
        "0.4",
        "-m",
        "text",
    ]
    assert run([*home, *line, "--tag", "t", "--label", "a=b", "--metric", "m=1.5", "--space", "core"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {field.name for field in fields(DerivedVersion)} == shown.keys()
    assert (shown["method"], shown["tags"], shown["labels"], shown["metrics"]) == (
        "ties",
        ["t"],
        {"a": "b"},
        {"m": 1.5},
    )
    assert 0 < shown["relative_error"] < 1e-6
    assert run([*home, "recompose", "cli@t"]) == 0
    assert json.loads(capsys.readouterr().out)["same"] is True
    assert run([*home, "compose", LIC, "--name", "cli", "--rank", "0"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["kind"] == "usage"
    assert run([*home, "compose", LIC, "lic-r8-dora", "--name", "cli"]) == 6
    assert run(["--home", str(workspace.home), "compose", f"{LIC}=2", PY, "--name", "cli"]) == 0
    assert "relative error" in capsys.readouterr().out


def test_the_help_and_the_documentation_name_every_method(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compose", "--help"]) == 0
    told, page = capsys.readouterr().out.replace("\n", " "), (root / "docs/composing.md").read_text()
    for name, method in METHODS.items():
        assert name in told
        assert f"| `{name}` |" in page
        assert method.paper.arxiv is None or method.paper.arxiv in page
