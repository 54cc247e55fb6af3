"""Merging into a model in memory: the right bits in, the base's bits back, and nothing else touched."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from live_toys import CONFIGS, TOKENS, Toy, adapted, bits, toy_adapters
from safetensors.torch import load_file, save_file

import loramgr
from loramgr import AddOptions, ConflictError, IncompatibleError, IntegrityError, UsageError, Workspace

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return toy_adapters(tmp_path_factory.mktemp("toys"))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_the_merged_model_computes_what_peft_computes(name: str, numerics: str, tmp_path: Path) -> None:
    model = Toy().eval()
    peft = adapted(model, tmp_path / "adapter", 7, **CONFIGS[name])
    before = bits(model)
    live = loramgr.attach(model, numerics=numerics)
    report = live.merge(tmp_path / "adapter")
    with torch.no_grad():
        expected, found = peft(TOKENS), model(TOKENS)
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
    assert report.tensors == sum(data != before[key] for key, data in bits(model).items())
    assert live.verify().ok
    live.unmerge()
    assert bits(model) == before
    assert live.verify().ok
    assert live.residual_bytes == 0


@pytest.mark.parametrize("numerics", ["fast", "exact"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_switch_is_a_merge_into_the_base(dtype: torch.dtype, numerics: str, adapters: dict[str, Path]) -> None:
    wanted = {}
    for name, folder in adapters.items():
        fresh = Toy().to(dtype)
        loramgr.attach(fresh, numerics=numerics).merge(folder)
        wanted[name] = bits(fresh)
    model = Toy().to(dtype)
    before = bits(model)
    live = loramgr.attach(model, numerics=numerics)
    for first in adapters:
        for second in adapters:
            for name in (first, second):
                live.switch(adapters[name])
                assert bits(model) == wanted[name], (first, second)
    live.unmerge()
    assert bits(model) == before


def test_parameters_stay_the_same_objects_in_the_same_memory(adapters: dict[str, Path]) -> None:
    model = Toy()
    model.k.weight.requires_grad_(False)
    model.train()
    addresses = {name: (id(each), each.data_ptr()) for name, each in model.named_parameters()}
    live = loramgr.attach(model)
    for name in ("plain", "dora", "head"):
        live.switch(adapters[name])
    assert {name: (id(each), each.data_ptr()) for name, each in model.named_parameters()} == addresses
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["k.weight"]
    assert all(each.is_leaf and each.grad is None for each in model.parameters())
    assert model.training
    model(TOKENS).sum().backward()
    live.unmerge()
    assert torch.equal(model.q.weight, Toy().q.weight)


def test_several_adapters_are_merged_as_one_sum(adapters: dict[str, Path]) -> None:
    model = Toy()
    live = loramgr.attach(model, numerics="exact")
    live.merge(f"{adapters['plain']}=0.7", (adapters["other"], -0.3))
    deltas = []
    for name, weight in (("plain", 0.7), ("other", -0.3)):
        stored = load_file(adapters[name] / "adapter_model.safetensors")
        factors = [stored[f"base_model.model.k.lora_{side}.weight"].double() for side in "BA"]
        deltas.append(weight * 8 / factors[1].shape[0] * factors[0] @ factors[1])
    expected = (Toy().k.weight.detach().double() + sum(deltas)).float()
    assert torch.equal(model.k.weight, expected)
    assert [each.weight for each in live.merged] == [0.7, -0.3]


def test_what_is_merged_is_told_by_reference_digest_and_weight(adapters: dict[str, Path], tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    version = workspace.add(adapters["plain"], AddOptions(name="sql", tags=["prod"]))
    live = workspace.attach(Toy())
    assert live.merged == ()
    report = live.merge("sql@prod=0.5")
    assert [(each.ref, each.digest, each.weight) for each in live.merged] == [("sql@v1", version.digest, 0.5)]
    assert report.adapters == list(live.merged)
    assert (report.tensors, report.kernels) == (2, ["torch"])
    assert report.residual_bytes == live.residual_bytes > 0
    assert repr(live) == f"<LiveModel of a Toy: sql@v1=0.5 merged, {report.residual_bytes} bytes kept>"
    with pytest.raises(ConflictError, match=r"sql@v1=0\.5 is merged already"):
        live.merge("sql")
    live.unmerge()
    assert live.unmerge().tensors == 0
    assert repr(live) == "<LiveModel of a Toy: nothing merged, 0 bytes kept>"


def test_a_task_ends_with_what_was_merged_before(adapters: dict[str, Path]) -> None:
    model = Toy()
    base, live = bits(model), loramgr.attach(model)
    with live.task(adapters["plain"]) as inside:
        plain = bits(model)
        assert inside is live
        with pytest.raises(KeyError), live.task(adapters["dora"]):
            {}[bits(model) == plain]
        assert bits(model) == plain
        with live.task(adapters["head"]):
            live.unmerge()
            assert bits(model) == base
        assert bits(model) == plain
    assert bits(model) == base != plain
    assert live.merged == ()


def test_what_was_prepared_stands_for_its_references(adapters: dict[str, Path], tmp_path: Path) -> None:
    workspace, model = Workspace(tmp_path), Toy()
    workspace.add(adapters["plain"], AddOptions(name="sql"))
    live = workspace.attach(model)
    ready, base = live.prepare("sql"), bits(model)
    workspace.remove("sql", force=True)
    assert live.merged == ()
    live.merge(ready)
    assert bits(model) != base
    live.switch(adapters["other"])
    live.switch(ready)
    assert live.merged == ready.adapters
    with pytest.raises(UsageError, match="stands alone"):
        live.switch(ready, adapters["other"])
    with pytest.raises(UsageError, match="for one model"):
        workspace.attach(Toy()).merge(ready)


def test_a_dictionary_of_tensors_is_merged_into_in_place(adapters: dict[str, Path]) -> None:
    module, tensors = Toy(), {name: tensor.clone() for name, tensor in Toy().state_dict().items()}
    loramgr.attach(module).merge(adapters["plain"])
    live = loramgr.attach(tensors)
    live.merge(adapters["plain"])
    assert bits(tensors) == bits(module)
    live.unmerge()
    assert bits(tensors) == bits(Toy())


@pytest.mark.parametrize("name", CONFIGS)
def test_any_strides_get_the_same_bits(name: str, adapters: dict[str, Path]) -> None:
    usual, odd = Toy(), Toy()
    odd.q.weight.data = odd.q.weight.data.T.contiguous().T
    fused = torch.randn(18, 50)
    fused[:, 15:35] = odd.k.weight.data
    odd.k.weight.data = fused[:, 15:35]
    odd.conv.to(memory_format=torch.channels_last)
    beside = fused.clone()
    live = loramgr.attach(odd)
    loramgr.attach(usual).merge(adapters[name])
    live.merge(adapters[name])
    assert bits(odd) == bits(usual)
    assert live.verify().ok
    live.unmerge()
    assert bits(odd) == bits(Toy())
    assert torch.equal(fused, beside)


def test_a_compiled_model_stays_compiled(adapters: dict[str, Path]) -> None:
    model = Toy()
    compiled = torch.compile(model, backend="eager")
    outputs = compiled(TOKENS)
    live = loramgr.attach(compiled)
    live.merge(adapters["plain"])
    assert torch.equal(compiled(TOKENS), model(TOKENS))
    assert not torch.equal(compiled(TOKENS), outputs)
    live.unmerge()
    assert torch.equal(compiled(TOKENS), outputs)


def test_writes_of_others_are_told_apart(adapters: dict[str, Path]) -> None:
    model = Toy()
    live = loramgr.attach(model)
    live.merge(adapters["head"])
    with torch.no_grad():
        model.q.weight[0, 0] += 1
        model.head.bias[0] += 1
    torn = bits(model)
    assert live.verify() == loramgr.MergeCheck(False, 4, ["head.bias", "q.weight"])
    with pytest.raises(IntegrityError, match=r"q\.weight would not come back"):
        live.unmerge()
    assert bits(model) == torn
    assert live.merged


def test_a_write_that_rounds_away_is_found_too() -> None:
    """A merged weight far smaller than the base's can change without a change of what is recovered."""
    model = {"m.q.weight": torch.full((6, 4), 1.0)}
    live = loramgr.attach(model)
    live.merge(_constant_adapter(Path("minus"), -1.0))
    assert not model["m.q.weight"].any()
    model["m.q.weight"][0, 0] = 1e-30
    assert live.verify().mismatched == ["m.q.weight"]
    live.unmerge()
    assert bool((model["m.q.weight"] == 1).all())


def test_without_proofs_nothing_is_claimed(adapters: dict[str, Path]) -> None:
    model = Toy()
    live = loramgr.attach(model, prove=False)
    live.merge(adapters["plain"])
    with pytest.raises(UsageError, match="no digests"):
        live.verify()
    live.unmerge()
    assert bits(model) == bits(Toy())


def test_a_tensor_that_was_replaced_is_not_mistaken_for_the_old_one(adapters: dict[str, Path]) -> None:
    model = Toy()
    live = loramgr.attach(model)
    live.merge(adapters["plain"])
    model.q.weight = torch.nn.Parameter(torch.zeros(20, 12))
    for act in (live.unmerge, lambda: live.switch(adapters["other"])):
        with pytest.raises(ConflictError, match=r"q\.weight of the model was replaced"):
            act()
    assert not model.q.weight.any()


def test_threads_take_turns(adapters: dict[str, Path]) -> None:
    model = Toy()
    live = loramgr.attach(model)
    ready = [live.prepare(folder) for folder in adapters.values()]
    wanted = []
    for each in ready:
        live.switch(each)
        wanted.append(bits(model))
    wrong: list[int] = []

    def work(place: int) -> None:
        for turn in range(6):
            number = (place + turn) % len(ready)
            with live.task(ready[number]):
                if bits(model) != wanted[number]:
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    live.unmerge()
    assert bits(model) == bits(Toy())


def _constant_adapter(folder: Path, value: float) -> Path:
    from peft_files import write_adapter

    write_adapter(folder, r=1, lora_alpha=1)
    tensors = {"A": torch.full((1, 4), value), "B": torch.ones(6, 1)}
    stored = {f"base_model.model.m.q.lora_{side}.weight": tensor for side, tensor in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_refused_before_anything_changes(value: float) -> None:
    model = {"m.q.weight": torch.ones(6, 4)}
    live = loramgr.attach(model)
    folder = _constant_adapter(Path("bad"), value)
    with pytest.raises(IncompatibleError, match=r"m\.q\.weight.*not finite"):
        live.merge(folder)
    assert bits(model) == bits({"m.q.weight": torch.ones(6, 4)})
    live.merge(folder, force=True)
    assert not model["m.q.weight"].isfinite().any()
    live.unmerge()
    assert bits(model) == bits({"m.q.weight": torch.ones(6, 4)})


def test_a_rewrite_that_is_not_finite_is_undone(tmp_path: Path) -> None:
    model = Toy()
    spoiled = Toy()
    with torch.no_grad():
        spoiled.head.bias[2] = float("nan")
    adapted(spoiled, tmp_path / "head", target_modules=["q"], modules_to_save=["head"])
    live = loramgr.attach(model)
    with pytest.raises(IncompatibleError, match=r"head\.bias: 1 of 5 merged weights are NaN") as refusal:
        live.merge(tmp_path / "head")
    assert refusal.value.hint == "force=True to merge it as it is"
    assert bits(model) == bits(Toy())
    live.merge(tmp_path / "head", force=True)
    assert live.verify().ok
    live.unmerge()
    assert bits(model) == bits(Toy())


def test_a_result_beyond_the_range_is_undone() -> None:
    model: dict[str, Any] = {"m.q.weight": torch.full((6, 4), 60000.0, dtype=torch.float16)}
    before = bits(model)
    live = loramgr.attach(model)
    with pytest.raises(IncompatibleError, match=r"m\.q\.weight: merged weights are NaN or infinite in torch\.float16"):
        live.merge(_constant_adapter(Path("large"), 9000.0))
    assert bits(model) == before
    live.merge(_constant_adapter(Path("small"), 5000.0))
    merged = bits(model)
    with pytest.raises(IncompatibleError, match="NaN or infinite"):
        live.switch(Path("large"))
    assert bits(model) == merged
    live.unmerge()
    assert bits(model) == before


def test_the_example_of_the_documentation_runs(root: Path, minilm_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", str(minilm_base))
    monkeypatch.chdir(root)
    (example,) = re.findall(r"^```python\n(.*?)^```$", (root / "docs/live.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    fresh = bits(type(names["model"]).from_pretrained(minilm_base, num_labels=4))
    found = bits(names["model"])
    assert names["report"].tensors == 14
    # the base has no classifier, so that every model gets one at random
    assert {name for name in found if found[name] != fresh[name]} == {"classifier.weight"}
