"""Models that PEFT wrapped: merged into by the base's names, and refused where PEFT's own adapters would act too."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live_toys import CONFIGS, TOKENS, Toy, bits, toy_adapters
from safetensors.torch import save_file

import loramgr
from loramgr import AddOptions, ConflictError, IncompatibleError, IntegrityError, Workspace
from loramgr.workspace.live_layout import named_tensors

WRAPPINGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q", "k", "emb", "conv"]},
    "saved": {"target_modules": ["q"], "modules_to_save": ["head", "k"]},
    "tokens": {"target_modules": ["q"], "trainable_token_indices": {"emb": [1, 2]}},
    "dora": {"target_modules": ["q", "k"], "use_dora": True},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return toy_adapters(tmp_path_factory.mktemp("toys"))


@pytest.fixture(autouse=True)
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def wrap(model: torch.nn.Module, **config: Any) -> Any:
    """Return the model wrapped by PEFT, whose adapter changes what it computes."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(**{"r": 2, "init_lora_weights": False, **config}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(1)
    return wrapped.eval()


def places(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(each), each.data_ptr()) for name, each in model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_wrapped_model_becomes_what_the_bare_one_does(wrapping: str, name: str, adapters: dict[str, Path]) -> None:
    bare, model = Toy().eval(), wrap(Toy(), **WRAPPINGS[wrapping])
    before, held = bits(model), places(model)
    own = model(TOKENS)
    loramgr.attach(bare).merge(adapters[name])
    live = loramgr.attach(model)
    with model.disable_adapter():
        live.merge(adapters["other"])
        live.switch(adapters[name])
        assert torch.equal(model(TOKENS), bare(TOKENS))
        assert live.verify().ok
        live.unmerge()
        assert torch.equal(model(TOKENS), Toy().eval()(TOKENS))
    assert bits(model) == before
    assert places(model) == held
    assert torch.equal(model(TOKENS), own)


def test_names_are_those_of_the_base(adapters: dict[str, Path], tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "home")
    save_file({name: tensor.clone() for name, tensor in Toy().state_dict().items()}, tmp_path / "toy.safetensors")
    workspace.base_add(tmp_path / "toy.safetensors", "toy")
    workspace.add(adapters["head"], AddOptions(name="sql", base="toy"))
    model = torch.nn.DataParallel(torch.compile(wrap(Toy(), **WRAPPINGS["saved"]), backend="eager"))
    live = workspace.attach(model, base="toy")
    assert set(live.prepare("sql").contents) == {"module.q.weight", "module.emb.weight", "module.head.weight",
                                                 "module.head.bias"}  # fmt: skip
    with torch.no_grad():
        model.module.base_model.model.q.base_layer.weight[0, 0] += 1
    with pytest.raises(IncompatibleError, match=r"^module\.q\.weight of the model is not that of the base toy"):
        workspace.attach(model, base="toy").prepare("sql")


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_an_active_adapter_of_pefts_is_refused_before_anything_changes(
    wrapping: str, adapters: dict[str, Path]
) -> None:
    model = wrap(Toy(), **WRAPPINGS[wrapping])
    before = bits(model)
    live = loramgr.attach(model)
    ready = live.prepare(adapters["plain"])
    for act in (live.merge, live.switch):
        with pytest.raises(ConflictError, match=r"PEFT's adapter default is active in (q|emb|k|head)") as refusal:
            act(ready)
        assert "disable_adapter" in str(refusal.value.hint)
    assert bits(model) == before
    assert live.merged == ()


def test_a_task_ends_although_pefts_adapter_was_switched_on_in_it(adapters: dict[str, Path]) -> None:
    model = wrap(Toy(), **WRAPPINGS["lora"])
    before = bits(model)
    live = loramgr.attach(model)
    model.base_model.disable_adapter_layers()
    live.merge(adapters["other"])
    other = bits(model)
    with live.task(adapters["plain"]):
        model.base_model.enable_adapter_layers()
        with pytest.raises(ConflictError, match="active"):
            live.switch(adapters["dora"])
    assert bits(model) == other
    live.unmerge()
    assert bits(model) == before


def test_what_peft_has_merged_is_refused_by_name_until_it_is_unmerged(adapters: dict[str, Path]) -> None:
    model = wrap(Toy(), target_modules=["q"])
    live = loramgr.attach(model)
    ready = live.prepare(adapters["plain"])
    model.merge_adapter()
    merged = bits(model)
    for act in (lambda: live.merge(ready), lambda: live.switch(ready), lambda: live.prepare(adapters["plain"])):
        with pytest.raises(ConflictError, match="PEFT has merged default into q itself") as refusal:
            act()
        assert "unmerge_adapter()" in str(refusal.value.hint)
    assert bits(model) == merged
    model.unmerge_adapter()
    with model.disable_adapter():
        fresh = loramgr.attach(model)
        fresh.merge(adapters["plain"])
        fresh.unmerge()


def test_a_merge_of_pefts_on_top_has_to_go_first(adapters: dict[str, Path]) -> None:
    base = Toy()
    live = loramgr.attach(base, prove=False)
    live.merge(adapters["plain"])
    model = wrap(base, target_modules=["conv"])
    model.merge_adapter()
    live.unmerge()
    assert torch.equal(base.q.weight, Toy().q.weight)
    model.unmerge_adapter()
    with model.disable_adapter():
        live.merge(adapters["other"])
    model.merge_adapter()
    before = bits(model)
    with pytest.raises(ConflictError, match="PEFT has merged default into conv itself"):
        live.unmerge()
    assert bits(model) == before


def test_a_model_may_be_wrapped_after_merging(adapters: dict[str, Path]) -> None:
    base = Toy()
    live = loramgr.attach(base)
    live.merge(adapters["plain"])
    model = wrap(base, target_modules=["q", "emb"], modules_to_save=["k"])
    with pytest.raises(ConflictError, match="is active"):
        live.switch(adapters["other"])
    with model.disable_adapter():
        live.switch(adapters["other"])
        live.switch(adapters["plain"])
    assert live.verify().ok
    live.unmerge()
    assert bits(named_tensors(model)) == bits(Toy())


def test_bits_that_peft_lost_are_noticed(adapters: dict[str, Path]) -> None:
    model = wrap(Toy().bfloat16(), target_modules=["q"])
    live = loramgr.attach(model)
    with model.disable_adapter():
        live.merge(adapters["plain"])
    before = bits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert bits(model) != before
    with pytest.raises(IntegrityError, match=r"q\.weight would not come back"):
        live.unmerge()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': weights of the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora': weights of the base"),
        ({"bias": "all"}, "bias='all': biases of the base"),
        ({"bias": "lora_only"}, "bias='lora_only': biases of the base"),
    ],
)
def test_a_base_that_peft_changed_is_refused(config: dict[str, Any], words: str, adapters: dict[str, Path]) -> None:
    model = wrap(Toy(), target_modules=["q"], **config)
    live = loramgr.attach(model)
    with model.disable_adapter():
        with pytest.raises(IncompatibleError, match=f"PEFT's adapter default has {words}"):
            live.merge(adapters["plain"])
        live.merge(adapters["plain"], force=True)
        live.unmerge()


def test_a_dictionary_of_a_wrapped_model_is_refused() -> None:
    model = wrap(Toy(), target_modules=["q"])
    with pytest.raises(IncompatibleError, match=r"base_model\.model\.q\..* is of a layer that PEFT wrapped") as refusal:
        loramgr.attach(model.state_dict())
    assert refusal.value.hint == "attach to the model, not to its state_dict"


def test_layers_that_were_injected_without_a_wrapper(adapters: dict[str, Path]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(target_modules=["q"]), copy.deepcopy(Toy()))
    before = bits(model)
    live = loramgr.attach(model)
    with pytest.raises(ConflictError, match="active in q"):
        live.merge(adapters["plain"])
    model.q.enable_adapters(False)
    live.merge(adapters["plain"])
    live.unmerge()
    assert bits(model) == before


def test_a_wrapped_multihead_attention_is_found_beneath_its_layers() -> None:
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 6), "att": torch.nn.MultiheadAttention(8, 2)})
    wrapped = wrap(copy.deepcopy(model), target_modules=["att"])
    assert set(named_tensors(wrapped)) == set(named_tensors(model))
