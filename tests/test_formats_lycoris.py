"""What LyCORIS writes for every algorithm, merged and compared with the live network in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kohya_files import Network, live_network, live_weights, save_base, save_network
from safetensors.torch import load_file, save_file

from loramgr import AddOptions, IncompatibleError, Workspace
from loramgr.formats import read_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # LyCORIS warns of small ranks

MERGEABLE: list[tuple[str, str, dict[str, Any]]] = [
    ("locon", "lora", {}),
    ("locon", "locon", {"use_tucker": True}),
    ("locon", "lora", {"train_norm": True}),
    ("dora", "lora", {"dora_wd": True}),
    ("dora", "lora", {"dora_wd": True, "wd_on_output": False}),
    ("loha", "loha", {}),
    ("loha", "loha", {"use_tucker": True}),
    ("loha", "loha", {"dora_wd": True}),
    ("loha", "loha", {"dora_wd": True, "wd_on_output": False}),
    ("lokr", "lokr", {"factor": 2}),
    ("lokr", "lokr", {"factor": 4, "rank": 1, "use_tucker": True}),
    ("lokr", "lokr", {"factor": 2, "rank": 1, "decompose_both": True}),
    ("lokr", "lokr", {"full_matrix": True}),
    ("lokr", "lokr", {"factor": 2, "dora_wd": True, "wd_on_output": False}),
    ("ia3", "ia3", {}),
]


def _merged(tmp_path: Path, adapter: Path) -> dict[str, torch.Tensor]:
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(tmp_path / "base.safetensors", "base")
    workspace.add(adapter, AddOptions(name="adapter", base="base"))
    workspace.merge("base", ["adapter"], tmp_path / "merged")
    return {
        name: tensor for path in (tmp_path / "merged").glob("*.safetensors") for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize(("method", "algo", "options"), MERGEABLE)
def test_a_merge_is_the_live_network(tmp_path: Path, method: str, algo: str, options: dict[str, Any]) -> None:
    model = Network()
    before = save_base(tmp_path / "base.safetensors", model)
    network = live_network(model, algo, **options)
    path = save_network(tmp_path / "adapter.safetensors", network)
    adapter = read_adapter(path)
    assert (adapter.format, adapter.method, adapter.obstacle) == ("lycoris", method, None)
    merged = _merged(tmp_path, path)
    expected = before | live_weights(model)
    if options.get("train_norm"):
        norms = {each.lora_name.removeprefix("lycoris_"): each for each in network.loras if hasattr(each, "w_norm")}
        for name in ("blocks.0.norm", "blocks.1.norm", "group"):
            weight, bias = norms[name.replace(".", "_")].get_merged_weight()
            expected |= {f"{name}.weight": weight, f"{name}.bias": bias}
    changed = [name for name, tensor in merged.items() if not torch.equal(tensor, before[name])]
    assert len(changed) >= 6
    for name, tensor in merged.items():
        assert (tensor - expected[name]).abs().max() <= 1e-12, name


def test_whole_differences_are_added(tmp_path: Path) -> None:
    model = Network()
    before = save_base(tmp_path / "base.safetensors", model)
    generator = torch.Generator().manual_seed(3)
    deltas = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for name, tensor in before.items()
    }
    suffixes = {"weight": "diff", "bias": "diff_b"}
    norms = {"weight": "w_norm", "bias": "b_norm"}
    named = {}
    for name, tensor in deltas.items():
        module, _, parameter = name.rpartition(".")
        is_norm = "norm" in module or module == "group"
        named[f"lycoris_{module.replace('.', '_')}.{(norms if is_norm else suffixes)[parameter]}"] = tensor
    save_file(named, tmp_path / "full.safetensors")
    assert read_adapter(tmp_path / "full.safetensors").method == "full"
    for name, tensor in _merged(tmp_path, tmp_path / "full.safetensors").items():
        assert torch.equal(tensor, before[name] + deltas[name])


@pytest.mark.parametrize(
    ("method", "algo", "options"),
    [("glora", "glora", {}), ("oft", "diag-oft", {}), ("boft", "boft", {}), ("tlora", "tlora", {})],
)
def test_what_has_no_formula_is_kept_and_refused(
    tmp_path: Path, method: str, algo: str, options: dict[str, Any]
) -> None:
    model = Network()
    save_base(tmp_path / "base.safetensors", model)
    path = save_network(tmp_path / "adapter.safetensors", live_network(model, algo, **options))
    adapter = read_adapter(path)
    assert adapter.method == method
    assert adapter.obstacle is not None
    with pytest.raises(IncompatibleError, match=method):
        _merged(tmp_path, path)


def test_ia3_of_inputs(tmp_path: Path) -> None:
    model = Network()
    before = save_base(tmp_path / "base.safetensors", model)
    vector = torch.linspace(-1, 1, 12, dtype=torch.float64)
    tensors = {"lycoris_blocks_0_to_q.weight": vector, "lycoris_blocks_0_to_q.on_input": torch.tensor(1)}
    save_file(tensors, tmp_path / "ia3.safetensors")
    merged = _merged(tmp_path, tmp_path / "ia3.safetensors")
    expected = before["blocks.0.to_q.weight"] * (1 + vector)
    assert torch.equal(merged["blocks.0.to_q.weight"], expected)


def test_a_real_lokr(shared_data: Path) -> None:
    adapter = read_adapter(shared_data / "found" / "lycoris-lokr")
    assert (adapter.format, adapter.method, adapter.alpha, adapter.scaling) == ("lycoris", "lokr", 4, 1)
    assert len(adapter.updates) == 350
    assert set(adapter.ranks.values()) == {4}
    assert adapter.config["ss_network_module"] == "lycoris.kohya"
    assert adapter.base_name == "animefull-final-pruned"
    assert adapter.base_file is not None
    assert (adapter.base_file.sha256[:8], adapter.base_file.piece) == ("7548b773", "5386e8fb")
    assert {"attn1_to_k", "mlp_fc1", "proj_in"} <= set(adapter.target_modules)


LINEAR = {"lycoris_a.hada_w1_a": (4, 2), "lycoris_a.hada_w1_b": (2, 3)}
LOHA = LINEAR | {"lycoris_a.hada_w2_a": (4, 2), "lycoris_a.hada_w2_b": (2, 3)}
WRONG = {
    "half": (LINEAR, "hada_w2_a"),
    "ranks": (LOHA | {"lycoris_a.hada_w1_a": (4, 3)}, "ranks do not fit"),
    "layers": (LOHA | {"lycoris_a.hada_w2_a": (5, 2)}, "different layers"),
    "one core": (LOHA | {"lycoris_a.hada_t1": (2, 2, 3, 3)}, "different layers|core"),
    "two methods": (LOHA | {"lycoris_a.lokr_w1": (2, 2)}, "several methods"),
    "half lokr": ({"lycoris_a.lokr_w1": (2, 2), "lycoris_a.lokr_w2_a": (2, 2)}, "lokr_w2_b"),
    "whole and factored": (
        {"lycoris_a.lokr_w1": (2, 2), "lycoris_a.lokr_w2": (2, 2), "lycoris_a.lokr_w2_a": (2, 2)},
        "factors of it too",
    ),
    "magnitude": (LOHA | {"lycoris_a.dora_scale": (7, 1)}, "magnitude"),
    "empty": (LOHA | {"lycoris_a.hada_w1_a": (0, 2)}, "empty"),
    "alphas": (LOHA | {"lycoris_a.alpha": (2,)}, "single number"),
    "unknown": (LOHA | {"lycoris_a.hada_w9": (2,)}, "hada_w9"),
}


@pytest.mark.parametrize(("shapes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_tensors_are_named(tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(IncompatibleError, match=message):
        read_adapter(tmp_path / "wrong.safetensors")
