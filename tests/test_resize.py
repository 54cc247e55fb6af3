"""Adapters of lower rank: optimal, within their budget, with everything else as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loramgr import AddOptions, IncompatibleError, ResizeOptions, UsageError, Workspace
from loramgr.algebra.budget import kept_energy, ranks_within
from loramgr.algebra.lowrank import Product, decomposed
from loramgr.algebra.truncation import rank_of_energy, truncated
from loramgr.cli.main import run

NAMED = AddOptions(name="small")
EPS = torch.finfo(torch.float64).eps


def product(rows: int, columns: int, rank: int, seed: int) -> Product:
    generator = torch.Generator().manual_seed(seed)
    return Product.of(
        torch.randn(rows, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, columns, generator=generator, dtype=torch.float64),
    )


sizes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(0, 1000))


@given(sizes)
def test_the_full_rank_is_the_same_matrix(size: tuple[int, int, int, int]) -> None:
    whole = product(*size)
    made = truncated(whole, size[2], torch.float64)
    dense = whole.left @ whole.right
    assert torch.allclose(made.left @ made.right, dense, rtol=0, atol=100 * EPS * float(dense.norm()))
    assert made.error <= 100 * EPS * made.norm


@given(sizes, st.integers(1, 8))
def test_the_error_is_that_of_the_dropped_singular_values(size: tuple[int, int, int, int], rank: int) -> None:
    whole = product(*size)
    made = truncated(whole, rank, torch.float64)
    dense = whole.left @ whole.right
    expected = float(torch.linalg.svdvals(dense)[rank:].norm())
    assert math.isclose(made.error, expected, rel_tol=1e-6, abs_tol=100 * EPS * float(dense.norm()))
    assert math.isclose(made.norm, float(dense.norm()), rel_tol=1e-12)
    assert math.isclose(float((dense - made.left @ made.right).norm()), made.error, rel_tol=1e-6, abs_tol=1e-12)


@given(sizes, st.floats(0.01, 1))
def test_an_energy_takes_the_smallest_rank_that_keeps_it(size: tuple[int, int, int, int], energy: float) -> None:
    values = decomposed(product(*size)).values
    rank = rank_of_energy(values, energy)
    squares = values.square()
    slack = 1e-12 * float(squares.sum())
    assert float(squares[:rank].sum()) >= energy * float(squares.sum()) - slack
    assert rank == 1 or float(squares[: rank - 1].sum()) <= energy * float(squares.sum()) + slack


def test_all_of_the_energy_leaves_out_what_is_not_used() -> None:
    assert rank_of_energy(torch.tensor([3.0, 1e-9, 1e-20, 0.0], dtype=torch.float64), 1.0) == 2
    assert rank_of_energy(torch.zeros(3, dtype=torch.float64), 1.0) == 1


@pytest.mark.parametrize("factor", [2.0**800, 2.0**-800])
def test_values_whose_squares_leave_float64_keep_the_same_ranks_and_error(factor: float) -> None:
    whole = product(12, 9, 6, 3)
    scaled = whole.scaled(factor)
    values, more = decomposed(whole).values, decomposed(whole).values * factor
    assert rank_of_energy(more, 0.7) == rank_of_energy(values, 0.7) > 1
    spectra, others = ({"a": (each.tolist(), 3), "b": ((each / 2).tolist(), 2)} for each in (values, more))
    assert ranks_within(others, 9) == ranks_within(spectra, 9)
    made, wanted = truncated(scaled, 3, torch.float64), truncated(whole, 3, torch.float64)
    assert math.isclose(made.norm, wanted.norm * factor, rel_tol=1e-12)
    assert math.isclose(made.error, wanted.error * factor, rel_tol=1e-6)


matrices = st.lists(
    st.tuples(st.lists(st.floats(0.0, 10), min_size=1, max_size=6), st.integers(1, 40)), min_size=1, max_size=5
)


@given(matrices, st.integers(0, 600))
def test_a_budget_is_kept_and_never_worse_than_one_rank_for_all(
    drawn: list[tuple[list[float], int]], budget: int
) -> None:
    spectra = {str(at): (sorted(values, reverse=True), cost) for at, (values, cost) in enumerate(drawn)}
    ranks = ranks_within(spectra, budget)
    assert all(0 <= ranks[name] <= len(values) for name, (values, _) in spectra.items())
    assert sum(ranks[name] * cost for name, (_, cost) in spectra.items()) <= budget
    for rank in range(7):
        uniform = {name: min(rank, len(values)) for name, (values, _) in spectra.items()}
        if sum(uniform[name] * cost for name, (_, cost) in spectra.items()) <= budget:
            assert kept_energy(spectra, ranks) >= kept_energy(spectra, uniform) * (1 - 1e-12)


@given(st.lists(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(0, 20))
def test_a_budget_is_spent_best_where_all_ranks_cost_the_same(drawn: list[list[float]], count: int) -> None:
    spectra = {str(at): (sorted(values, reverse=True), 7) for at, values in enumerate(drawn)}
    best = sorted((value for values in drawn for value in values), reverse=True)[:count]
    kept = kept_energy(spectra, ranks_within(spectra, 7 * count + 6))
    assert math.isclose(kept, sum(value**2 for value in best), rel_tol=1e-12)


def test_a_large_matrix_is_not_left_out_for_small_ones() -> None:
    spectra = {"small": ([1.0, 0.95], 1), "large": ([2.2], 10)}
    assert ranks_within(spectra, 11) == {"small": 1, "large": 1}
    assert ranks_within(spectra, 3, needed=["small"]) == {"small": 2, "large": 0}


@pytest.fixture
def workspace(shared_data: Path, tmp_path: Path) -> Workspace:
    """Return a workspace with real adapters: all-linear with patterns, DoRA, and biases."""
    workspace = Workspace(tmp_path / "home", jobs=2)
    for base in ("tinyllama-char", "tinygpt2-char"):
        workspace.base_add(shared_data / "bases" / base)
    for path in sorted((shared_data / "trained").glob("*/*/adapter_config.json")):
        if path.parents[1].name.startswith("tiny") and "pissa" not in path.parent.name:
            name = f"{path.parents[1].name}-{path.parent.name}"
            workspace.add(path.parent, AddOptions(name=name))
    return workspace


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Return the dense delta of every module of an exported adapter, by the formulas of the file format."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = {
        name.removeprefix("base_model.model."): tensor.double()
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    found = {}
    for name, lora_A in weights.items():
        for end in (".lora_A.weight", ".lora_embedding_A"):
            if name.endswith(end):
                module = name.removesuffix(end)
                lora_B = weights[module + end.replace("_A", "_B")]
                rank = lora_A.shape[0]
                alpha = next(
                    (value for key, value in config["alpha_pattern"].items() if f".{module}".endswith(f".{key}")),
                    config["lora_alpha"],
                )
                scaling = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
                found[module] = scaling * lora_B.flatten(1) @ lora_A.flatten(1)
    return found


def adapters(workspace: Workspace) -> list[str]:
    return [each.name for each in workspace.list() if each.method == "lora" and each.rank and each.rank > 2]


def test_real_adapters_are_truncated_to_the_optimum_and_keep_all_else(workspace: Workspace, tmp_path: Path) -> None:
    names = adapters(workspace)
    assert len(names) > 8
    for name in names:
        record = workspace.resize(name, ResizeOptions(rank=2), AddOptions(name=f"{name}-2"))
        assert record.parents == [f"{name}@v1"]
        assert (record.method, record.rank, record.base) == ("resize", 2, workspace.log(name)[0].base)
        workspace.export(name, tmp_path / name)
        workspace.export(f"{name}-2", tmp_path / f"{name}-2")
        before, after = deltas(tmp_path / name), deltas(tmp_path / f"{name}-2")
        assert before.keys() == after.keys() == {each.name for each in record.errors}
        for each in record.errors:
            values = torch.linalg.svdvals(before[each.name])
            # the factors are rounded to float32: 2^-24 relative to each entry of both
            slack = 4 * 2.0**-24 * float(values.norm())
            assert abs(float((before[each.name] - after[each.name]).norm()) - each.relative_error * each.norm) < slack
            assert abs(each.relative_error * each.norm - float(values[2:].norm())) < slack
            assert math.isclose(each.norm, float(values.norm()), rel_tol=1e-9)
        one, two = (load_file(tmp_path / each / "adapter_model.safetensors") for each in (name, f"{name}-2"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one if ".lora_" not in key)


def test_a_resized_adapter_merges_as_its_deltas_say(workspace: Workspace, tmp_path: Path) -> None:
    for base in ("tinyllama-char", "tinygpt2-char"):
        name = next(each for each in adapters(workspace) if each.startswith(base) and "all" in each)
        workspace.resize(name, ResizeOptions(energy=0.6), NAMED)
        workspace.export("small", tmp_path / base)
        workspace.merge(base, ["small"], tmp_path / f"{base}-out")
        weights = load_file(Path(workspace.base_show(base).source) / "model.safetensors")
        found = load_file(tmp_path / f"{base}-out" / "model.safetensors")
        for module, delta in deltas(tmp_path / base).items():
            weight = weights[f"{module}.weight"]
            expected = weight.double() + (delta.T if base.startswith("tinygpt2") else delta)
            assert torch.equal(found[f"{module}.weight"], expected.float())


def test_modules_that_a_budget_drops_are_targets_no_more(workspace: Workspace) -> None:
    whole = workspace.log("tinyllama-char-lic-r8-qv")[0]
    record = workspace.resize(whole.name, ResizeOptions(budget=whole.parameters // (8 * len(whole.ranks)) * 2), NAMED)
    assert 0 < len(record.ranks) < len(whole.ranks)
    assert record.target_modules == sorted(record.ranks)
    assert not any("names the target" in warning for warning in record.warnings)


def test_a_budget_bounds_the_whole_adapter(workspace: Workspace) -> None:
    for name in adapters(workspace):
        parameters = workspace.log(name)[0].parameters
        others = parameters - sum(
            (module.in_features or 0) * (module.rank or 0) + (module.out_features or 0) * (module.rank or 0)
            for module in workspace.inspect(name).modules
        )
        budget = others + (parameters - others) // 2
        record = workspace.resize(name, ResizeOptions(budget=budget), AddOptions(name=f"{name}-b"))
        assert record.parameters <= budget
        uniform = workspace.resize(
            name, ResizeOptions(rank=max(1, (record.rank or 2) // 2)), AddOptions(name=f"{name}-u")
        )
        if uniform.parameters <= budget:
            assert record.relative_error <= uniform.relative_error * (1 + 1e-6)  # type: ignore[operator]


def test_the_rank_that_it_has_changes_nothing(workspace: Workspace, tmp_path: Path) -> None:
    name = "tinyllama-char-lic-r8-qv"
    record = workspace.resize(name, ResizeOptions(rank=8), NAMED)
    assert record.relative_error == 0
    assert record.weights_digest == workspace.log(name)[0].weights_digest


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (ResizeOptions(rank=9), UsageError, "has rank 8, and 9 is more"),
        (ResizeOptions(rank=0), UsageError, "rank 0 keeps nothing"),
        (ResizeOptions(energy=0), UsageError, "has to be above 0"),
        (ResizeOptions(energy=1.01), UsageError, "has to be above 0"),
        (ResizeOptions(budget=0), UsageError, "leaves nothing"),
        (ResizeOptions(budget=7), UsageError, "--budget 7 is too small"),
        (ResizeOptions(), UsageError, "has to be given"),
        (ResizeOptions(rank=2, budget=9), UsageError, "only one of them"),
    ],
)
def test_goals_without_sense_are_refused(
    workspace: Workspace, options: ResizeOptions, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        workspace.resize("tinyllama-char-lic-r8-qv", options, NAMED)
    assert "small" not in [each.name for each in workspace.list()]


def test_what_cannot_be_truncated_is_refused_by_name(workspace: Workspace, tmp_path: Path, shared_data: Path) -> None:
    dora = next(each.name for each in workspace.list() if each.method == "dora")
    with pytest.raises(IncompatibleError, match="is decomposed by DoRA"):
        workspace.resize(dora, ResizeOptions(rank=2), NAMED)
    with pytest.raises(UsageError, match="is a path"):
        workspace.resize(str(shared_data), ResizeOptions(rank=2), NAMED)
    source = tmp_path / "tiny"
    workspace.export("tinyllama-char-lic-r8-qv", source)
    weights = load_file(source / "adapter_model.safetensors")
    save_file({name: tensor * 1e-12 for name, tensor in weights.items()}, source / "adapter_model.safetensors")
    workspace.add(source, AddOptions(name="tiny"))
    with pytest.raises(IncompatibleError, match="rounds to nothing in factors of F16"):
        workspace.resize("tiny", ResizeOptions(rank=2, dtype="float16"), NAMED)


def test_the_command_line_shows_the_errors(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--home", str(tmp_path / "home"), "--json", "resize", "tinyllama-char-lic-r8-qv", "--name", "small"]
    assert run([*command, "--rank", "4", "--tag", "t"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["method"], record["rank"], record["tags"]) == ("resize", 4, ["t"])
    assert 0 < record["relative_error"] < 1
    assert run([*command, "--rank", "99"]) == 2
    assert run([*command]) == 2
