"""`diff` on real adapters and models, against dense matrices made from the files independently."""

from __future__ import annotations

import json
import shutil
from math import isclose
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_files import write_adapter
from safetensors.torch import load_file, save_file

from loramgr import DiffReport, IncompatibleError, IntegrityError, ModuleDifference, NotFoundError, Workspace, to_json
from loramgr.cli.main import run

GOLDEN = Path(__file__).parent / "golden" / "diff-0001.json"
TOLERANCE = 1e-6  # what the figures promise against the dense computation; they keep far more


@pytest.fixture
def trained(shared_data: Path) -> Path:
    return shared_data / "trained"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "home", jobs=2)


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """Return module → scaling · lora_B lora_A, from the files, for plain and rank-stabilised LoRA."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            scaling = config["lora_alpha"] / (config["r"] ** (0.5 if config["use_rslora"] else 1))
            product = tensors[f"{module}.lora_B.weight"].double() @ tensor.double()
            found[module.removeprefix("base_model.model.")] = scaling * product
    return found


def check(module: ModuleDifference, a: torch.Tensor, b: torch.Tensor) -> None:
    expected = {"norm_a": a.norm(), "norm_b": b.norm(), "distance": (a - b).norm()}
    for name, value in expected.items():
        assert isclose(getattr(module, name), float(value), rel_tol=TOLERANCE), (module.name, name)
    if a.norm() and b.norm():
        assert module.cosine is not None
        assert isclose(module.cosine, float((a * b).sum() / a.norm() / b.norm()), rel_tol=TOLERANCE, abs_tol=1e-12)
    if a.norm():
        assert module.relative_distance is not None
        assert isclose(module.relative_distance, float((a - b).norm() / a.norm()), rel_tol=TOLERANCE)


def by_name(report: DiffReport) -> dict[str, ModuleDifference]:
    return {module.name: module for module in report.modules}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tinyllama-char/lic-r8-qv", "tinyllama-char/py-r8-qv"),
        ("tinyllama-char/lic-r4-all", "tinyllama-char/py-r16-all-rslora"),
        ("tinyllama-char/lic-r8-qv", "tinyllama-char/py-r16-all-rslora"),
        ("tinygpt2-char/lic-r4-all", "tinygpt2-char/lic-r8-qv"),
        ("minilm/lic-r8-qv", "minilm/lic-r8-qv-bf16"),
        ("minilm/lic-r8-qv/checkpoint-40", "minilm/lic-r8-qv"),
    ],
)
def test_every_figure_agrees_with_the_dense_deltas(
    workspace: Workspace, trained: Path, first: str, second: str
) -> None:
    if not (trained / first).is_dir():
        first = str(next((trained / first).parent.glob("checkpoint-*")).relative_to(trained))
    a, b = dense(trained / first), dense(trained / second)
    report = workspace.diff(str(trained / first), str(trained / second), spectrum=True)
    found = by_name(report)
    assert found.keys() >= a.keys() | b.keys()
    for position, name in enumerate(sorted(a.keys() | b.keys())):
        known = a.get(name, b.get(name))
        assert known is not None
        own, other = (each.get(name, torch.zeros_like(known)) for each in (a, b))
        module = found[name]
        check(module, own, other)
        assert module.status == ("added" if name not in a else "removed" if name not in b else "changed")
        if position % 12:  # dense decompositions take the time
            continue
        for values, matrix in (
            (module.spectrum_a, own), (module.spectrum_b, other), (module.spectrum_difference, own - other),
        ):  # fmt: skip
            assert values is not None
            expected = torch.linalg.svdvals(matrix)[: len(values)]
            large = expected > 1e-10 * expected[:1].max() if len(expected) else expected.bool()
            assert torch.allclose(torch.tensor(values).double()[large], expected[large], rtol=TOLERANCE)


def test_the_summary_is_of_all_modules_as_one_vector(workspace: Workspace, trained: Path) -> None:
    names = [trained / "tinyllama-char" / name for name in ("lic-r8-qv", "py-r16-all-rslora")]
    a, b = map(dense, names)
    report = workspace.diff(*map(str, names))
    whole, other = (torch.cat([each.get(m, torch.zeros_like(b[m])).flatten() for m in sorted(b)]) for each in (a, b))
    summary = report.summary
    assert (summary.changed, summary.added, summary.removed, summary.same, summary.unknown) == (8, 20, 0, 0, 0)
    assert isclose(summary.distance or 0, float((whole - other).norm()), rel_tol=TOLERANCE)
    assert isclose(summary.cosine or 0, float(whole @ other / whole.norm() / other.norm()), rel_tol=TOLERANCE)
    assert report.config["r"] == [8, 16]
    assert "base_model_name_or_path" not in report.config


def test_an_adapter_and_itself(workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained / "minilm" / "lic-r8-dora", tmp_path / "copy")
    for other in (str(trained / "minilm" / "lic-r8-dora"), str(copy)):
        report = workspace.diff(str(copy), other)
        assert {module.status for module in report.modules} == {"same"}
        assert (report.summary.distance, report.summary.relative_distance, report.summary.cosine) == (0.0, 0.0, 1.0)
    version = workspace.add(trained / "tinyllama-char" / "lic-r8-qv", None)
    report = workspace.diff(version.name, f"{version.name}@v1")
    assert (report.summary.distance, report.summary.cosine, report.summary.same) == (0.0, 1.0, 8)
    assert report.digest_a == report.digest_b == version.digest


def test_diff_mirrors(workspace: Workspace, trained: Path) -> None:
    names = [str(trained / "tinyllama-char" / name) for name in ("lic-r4-all", "py-r8-qv")]
    there, back = (workspace.diff(*pair) for pair in (names, names[::-1]))
    for own, other in zip(there.modules, back.modules, strict=True):
        assert (own.name, own.norm_a, own.norm_b) == (other.name, other.norm_b, other.norm_a)
        assert (own.distance, own.cosine, own.rank_a) == (other.distance, other.cosine, other.rank_b)
        assert own.subspace_similarity == other.subspace_similarity
    assert there.summary.distance == back.summary.distance
    assert there.summary.removed == back.summary.added


def decomposed(weight: torch.Tensor, folder: Path, module: str) -> torch.Tensor:
    """Return DoRA's change of a weight (out, in)."""
    magnitude = load_file(folder / "adapter_model.safetensors")[
        f"base_model.model.{module}.lora_magnitude_vector"
    ].double()
    direction = weight.double() + dense(folder)[module]
    return magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True) - weight.double()


@pytest.mark.parametrize("base", ["tinyllama-char", "tinygpt2-char"])
def test_dora_is_compared_on_the_base(workspace: Workspace, shared_data: Path, base: str) -> None:
    folder = shared_data / "trained" / base
    weights = load_file(shared_data / "bases" / base / "model.safetensors")
    plain, dora = folder / "lic-r8-qv", folder / "lic-r8-dora"
    workspace.base_add(shared_data / "bases" / base)
    report = workspace.diff(str(plain), str(dora))
    assert report.notes == []
    deltas = dense(plain)
    for name, delta in deltas.items():
        weight = weights[f"{name}.weight"]
        oriented = weight.T if base == "tinygpt2-char" else weight
        check(by_name(report)[name], delta, decomposed(oriented, dora, name))


def test_without_the_base_a_note_stands_where_figures_cannot(workspace: Workspace, trained: Path) -> None:
    folder = trained / "minilm"
    report = workspace.diff(str(folder / "lic-r8-qv"), str(folder / "lic-r8-dora"))
    module = by_name(report)["bert.encoder.layer.0.attention.self.query"]
    assert (module.status, module.distance, module.norm_a, module.cosine) == ("changed", None, None, None)
    assert len(report.notes) == 1
    assert "DoRA" in report.notes[0]
    heads = [load_file(folder / name / "adapter_model.safetensors") for name in ("lic-r8-qv", "lic-r8-dora")]
    first, second = (head["base_model.model.classifier.weight"].double() for head in heads)
    assert isclose(by_name(report)["classifier"].distance or 0, float((first - second).norm()), rel_tol=TOLERANCE)
    assert (report.summary.unknown, report.summary.distance) == (14, None)


def test_saved_modules_and_biases_are_measured_against_the_base(
    workspace: Workspace, trained: Path, minilm_base: Path
) -> None:
    workspace.base_add(minilm_base, "minilm")
    folder, base = trained / "minilm", load_file(minilm_base / "model.safetensors")
    names = ("lic-r8-pooler-saved", "py-r8-biaslora")
    pooler, biased = (load_file(folder / name / "adapter_model.safetensors") for name in names)
    report = workspace.diff(*(str(folder / name) for name in names))
    module = by_name(report)["bert.pooler.dense"]
    delta = pooler["base_model.model.bert.pooler.dense.weight"].double() - base["pooler.dense.weight"].double()
    assert module.status == "removed"
    check(module, delta, torch.zeros_like(delta))
    bias = "encoder.layer.0.attention.self.query.bias"
    trained_bias = biased[f"base_model.model.bert.{bias.removesuffix('.bias')}.base_layer.bias"].double()
    module = by_name(report)[f"bert.{bias}"]
    check(module, torch.zeros_like(trained_bias), trained_bias - base[bias].double())
    head = "base_model.model.classifier.weight"
    check(by_name(report)["classifier"], pooler[head].double(), biased[head].double())  # new: measured against nothing


def test_an_embedding_with_the_bases_own_table_is_its_delta(workspace: Workspace, shared_data: Path) -> None:
    workspace.base_add(shared_data / "bases" / "tinyllama-char")
    folder = shared_data / "trained" / "tinyllama-char"
    report = workspace.diff(str(folder / "lic-emb"), str(folder / "lic-r8-qv"))
    tensors = load_file(folder / "lic-emb" / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    delta = 2.0 * tensors[f"{prefix}B"].double() @ tensors[f"{prefix}A"].double()
    module = by_name(report)["model.embed_tokens"]
    check(module, delta, torch.zeros_like(delta))
    assert (module.kind, module.rank_a, module.rank_b) == ("embedding", 4, 0)


def test_a_base_that_changed_since_is_an_integrity_error(
    workspace: Workspace, shared_data: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(shared_data / "bases" / "tinyllama-char", tmp_path / "tinyllama-char")
    workspace.base_add(base)
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, base / "model.safetensors")
    folder = shared_data / "trained" / "tinyllama-char"
    with pytest.raises(IntegrityError, match="has changed since"):
        workspace.diff(str(folder / "lic-r8-qv"), str(folder / "lic-r8-dora"))


def test_other_bases_and_other_modules_are_refused(workspace: Workspace, shared_data: Path) -> None:
    bases = [workspace.base_add(shared_data / "bases" / name) for name in ("tinyllama-char", "tinygpt2-char")]
    folders = [shared_data / "trained" / name / "lic-r8-qv" for name in ("tinyllama-char", "tinygpt2-char")]
    first, second = (workspace.add(folder) for folder in folders)
    with pytest.raises(IncompatibleError) as raised:
        workspace.diff(f"{first.name}@v{first.version}", f"{second.name}@v{second.version}")
    assert all(base.digest in raised.value.message for base in bases)
    with pytest.raises(IncompatibleError, match=r"no module in common.*model\.layers.*transformer\.h"):
        workspace.diff(*map(str, folders))
    with pytest.raises(IncompatibleError, match="whole model"):
        workspace.diff("tinyllama-char", str(folders[0]))
    with pytest.raises(IncompatibleError, match="no tensor of one name and shape"):
        workspace.diff("tinyllama-char", "tinygpt2-char")
    with pytest.raises(NotFoundError):
        workspace.diff("nobody", "nothing")
    with pytest.raises(NotFoundError):
        workspace.diff("./nobody", str(folders[0]))


def test_models_are_compared_tensor_by_tensor(workspace: Workspace, rxnfp_bases: Path) -> None:
    folders = [rxnfp_bases / name for name in ("bert_pretrained", "bert_ft")]
    report = workspace.diff(*map(str, folders))
    states = [torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu") for folder in folders]
    found = by_name(report)
    assert report.kind == "models"
    for name in list(found)[::7]:
        first = states[0].get(name)
        second = states[1].get(name, states[1].get(name.removeprefix("bert.")))  # saved without the prefix
        known = first if first is not None else second
        own, other = (torch.zeros_like(known) if each is None else each for each in (first, second))
        check(found[name], own.double(), other.double())
    same = workspace.diff(str(folders[0]), str(folders[0])).summary
    assert (same.distance, same.cosine, same.changed) == (0.0, 1.0, 0)


def test_a_base_and_what_was_merged_from_it(workspace: Workspace, shared_data: Path, tmp_path: Path) -> None:
    workspace.base_add(shared_data / "bases" / "tinyllama-char")
    adapter = shared_data / "trained" / "tinyllama-char" / "lic-r8-qv"
    workspace.merge("tinyllama-char", [str(adapter)], tmp_path / "merged")
    report = workspace.diff("tinyllama-char", str(tmp_path / "merged"))
    deltas, found = dense(adapter), by_name(report)
    assert {name for name, module in found.items() if module.status != "same"} == {f"{name}.weight" for name in deltas}
    for name, delta in deltas.items():
        # every merged weight is rounded once to float32
        distance = found[f"{name}.weight"].distance
        assert distance is not None
        assert isclose(distance, float(delta.norm()), rel_tol=1e-5)
    assert report.digest_a is not None
    assert report.digest_b is None


def test_models_keep_ties_and_tell_what_has_no_figures(workspace: Workspace, tmp_path: Path) -> None:
    config = json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": True})
    wte, other = torch.ones(4, 3), torch.full((2, 2), float("inf"))
    for name, tensors in (
        ("tied", {"transformer.wte.weight": wte, "x.weight": other, "y.weight": torch.ones(2)}),
        ("both", {"transformer.wte.weight": wte, "lm_head.weight": wte + 1, "x.weight": other, "y.weight": wte * 2}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        save_file(tensors, tmp_path / name / "model.safetensors")
    report = workspace.diff(str(tmp_path / "tied"), str(tmp_path / "both"))
    assert by_name(report)["lm_head.weight"].distance == pytest.approx(12**0.5, rel=1e-12)
    assert [by_name(report)[name].distance for name in ("x.weight", "y.weight")] == [None, None]
    assert report.notes == ["x.weight, y.weight: different shapes, or NaN or infinite values: no figures"]


def whole_numbers(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.tensor([[float((seed * i + 3 * j + i * j) % 5 - 2) for j in range(columns)] for i in range(rows)])


def toy(folder: Path, seed: int, modules: tuple[str, ...], **config: Any) -> Path:
    """Write an adapter of small whole numbers."""
    rank = config.get("r", 2)
    write_adapter(folder, **config)
    tensors = {}
    for position, module in enumerate(modules):
        tensors[f"base_model.model.{module}.lora_A.weight"] = whole_numbers(rank, 6, seed + position)
        tensors[f"base_model.model.{module}.lora_B.weight"] = whole_numbers(4, rank, seed + 2 * position)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def rounded(value: Any) -> Any:
    """Return JSON with floats of nine digits; what is rounding alone becomes 0."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if abs(value) > 1e-12 else 0.0
    return value


def test_the_json_of_a_diff_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    toy(Path("a"), 1, ("m.0.q", "m.0.v", "m.1.q"), target_modules=["q", "v"])
    toy(Path("b"), 2, ("m.0.q", "m.1.q", "m.1.v"), target_modules=["v", "q"], r=1, lora_alpha=3)
    assert run(["diff", "./a", "./b", "--spectrum", "--json"]) == 0
    out = capsys.readouterr()
    assert out.err == ""
    assert rounded(json.loads(out.out)) == json.loads(GOLDEN.read_text())


def test_what_a_person_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy(tmp_path / "a", 1, ("m.0.q", "m.1.q"))
    toy(tmp_path / "b", 2, ("m.1.q", "m.2.q"), lora_alpha=40)
    assert run(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("MODULE"))
    assert "lora_alpha: 4 → 40" in lines[:start]
    shown = [line.split()[3] for line in lines[start + 1 : start + 4]]
    assert shown == sorted(shown, key=float, reverse=True)
    assert lines[-1].startswith("1 changed, 1 added, 1 removed, 0 same; distance ")
    assert run(["-q", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert set(capsys.readouterr().out.split()) == {"m.0.q", "m.1.q", "m.2.q"}


def test_zero_and_what_is_no_number(workspace: Workspace, tmp_path: Path) -> None:
    a = toy(tmp_path / "a", 1, ("m.0.q",))
    for name, value in (("zero", 0.0), ("nan", float("nan"))):
        copy = shutil.copytree(a, tmp_path / name) / "adapter_model.safetensors"
        tensors = {key: tensor * value if "lora_B" in key else tensor for key, tensor in load_file(copy).items()}
        save_file(tensors, copy)
    module = workspace.diff(str(tmp_path / "zero"), str(a)).modules[0]
    assert (module.norm_a, module.relative_distance, module.cosine, module.rank_a) == (0.0, None, None, 0)
    assert module.subspace_similarity is None
    both = workspace.diff(str(tmp_path / "zero"), str(tmp_path / "zero"))
    assert (both.modules[0].status, both.summary.distance, both.summary.cosine) == ("same", 0.0, None)
    with pytest.raises(IncompatibleError, match=r"m\.0\.q\.lora_B\.weight holds NaN"):
        workspace.diff(str(a), str(tmp_path / "nan"))


def test_one_module_of_two_shapes_is_another_base(workspace: Workspace, tmp_path: Path) -> None:
    a, b = toy(tmp_path / "a", 1, ("m.0.q",)), toy(tmp_path / "b", 1, ("m.0.q",))
    tensors = load_file(b / "adapter_model.safetensors")
    tensors["base_model.model.m.0.q.lora_A.weight"] = torch.ones(2, 7)
    save_file(tensors, b / "adapter_model.safetensors")
    with pytest.raises(IncompatibleError, match=r"m\.0\.q: the deltas are 4 × 6 and 4 × 7"):
        workspace.diff(str(a), str(b))


def test_reports_are_json(workspace: Workspace, tmp_path: Path) -> None:
    a, b = toy(tmp_path / "a", 1, ("m.0.q",)), toy(tmp_path / "b", 2, ("m.0.q",))
    assert json.loads(json.dumps(to_json(workspace.diff(str(a), str(b))), allow_nan=False))["kind"] == "adapters"


def test_the_example_of_the_documentation_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    example = (root / "docs" / "comparing.md").read_text(encoding="utf-8").split("```python\n")[1].partition("```")[0]
    made: dict[str, Any] = {}
    exec(compile(example, "comparing.md", "exec"), made)
    assert made["found"].distances.relative_distance > 0
    assert 0 < made["found"].inputs.similarity <= 1
