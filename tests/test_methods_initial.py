"""PiSSA and its like with the adapter as it was before the training: plain LoRA on the stock base, exactly."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_files import write_adapter
from safetensors.torch import load_file, save_file
from test_methods_peft import Toy, save_base

from loramgr import AddOptions, IncompatibleError, ReadHints, ResizeOptions, UsageError, Workspace

pytestmark = pytest.mark.filterwarnings("ignore")
PATTERNS = {"rank_pattern": {"lin": 2}, "alpha_pattern": {"c_fc": 5}}
CASES: dict[str, dict[str, Any]] = {
    "pissa": {},
    "olora": {"init_lora_weights": "olora", "target_modules": ["lin", "square"]},  # PEFT exchanges those of a Conv1D
    "patterns": PATTERNS,
    "rslora": {"use_rslora": True},
    "rslora-patterns": {"use_rslora": True, **PATTERNS},  # PEFT does not convert these
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["norm"], "bias": "lora_only"},  # PEFT's conversion leaves them away
}


def _trained(folder: Path, **options: Any) -> tuple[Toy, Any]:
    """Write the adapter before and after a training into `initial` and `trained`; return the base and the live one."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = Toy()
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["lin", "square", "c_fc"], "init_lora_weights": "pissa"}
    live = get_peft_model(copy.deepcopy(base), LoraConfig(**{**config, **options}))
    live.save_pretrained(folder / "initial")
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    live.save_pretrained(folder / "trained")
    return base, live


def _converted(tmp_path: Path, base: torch.nn.Module) -> Workspace:
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(save_base(tmp_path / "base", base), "base")
    workspace.add(tmp_path / "trained", AddOptions(name="a", base="base", initial=tmp_path / "initial"))
    return workspace


@pytest.mark.parametrize("case", list(CASES))
def test_merged_as_the_live_model(case: str, tmp_path: Path) -> None:
    base, live = _trained(tmp_path, **CASES[case])
    workspace = _converted(tmp_path, base)
    workspace.merge("base", ["a"], tmp_path / "merged")
    assert workspace.verify_merge(tmp_path / "merged").ok
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = live.merge_and_unload().state_dict()  # in float32, from the base that the initialisation changed
    for name, tensor in expected.items():
        assert (merged[name] - tensor).abs().max() <= 3e-6, name
    wrong = base.state_dict()["lin.weight"]
    assert (merged["lin.weight"] - wrong).abs().max() > 0.01


@pytest.mark.parametrize("case", ["pissa", "olora", "patterns", "rslora"])
def test_the_files_are_those_of_pefts_own_conversion(case: str, tmp_path: Path) -> None:
    base, live = _trained(tmp_path, **CASES[case])
    workspace = _converted(tmp_path, base)
    workspace.export("a", tmp_path / "out")
    live.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    ours, theirs = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("out", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    said = [json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("out", "theirs")]
    assert said[0]["init_lora_weights"] is said[1]["init_lora_weights"] is True
    first, second = (workspace.inspect(str(tmp_path / each)) for each in ("out", "theirs"))
    for one, other in zip(first.modules, second.modules, strict=True):
        assert (one.name, one.rank, one.scaling) == (other.name, other.rank, pytest.approx(other.scaling, rel=1e-15))


def test_the_version_is_a_plain_one_and_remembers_its_making(tmp_path: Path) -> None:
    base, _ = _trained(tmp_path)
    (tmp_path / "trained" / "README.md").write_text("about it")
    workspace = _converted(tmp_path, base)
    again = workspace.add(tmp_path / "trained", AddOptions(name="a", base="base", initial=tmp_path / "initial"))
    assert (again.version, again.created, again.rank, again.scaling) == (1, False, 8, 1.5)
    assert "README.md" in {file.path for file in again.files}
    assert workspace.resize("a", ResizeOptions(rank=2)).rank == 2
    hinted = Workspace(tmp_path / "home", hints=ReadHints(initial=tmp_path / "initial"))
    assert {each.rank for each in hinted.inspect(str(tmp_path / "trained")).modules} >= {8}


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("pissa_niter_4", {}), ("OLoRA", {}), ("corda", {"corda_config": {"corda_method": "ipm"}}),
        ("lora_ga", {"lora_ga_config": {"direction": "ArB2r"}}), ("loftq", {"loftq_config": {"loftq_bits": 4}}),
    ],
)  # fmt: skip
def test_without_the_initial_adapter_it_is_described(tmp_path: Path, init: str, said: dict[str, object]) -> None:
    folder = write_adapter(tmp_path / "adapter", init_lora_weights=init, **said)
    workspace = Workspace(tmp_path / "home")
    report = workspace.inspect(str(folder))
    assert report.method == "lora"
    assert {module.rank for module in report.modules} == {2}
    assert not report.mergeable
    assert ("merge it with PEFT" if init == "loftq" else "--initial INITIAL") in report.reason
    assert any("was in the base before" in warning for warning in report.warnings)
    with pytest.raises(IncompatibleError, match=r"at the start of training|does not support LoftQ"):
        workspace.add(folder)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    _trained(tmp_path)
    _trained(tmp_path / "other", r=3)
    _trained(tmp_path / "fewer", target_modules=["lin", "square"])
    _trained(tmp_path / "olora", init_lora_weights="olora")
    _trained(tmp_path / "plain", init_lora_weights=True)
    workspace = Workspace(tmp_path / "home")

    def add(folder: str, initial: str) -> None:
        workspace.add(tmp_path / folder, AddOptions(name="a", initial=tmp_path / initial))

    with pytest.raises(IncompatibleError, match="PiSSA") as caught:
        workspace.add(tmp_path / "trained")
    assert "--initial" in str(caught.value.hint)
    with pytest.raises(IncompatibleError, match=r"c_fc\.weight has lora_A \(3, 12\)"):
        add("trained", "other/initial")
    with pytest.raises(IncompatibleError, match=r"c_fc\.weight is in the trained adapter only"):
        add("trained", "fewer/initial")
    with pytest.raises(IncompatibleError, match="began as olora"):
        add("trained", "olora/initial")
    with pytest.raises(UsageError, match="the trained adapter itself"):
        add("trained", "trained")
    with pytest.raises(UsageError, match="leaves the base as it is"):
        add("plain/trained", "plain/initial")
    with pytest.raises(UsageError, match="about one adapter"):
        workspace.add_all(tmp_path, AddOptions(initial=tmp_path / "initial"))
    loftq = write_adapter(tmp_path / "loftq", init_lora_weights="loftq")
    with pytest.raises(IncompatibleError, match="LoftQ") as caught:
        workspace.add(loftq, AddOptions(initial=tmp_path / "initial"))
    assert "quantizing" in str(caught.value.hint)


def test_halves_are_joined_without_rounding(tmp_path: Path) -> None:
    _trained(tmp_path)
    path = tmp_path / "trained" / "adapter_model.safetensors"
    halves = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(halves, path)
    workspace = Workspace(tmp_path / "home")
    workspace.add(tmp_path / "trained", AddOptions(name="a", initial=tmp_path / "initial"))
    workspace.export("a", tmp_path / "out")
    joined = load_file(tmp_path / "out" / "adapter_model.safetensors")
    before = load_file(tmp_path / "initial" / "adapter_model.safetensors")
    for name, tensor in joined.items():
        first, second = halves[name].float(), before[name]
        whole = torch.cat([first, second]) if "lora_A" in name else torch.cat([first, -second], 1)
        assert torch.equal(tensor, whole)


BY_BASE = {
    **{case: CASES[case] for case in ("pissa", "patterns", "rslora", "dora", "saved")},
    "olora": {"init_lora_weights": "olora", "target_modules": ["lin", "square"], "lora_alpha": 6},
}


@pytest.mark.parametrize("case", list(BY_BASE))
def test_what_it_began_with_follows_from_the_base(case: str, tmp_path: Path) -> None:
    base, live = _trained(tmp_path, **BY_BASE[case])
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(save_base(tmp_path / "base", base), "base")
    added = workspace.add(tmp_path / "trained", AddOptions(name="a", base="base", initial="base"))
    assert "was computed of base in float64" in added.warnings[0]
    workspace.merge("base", ["a"], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in live.merge_and_unload().state_dict().items():  # in float32, its initialisation too
        assert (merged[name] - tensor).abs().max() <= 5e-6, name
    again = workspace.add(tmp_path / "trained", AddOptions(name="a", base="base", initial="base"))
    assert (again.version, again.created) == (1, False)


def test_what_the_base_does_not_determine_is_refused(tmp_path: Path) -> None:
    base, _ = _trained(tmp_path)
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 2.0, 1.0])
    rows, columns = base.lin.weight.shape
    left, right = (torch.linalg.qr(torch.randn(size, 6, dtype=torch.float64)).Q for size in (rows, columns))
    with torch.no_grad():
        base.lin.weight.copy_(left * values @ right.T)  # the fourth and the fifth are one
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(save_base(tmp_path / "base", base), "base")

    def add(folder: str, **options: Any) -> None:
        workspace.add(tmp_path / folder, AddOptions(name="a", initial="base", **options))

    with pytest.raises(IncompatibleError, match=r"lin\.weight: float32.*at the rank 4.*too near each other"):
        add("trained", base="base")
    with pytest.raises(UsageError, match="no base is known") as caught:
        add("trained")
    assert "--base" in str(caught.value.hint)
    path = tmp_path / "trained" / "adapter_config.json"
    config = json.loads(path.read_text())
    for init, reason in (("pissa_niter_4", "random vectors"), ("corda", "covariances"), ("lora_ga", "gradients")):
        path.write_text(json.dumps({**config, "init_lora_weights": init}))
        with pytest.raises(IncompatibleError, match=reason) as refused:
            add("trained", base="base")
        assert "--initial INITIAL" in str(refused.value.hint)
    path.write_text(json.dumps({**config, "init_lora_weights": "eva"}))
    with pytest.raises(UsageError, match="leaves the base as it is"):
        add("trained", base="base")


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_the_error_told_is_above_that_of_float32(method: str) -> None:
    from loramgr.algebra.initial import principal, projected

    generator = torch.Generator().manual_seed(4)
    for shape, rank in (((24, 40), 4), ((40, 24), 9), ((33, 33), 1)):
        weight = torch.randn(shape, generator=generator)
        if method == "pissa":
            made = principal(weight.double(), rank)
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            theirs = (left[:, :rank] * values[:rank]) @ right[:rank]
        else:
            made = projected(weight.double(), rank)
            q, r = torch.linalg.qr(weight)
            theirs = q[:, :rank] @ r[:rank]
        norm = torch.linalg.matrix_norm(weight.double(), 2)
        distance = torch.linalg.matrix_norm(made.left @ made.right - theirs.double(), 2) / norm
        assert 0 < distance <= made.error < 1e-4


def test_the_real_one_has_the_loss_it_had(tinyllama_base: Path, shared_data: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    trained = shared_data / "trained" / "tinyllama-char" / "lic-pissa"
    model = AutoModelForCausalLM.from_pretrained(tinyllama_base, dtype=torch.float32)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "initial")
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(tinyllama_base)
    workspace.add(trained, AddOptions(initial=tmp_path / "initial"))
    workspace.add(trained, AddOptions(name="by-base", initial="base"))
    tokens = load_file(shared_data / "eval" / "tinyllama-char.safetensors")["lic"]
    for name in ("lic-pissa", "by-base"):
        workspace.merge("tinyllama-char", [name], tmp_path / name)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        with torch.no_grad():
            loss = merged(input_ids=tokens, labels=tokens).loss.item()
        assert loss == pytest.approx(1.5746, abs=0.0001)
