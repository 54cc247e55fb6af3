"""What diffusers writes, in its old and new spellings, and what it reads of what loramgr writes."""

from __future__ import annotations

import copy
import enum
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramgr import AddOptions, IncompatibleError, IntegrityError, Workspace
from loramgr.adapter import LowRank, Shift
from loramgr.formats import examine, read_adapter
from loramgr.formats.writing import Written, write_adapter

os.environ["HF_HUB_OFFLINE"] = "1"
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and PEFT warn of what these tests do on purpose

TARGETS = ["to_q", "to_out.0", "conv1"]


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def _randomize(model: Any) -> Any:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def _weights(unet: Any) -> dict[str, torch.Tensor]:
    """Return the model's weights with its adapter merged, by the names of the plain model."""
    unet.fuse_lora(safe_fusing=False)
    return {
        name.replace(".base_layer", ""): tensor for name, tensor in unet.state_dict().items() if "lora_" not in name
    }


def _merged(tmp_path: Path, adapter: Path) -> dict[str, torch.Tensor]:
    workspace = Workspace(tmp_path / "home")
    workspace.base_add(tmp_path / "base.safetensors", "base")
    workspace.add(adapter, AddOptions(name="adapter", base="base"))
    workspace.merge("base", ["adapter"], tmp_path / "merged")
    (path,) = (tmp_path / "merged").glob("*.safetensors")
    return load_file(path)


def _compare(
    merged: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], before: dict[str, torch.Tensor]
) -> None:
    assert merged.keys() == expected.keys()
    assert sum(not torch.equal(merged[name], before[name]) for name in before) >= 8
    for name, tensor in merged.items():
        assert (tensor - expected[name]).abs().max() <= 1e-6, name


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "r": 3}, {"use_dora": True}, {"alpha_pattern": {"to_q": 9}}]
)
def test_a_merge_is_the_fused_model(tmp_path: Path, options: dict[str, Any]) -> None:
    from peft import LoraConfig

    unet = _unet()
    targets = TARGETS if "use_dora" not in options else TARGETS[:2]
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    save_file(before, tmp_path / "base.safetensors")
    unet.add_adapter(LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": targets} | options))
    _randomize(unet).save_lora_adapter(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert (adapter.format, adapter.method) == ("diffusers", "dora" if "use_dora" in options else "lora")
    assert set(adapter.target_modules) == set(targets)
    _compare(_merged(tmp_path, tmp_path / "adapter"), _weights(unet), before)


def test_every_spelling_is_the_same_adapter(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn((2, 4), generator=generator), torch.randn((6, 2), generator=generator)
    spellings = {
        "processor": ("attn1.processor.to_out_lora.down.weight", "attn1.processor.to_out_lora.up.weight"),
        "layer": ("attn1.to_out.0.lora.down.weight", "attn1.to_out.0.lora.up.weight"),
        "linear_layer": ("attn1.to_out.0.lora_linear_layer.down.weight", "attn1.to_out.0.lora_linear_layer.up.weight"),
        "peft": ("attn1.to_out.0.lora_A.weight", "attn1.to_out.0.lora_B.weight"),
    }
    for spelling, (first, second) in spellings.items():
        for component in ("", "unet."):
            path = tmp_path / f"{spelling}.safetensors"
            save_file({component + first: down, component + second: up}, path)
            adapter = read_adapter(path)
            assert [*adapter.updates] == [f"{component}attn1.to_out.0.weight"], spelling
            (update,) = adapter.updates.values()
            assert isinstance(update, LowRank)
            assert (update.scaling, adapter.target_modules) == (1.0, ("to_out.0",))
            assert torch.equal(update.lora_A.load(), down)
            assert any("scaling of 1" in said for said in adapter.warnings)


def test_an_old_text_encoder(tmp_path: Path) -> None:
    old = "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora"
    save_file(
        {f"{old}.down.weight": torch.ones(2, 4), f"{old}.up.weight": torch.ones(4, 2)}, tmp_path / "a.safetensors"
    )
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert [*adapter.updates] == ["text_encoder.text_model.encoder.layers.0.self_attn.out_proj.weight"]


def test_real_old_names(shared_data: Path) -> None:
    adapter = read_adapter(shared_data / "found" / "diffusers-catundchat")
    assert (adapter.format, adapter.method, adapter.dialect) == ("diffusers", "lora", "attention processors")
    assert (len(adapter.updates), set(adapter.ranks.values())) == (128, {4})
    assert adapter.target_modules == ("to_k", "to_out.0", "to_q", "to_v")
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight" in adapter.updates


def _noted(tmp_path: Path, noted: Any, names: tuple[str, ...] = ("unet.a",)) -> Path:
    tensors = {}
    for name in names:
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(6, 2)}
    text = noted if isinstance(noted, str) else json.dumps(noted)
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    return tmp_path / "a.safetensors"


GOOD = {"unet.peft_type": "LORA", "unet.r": 2, "unet.lora_alpha": 6, "unet.target_modules": ["a"]}


def test_metadata_says_the_alpha(tmp_path: Path) -> None:
    adapter = read_adapter(_noted(tmp_path, GOOD | {"unet.use_rslora": True}))
    (update,) = adapter.updates.values()
    assert isinstance(update, LowRank)
    assert (update.alpha, update.scaling) == (6, 6 / 2**0.5)
    assert adapter.scaling == 6 / 2**0.5


@pytest.mark.parametrize(
    ("noted", "error", "message"),
    [
        (GOOD | {"unet.r": 3}, IncompatibleError, "rank 2.*says 3"),
        (GOOD | {"unet.use_dora": True}, IncompatibleError, "use_dora"),
        (GOOD | {"unet.r": None}, IncompatibleError, "r is None"),
        ({"transformer.r": 2}, IncompatibleError, "says nothing of unet"),
        ("[" * 100_000, IntegrityError, "not valid JSON"),
        ("[]", IncompatibleError, "not a JSON object"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, noted: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_adapter(_noted(tmp_path, noted))


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"rank_pattern": {"to_q": 4}}, {"use_dora": True}])
def test_diffusers_reads_what_is_written(tmp_path: Path, options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    settings = {"r": 2, "lora_alpha": 5, "target_modules": TARGETS[: 2 if "use_dora" in options else 3]} | options
    live = _randomize(get_peft_model(_unet(), LoraConfig(**settings)))
    live.save_pretrained(tmp_path / "peft")
    (tmp_path / "written").mkdir()
    adapter = read_adapter(tmp_path / "peft")
    notes = write_adapter(adapter, "diffusers", Written(tmp_path / "written"))
    assert any("unet" in note for note in notes)
    reader = _unet()
    reader.load_lora_adapter(tmp_path / "written", prefix="unet", use_safetensors=True)
    expected = live.merge_and_unload().state_dict()
    for name, tensor in _weights(reader).items():
        assert (tensor - expected[name]).abs().max() <= 1e-6, name
    back = read_adapter(tmp_path / "written")
    assert back.updates.keys() == adapter.updates.keys()
    (tmp_path / "back").mkdir()
    write_adapter(back, "peft", Written(tmp_path / "back"))
    assert examine(read_adapter(tmp_path / "back")).weights_digest == examine(adapter).weights_digest


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 3}}])
def test_diffusers_reads_a_written_text_encoder(tmp_path: Path, options: dict[str, Any]) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=20, max_position_embeddings=10, projection_dim=8, **sizes))
    reader = copy.deepcopy(text)
    live = _randomize(get_peft_model(text, LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "fc1"], **options)))
    config = live.peft_config["default"].to_dict()
    metadata = json.dumps({f"text_encoder.{key}": _plain(value) for key, value in config.items()})
    state = {
        name.replace("base_model.model.", "text_encoder.").replace(".default", "").removesuffix(".weight")
        + ("" if "magnitude" in name else ".weight"): tensor.contiguous()
        for name, tensor in live.state_dict().items()
        if "lora_" in name
    }
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": metadata})
    (tmp_path / "written").mkdir()
    write_adapter(read_adapter(tmp_path / "a.safetensors"), "diffusers", Written(tmp_path / "written"))
    found, alphas, noted = StableDiffusionPipeline.lora_state_dict(
        str(tmp_path / "written" / "pytorch_lora_weights.safetensors"), return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_text_encoder(
        found, network_alphas=alphas, text_encoder=reader, metadata=noted, prefix="text_encoder"
    )
    inputs = torch.arange(6)[None]
    with torch.no_grad():
        assert (reader(inputs)[0] - live(inputs)[0]).abs().max() <= 1e-6


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value.value if isinstance(value, enum.Enum) else value


def test_metadata_scales_the_bias_of_lora_b_too(tmp_path: Path) -> None:
    config = {"r": 2, "lora_alpha": 5, "lora_bias": True, "target_modules": ["a"], "peft_type": "LORA"}
    noted = json.dumps({f"unet.{key}": value for key, value in config.items()})
    tensors = {"lora_A.weight": torch.ones(2, 3), "lora_B.weight": torch.ones(4, 2), "lora_B.bias": torch.ones(4)}
    path = tmp_path / "a.safetensors"
    save_file({f"unet.a.{key}": tensor for key, tensor in tensors.items()}, path, {"lora_adapter_metadata": noted})
    shift = read_adapter(path).updates["unet.a.bias"]
    assert isinstance(shift, Shift)
    assert shift.scaling == 2.5
