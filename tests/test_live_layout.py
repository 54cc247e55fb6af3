"""What a model in memory has to be like: names, ties, plain memory, and the base that the adapter was trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live_toys import TOKENS, Toy, adapted, bits
from peft_files import tiny_llama
from safetensors.torch import save_file

import loramgr
from loramgr import AddOptions, IncompatibleError, NotFoundError, UsageError, Workspace
from loramgr.tensorfile import read_header
from loramgr.workspace.live_memory import overlaps

EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter of the toy's matrix q."""
    folder = tmp_path_factory.mktemp("plain")
    adapted(Toy(), folder, 5, target_modules=["q"])
    return folder


def _tied(folder: Path, **config: Any) -> tuple[Any, Path]:
    """Return a Llama with a tied head, and an adapter of its embeddings."""
    model = tiny_llama(tied=True)
    adapted(model, folder, 5, target_modules=["embed_tokens"], task_type="CAUSAL_LM", **config)
    return model, folder


def test_one_of_two_tied_names_cannot_change_alone(tmp_path: Path) -> None:
    model, folder = _tied(tmp_path / "a")
    before = bits(model)
    with pytest.raises(IncompatibleError, match=rf"lm_head.weight and {EMBEDDINGS} are one tensor") as refusal:
        loramgr.attach(model).merge(folder)
    assert "keep_tied=True" in str(refusal.value.hint)
    assert bits(model) == before


@pytest.mark.parametrize("keep_tied", [False, True])
def test_tied_names_change_together_and_once(keep_tied: bool, tmp_path: Path) -> None:
    model, folder = _tied(tmp_path / "a", ensure_weight_tying=not keep_tied)
    before = model.lm_head.weight.detach().clone()
    live = loramgr.attach(model, keep_tied=keep_tied, numerics="exact")
    assert live.merge(folder).tensors == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = read_header(folder / "adapter_model.safetensors").tensors
    factors = {name.rpartition("_")[2]: view.load().double() for name, view in stored.items() if "lora" in name}
    if keep_tied:
        expected = (before.double() + 2 * (factors["B"] @ factors["A"]).T).float()
        assert torch.equal(model.lm_head.weight, expected)
    live.unmerge()
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("task", ["SEQ_CLS", "FEATURE_EXTRACTION"])
def test_a_task_without_a_head_does_not_hide_the_models_head(task: str, tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    adapted(model.model, tmp_path / "a", 5, target_modules=["embed_tokens"], task_type=task)
    with pytest.raises(IncompatibleError, match="are one tensor"):
        loramgr.attach(model).merge(tmp_path / "a")


def test_a_dictionary_may_be_tied_without_saying_so(tmp_path: Path) -> None:
    model, folder = _tied(tmp_path / "a")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    before = bits(tensors)
    with pytest.raises(IncompatibleError, match="may tie its output head"):
        loramgr.attach(tensors).merge(folder)
    live = loramgr.attach(tensors, keep_tied=True)
    live.merge(folder)
    live.unmerge()
    assert bits(tensors) == before


def test_the_bases_configuration_tells_of_a_dictionary(tmp_path: Path) -> None:
    model, folder = _tied(tmp_path / "a")
    model.save_pretrained(tmp_path / "base")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    with pytest.raises(IncompatibleError, match="are one tensor"):
        loramgr.attach(tensors, base=str(tmp_path / "base")).merge(folder)
    untied = tiny_llama()
    untied.save_pretrained(tmp_path / "untied")
    loramgr.attach(untied.state_dict(), base=str(tmp_path / "untied")).merge(folder)


def _meta(model: Toy) -> None:
    model.q.to("meta")


def _integers(model: Toy) -> None:
    model.q.weight = torch.nn.Parameter(model.q.weight.to(torch.int8), requires_grad=False)


def _subclass(model: Toy) -> None:
    class Packed(torch.nn.Parameter):
        pass

    model.q.weight = Packed(model.q.weight.data)


def _expanded(model: Toy) -> None:
    model.q.weight.data = torch.ones(1, 12).expand(20, 12)


def _overlapping(model: Toy) -> None:
    shared = torch.randn(400)
    model.q.weight.data = shared[:240].view(20, 12)
    model.k.weight.data = shared[40:].view(18, 20)


def _other_shape(model: Toy) -> None:
    model.q = torch.nn.Linear(12, 21)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_meta, r"q\.weight is on the meta device"),
        (_integers, r"q\.weight.*I8, a quantized or integer type"),
        (_subclass, r"q\.weight is a Packed"),
        (_expanded, r"elements of q\.weight share memory"),
        (_overlapping, r"q\.weight and k\.weight share memory"),
        (_other_shape, r"q\.weight \[21, 12\]"),
    ],
)
def test_what_cannot_be_merged_into_is_refused_by_name(spoil: Callable[[Toy], None], words: str, plain: Path) -> None:
    model = Toy()
    spoil(model)
    live = loramgr.attach(model)
    with pytest.raises(IncompatibleError, match=words):
        live.merge(plain)
    assert live.merged == ()


@pytest.mark.parametrize("spoil", [_meta, _integers, _subclass, _expanded])
def test_what_is_not_merged_into_may_be_anything(spoil: Callable[[Toy], None], tmp_path: Path) -> None:
    model = Toy()
    adapted(model, tmp_path / "k", 5, target_modules=["k"])
    spoil(model)
    model.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
    before = model.k.weight.detach().clone()
    live = loramgr.attach(model)
    assert live.merge(tmp_path / "k").tensors == 1
    live.unmerge()
    assert torch.equal(model.k.weight, before)


def test_a_head_must_be_there_and_have_its_shape(tmp_path: Path) -> None:
    model = Toy()
    adapted(model, tmp_path / "head", 5, target_modules=["q"], modules_to_save=["head"])
    lacking = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head")}
    with pytest.raises(IncompatibleError, match=r"brings head\.(bias|weight), which the model lacks"):
        loramgr.attach(lacking).merge(tmp_path / "head")
    classifier = torch.nn.Module()
    classifier.q, classifier.classifier = torch.nn.Linear(12, 20), torch.nn.Linear(6, 5)
    adapted(classifier, tmp_path / "five", 5, target_modules=["q"], modules_to_save=["classifier"])
    classifier.classifier = torch.nn.Linear(6, 3)
    with pytest.raises(IncompatibleError, match=r"classifier\.(bias|weight) with the shape \[5.*has to stay \[3"):
        loramgr.attach(classifier).merge(tmp_path / "five")


def test_wrapped_models_are_found_under_other_prefixes(plain: Path) -> None:
    expected = Toy()
    loramgr.attach(expected).merge(plain)
    for model in (
        torch.nn.ModuleDict({"model": Toy()}),
        torch.nn.DataParallel(Toy()),
        torch.compile(Toy(), backend="eager"),
    ):
        loramgr.attach(model).merge(plain)
        assert list(bits(model).values()) == list(bits(expected).values())


def test_calls_that_make_no_sense(plain: Path) -> None:
    with pytest.raises(UsageError, match="no 'exakt' numerics"):
        loramgr.attach(Toy(), numerics="exakt")
    with pytest.raises(UsageError, match="neither a module nor a dictionary"):
        loramgr.attach([torch.ones(3)])  # type: ignore[arg-type]
    with pytest.raises(NotFoundError):
        loramgr.attach(Toy(), base="nobody")
    live = loramgr.attach(Toy())
    with pytest.raises(UsageError, match="no adapter"):
        live.switch()
    with pytest.raises(UsageError, match="not finite"):
        live.merge((plain, float("nan")))
    with pytest.raises(NotFoundError):
        live.merge("nobody")
    with pytest.raises(IncompatibleError, match=r"m\.q|no module"):
        loramgr.attach({"other.weight": torch.ones(3, 4)}).merge(plain)


def test_float64_needs_exact_numerics(plain: Path) -> None:
    model = Toy().double()
    with pytest.raises(IncompatibleError, match=r"q\.weight: the fast numerics") as refusal:
        loramgr.attach(model).merge(plain)
    assert refusal.value.hint == 'attach with numerics="exact"'
    live = loramgr.attach(model, numerics="exact")
    live.merge(plain)
    live.unmerge()
    assert bits(model) == bits(Toy().double())


@pytest.fixture
def workspace(tmp_path: Path, plain: Path) -> Workspace:
    """Return a workspace with the toy as a base, and its adapter, tied to it."""
    workspace = Workspace(tmp_path / "home")
    save_file({name: tensor.clone() for name, tensor in Toy().state_dict().items()}, tmp_path / "toy.safetensors")
    workspace.base_add(tmp_path / "toy.safetensors", "toy")
    workspace.add(plain, AddOptions(name="sql", base="toy"))
    return workspace


@pytest.mark.parametrize("base", ["toy", None])
def test_another_base_is_refused(base: str | None, workspace: Workspace) -> None:
    model = Toy()
    with torch.no_grad():
        model.q.weight[3, 3] += 1
    before = bits(model)
    live = workspace.attach(model, base=base)
    with pytest.raises(IncompatibleError, match=r"q\.weight of the model is not that of the base toy"):
        live.merge("sql")
    assert bits(model) == before
    live.merge("sql", force=True)
    live.unmerge()
    assert bits(model) == before


def test_only_what_an_adapter_changes_has_to_be_the_bases(workspace: Workspace) -> None:
    model = Toy()
    with torch.no_grad():
        model.head.weight[3, 3] += 1
    live = workspace.attach(torch.nn.ModuleDict({"model": model}), base="toy")
    live.merge("sql")
    assert [each.ref for each in live.merged] == ["sql@v1"]
    assert live.verify().ok


def test_another_dtype_than_the_bases_cannot_be_compared(workspace: Workspace) -> None:
    model = Toy().to(torch.bfloat16)
    with pytest.raises(IncompatibleError, match=r"q\.weight is BF16 \[20, 12\] in the model, and F32"):
        workspace.attach(model, base="toy").merge("sql")
    workspace.attach(model).merge("sql")


def test_a_recorded_base_with_other_names_is_not_compared_unless_it_is_asked_for(
    workspace: Workspace, tmp_path: Path, plain: Path
) -> None:
    renamed = {f"layers.0.{name}": tensor + 1 for name, tensor in Toy().state_dict().items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    workspace.base_add(tmp_path / "renamed.safetensors", "renamed")
    workspace.add(plain, AddOptions(name="forced", base="renamed", force=True))
    workspace.attach(Toy()).merge("forced")
    with pytest.raises(IncompatibleError, match="no module q"):
        workspace.attach(Toy(), base="renamed").merge("forced")


def test_an_adapter_of_another_base_is_refused(workspace: Workspace, tmp_path: Path, plain: Path) -> None:
    other = {name: tensor + 1 for name, tensor in Toy().state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    workspace.base_add(tmp_path / "other.safetensors", "other")
    with pytest.raises(IncompatibleError, match="trained on the base toy, and this is other"):
        workspace.attach(other, base="other").merge("sql")
    with pytest.raises(IncompatibleError, match="not that of the base toy"):
        workspace.attach(other).merge("sql")
    workspace.attach(other, base="other").merge(str(plain))


def test_a_head_that_the_base_lacks_is_the_adapters_whatever_the_weight(tmp_path: Path) -> None:
    model = Toy()
    peft = adapted(model, tmp_path / "head", 5, target_modules=["q"], modules_to_save=["head"])
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("head")}
    save_file(kept, tmp_path / "headless.safetensors")
    live = loramgr.attach(model, base=str(tmp_path / "headless.safetensors"))
    live.merge((tmp_path / "head", 0.5))
    saved = peft.base_model.model.head.modules_to_save["default"]
    assert torch.equal(model.head.weight, saved.weight)
    live.unmerge()
    assert bits(model) == bits(Toy())


def test_two_heads_need_a_choice(tmp_path: Path) -> None:
    model = Toy()
    heads = [
        adapted(model, tmp_path / f"h{seed}", seed, target_modules=["q"], modules_to_save=["head"]) for seed in (1, 2)
    ]
    live = loramgr.attach(model)
    with pytest.raises(IncompatibleError, match=r"replace the same tensor head\.(bias|weight)"):
        live.merge(tmp_path / "h1", tmp_path / "h2")
    live.merge(tmp_path / "h1", tmp_path / "h2", replacements_of=str(tmp_path / "h2"))
    assert torch.equal(model.head.bias, heads[1].base_model.model.head.modules_to_save["default"].bias)
    live.unmerge()
    assert bits(model) == bits(Toy())
    assert torch.equal(copy.deepcopy(model)(TOKENS), Toy()(TOKENS))


def test_views_that_interleave_have_no_byte_in_common() -> None:
    fused = torch.zeros(6, 10)
    parts = {"a": fused[:, :4], "b": fused[:, 4:], "c": fused.T[9:]}
    assert overlaps({name: parts[name] for name in ("a", "b")}) == {}
    assert overlaps(parts) == {"b": "c", "c": "b"}
    assert overlaps({"whole": fused, "bytes": fused.view(torch.uint8)[1:]}) == {"whole": "bytes", "bytes": "whole"}
    assert overlaps({"empty": fused[:0], "whole": fused, "away": torch.zeros(3)}) == {}
