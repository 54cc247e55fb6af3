"""PEFT adapters written as kohya's and LyCORIS' files and read back, by loramgr and by LyCORIS itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kohya_files import Network, live_network, live_weights, save_network
from peft_files import tiny_gpt2, tiny_llama, write_adapter
from safetensors.torch import load_file

from loramgr import IncompatibleError
from loramgr.formats import examine, read_adapter
from loramgr.formats.writing import Written
from loramgr.formats.writing import write_adapter as write_as
from loramgr.tensorfile import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and LyCORIS warn of what these tests do on purpose

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 5},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}},
    "dora": {"use_dora": True},
    "bfloat16": {},
}


def _trained(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | options
    live = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return live.eval()


def _written(folder: Path, adapter: Path, format: str) -> Path:
    folder.mkdir()
    write_as(read_adapter(adapter), format, Written(folder))
    return folder


@pytest.mark.parametrize("format", ["kohya", "lycoris", "diffusers"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_there_and_back(tmp_path: Path, kind: str, format: str) -> None:
    live = _trained(tiny_llama(), **CONFIGS[kind])
    if kind == "bfloat16":
        live = live.to(torch.bfloat16)
    live.save_pretrained(tmp_path / "peft")
    adapter = read_adapter(tmp_path / "peft")
    away = read_adapter(_written(tmp_path / "away", tmp_path / "peft", format))
    assert away.format == ("diffusers" if format == "diffusers" else format)
    assert {name: each.scaling for name, each in away.updates.items()} == pytest.approx(  # type: ignore[union-attr]
        {name: each.scaling for name, each in adapter.updates.items()},  # type: ignore[union-attr]
        rel=2**-40,
    )
    back = read_adapter(_written(tmp_path / "back", tmp_path / "away", "peft"))
    assert examine(back).weights_digest == examine(adapter).weights_digest
    assert back.method == adapter.method


def test_lycoris_reads_what_is_written(tmp_path: Path) -> None:
    from lycoris import LycorisNetwork, create_lycoris_from_weights
    from lycoris.kohya import create_network_from_weights

    model = tiny_llama()
    live = _trained(tiny_llama(), use_rslora=True, alpha_pattern={"v_proj": 3})
    live.save_pretrained(tmp_path / "peft")
    for format, create in (("lycoris", create_lycoris_from_weights), ("kohya", create_network_from_weights)):
        (path,) = _written(tmp_path / format, tmp_path / "peft", format).iterdir()
        LycorisNetwork.LORA_PREFIX = "lycoris"
        arguments = (1.0, str(path), model) if format == "lycoris" else (1.0, str(path), None, [], model)
        network = create(*arguments)[0]
        loras = network.loras if format == "lycoris" else network.unet_loras
        assert len(loras) == 4
        names = {module: name for name, module in model.named_modules()}
        for lora in loras:
            name = names[lora.org_module[0]]
            layer = live.base_model.model.get_submodule(name)
            expected = layer.get_delta_weight("default").double()
            found = lora.get_diff_weight()[0].double()
            assert (found - expected).norm() <= 2**-22 * expected.norm()


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("locon", {"use_tucker": True}),
    ("lora", {"dora_wd": True}),
    ("loha", {}),
    ("loha", {"use_tucker": True}),
    ("lokr", {"factor": 2}),
    ("lokr", {"full_matrix": True}),
]


@pytest.mark.parametrize(("algo", "options"), METHODS)
def test_lycoris_reads_its_methods_again(tmp_path: Path, algo: str, options: dict[str, Any]) -> None:
    from lycoris import create_lycoris_from_weights

    model = Network()
    specs = {name: TensorSpec(name, "F64", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    network = live_network(model, algo, **options)
    adapter = read_adapter(save_network(tmp_path / "a.safetensors", network)).resolved(specs, None)
    for format in ("lycoris", "kohya"):
        (tmp_path / format).mkdir()
        write_as(adapter, format, Written(tmp_path / format))
        back = read_adapter(tmp_path / format)
        assert back.updates.keys() == adapter.updates.keys()
        assert back.method in (adapter.method, "lora")
    (path,) = (tmp_path / "lycoris").iterdir()
    reader = Network()
    again = create_lycoris_from_weights(1.0, str(path), reader)[0]
    assert len(again.loras) == 6
    again.apply_to()
    again.double()
    expected = live_weights(model)
    for name, tensor in live_weights(reader).items():
        assert (tensor - expected[name]).abs().max() <= 1e-6, name


def test_what_kohya_cannot_hold_is_named(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    refused = {
        "embedding": LoraConfig(target_modules=["embed_tokens"]),
        "whole": LoraConfig(target_modules=["o_proj"], modules_to_save=["lm_head"]),
    }
    for name, config in refused.items():
        get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / name)
        with pytest.raises(IncompatibleError, match=r"embed_tokens|lm_head"):
            _written(tmp_path / f"{name}-out", tmp_path / name, "kohya")
        with pytest.raises(IncompatibleError, match=r"embed_tokens|lm_head"):
            _written(tmp_path / f"{name}-diffusers", tmp_path / name, "diffusers")
    get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["c_attn"])).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(IncompatibleError, match=r"c_attn.*stored as"):
        _written(tmp_path / "gpt2-out", tmp_path / "gpt2", "kohya")


def test_names_that_would_be_one_are_refused(tmp_path: Path) -> None:
    shapes = {
        f"{module}.lora_{side}.weight": shape
        for module in ("a.b_q", "a_b.q")
        for side, shape in (("A", (2, 4)), ("B", (6, 2)))
    }
    write_adapter(tmp_path / "peft", shapes, target_modules=["b_q", "q"])
    with pytest.raises(IncompatibleError, match="both lora_unet_a_b_q"):
        _written(tmp_path / "out", tmp_path / "peft", "kohya")


def test_a_scaling_of_zero_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "peft", lora_alpha=0)
    with pytest.raises(IncompatibleError, match="scaling is 0"):
        _written(tmp_path / "out", tmp_path / "peft", "kohya")


def test_an_alpha_of_rslora_is_exact(tmp_path: Path) -> None:
    write_adapter(tmp_path / "peft", use_rslora=True)
    (path,) = _written(tmp_path / "out", tmp_path / "peft", "kohya").iterdir()
    alpha = load_file(path)["lora_unet_m_q.alpha"]
    assert alpha.dtype == torch.float64
    assert alpha.item() / 2 == 4 / 2**0.5


def test_hadamard_and_kronecker_products_of_peft(tmp_path: Path) -> None:
    from lycoris import create_lycoris_from_weights
    from peft import LoHaConfig, LoKrConfig, get_peft_model

    targets = ["q_proj", "down_proj"]
    configs = [
        LoHaConfig(r=2, alpha=3, target_modules=targets),
        LoKrConfig(r=1, alpha=3, target_modules=targets),
        LoKrConfig(r=8, alpha=3, target_modules=targets),
    ]
    generator = torch.Generator().manual_seed(6)
    for number, config in enumerate(configs):
        model = tiny_llama()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        live = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        live.save_pretrained(tmp_path / f"peft{number}")
        (path,) = _written(tmp_path / f"out{number}", tmp_path / f"peft{number}", "lycoris").iterdir()
        reader = tiny_llama()
        loras = create_lycoris_from_weights(1.0, str(path), reader)[0].loras
        names = {module: name for name, module in reader.named_modules()}
        merged = live.merge_and_unload().state_dict()
        assert len(loras) == 4
        for lora in loras:
            weight = f"{names[lora.org_module[0]]}.weight"
            delta = merged[weight].double() - before[weight].double()
            assert (lora.get_weight(lora.shape).double() - delta).norm() <= 1e-6 * merged[weight].norm(), weight
