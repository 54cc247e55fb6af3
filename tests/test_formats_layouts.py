"""Adapters that name a base's modules as another layout of the same model does: Stable Diffusion, OpenCLIP, Flux."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramgr import AddOptions, IncompatibleError, Workspace
from loramgr.adapter import LowRank
from loramgr.formats import read_adapter
from loramgr.formats.other_layouts import other_names
from loramgr.tensorfile import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore")
Weights = dict[str, torch.Tensor]

# of a UNet with two layers a block, the first down and the last up block without attention
PLACES = {
    "input_blocks.1.0": "down_blocks.0.resnets.0",
    "input_blocks.2.0": "down_blocks.0.resnets.1",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0": "down_blocks.1.resnets.0",
    "input_blocks.4.1": "down_blocks.1.attentions.0",
    "input_blocks.5.0": "down_blocks.1.resnets.1",
    "input_blocks.5.1": "down_blocks.1.attentions.1",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0",
    "output_blocks.0.1": "up_blocks.0.attentions.0",
    "output_blocks.1.0": "up_blocks.0.resnets.1",
    "output_blocks.1.1": "up_blocks.0.attentions.1",
    "output_blocks.2.0": "up_blocks.0.resnets.2",
    "output_blocks.2.1": "up_blocks.0.attentions.2",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.3.0": "up_blocks.1.resnets.0",
    "output_blocks.4.0": "up_blocks.1.resnets.1",
    "output_blocks.5.0": "up_blocks.1.resnets.2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "out.0": "conv_norm_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


@cache
def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        cross_attention_dim=12,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=20,
    ).double()


def _original(name: str) -> str:
    """Return a parameter's name in the original layout."""
    for original, theirs in PLACES.items():
        if name.startswith(f"{theirs}."):
            rest = name.removeprefix(f"{theirs}.")
            part, _, parameter = rest.rpartition(".")
            inner = {other: own for own, other in RESNET.items()}.get(part, part) if ".resnets." in theirs else part
            return ".".join(each for each in (original, inner, parameter) if each)
    raise KeyError(name)


def _factors(model: torch.nn.Module, rank: int = 2) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Return factors and an alpha for every linear layer and convolution, by the module's name.

    The alpha is one for all: of several, diffusers 0.42 gives attention layers the commonest.
    """
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            down = torch.randn((rank, *layer.weight.shape[1:]), generator=generator, dtype=torch.float64)
            ones = (1,) * (layer.weight.dim() - 2)
            up = torch.randn((layer.weight.shape[0], rank, *ones), generator=generator, dtype=torch.float64)
            found[name] = (down * 0.1, up, 1.0)
    return found


def _kohya(path: Path, factors: Mapping[str, Any], rename: Callable[[str], str], prefix: str = "lora_unet_") -> Path:
    tensors: Weights = {}
    for name, (down, up, alpha) in factors.items():
        flat = prefix + rename(name).replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _merged(folder: Path, base: Path, adapter: Path) -> Weights:
    workspace = Workspace(folder)
    workspace.base_add(base, "base")
    assert not workspace.add(adapter, AddOptions(name="a", base="base")).warnings
    workspace.merge("base", ["a"], folder / "merged")
    (path,) = (folder / "merged").glob("*.safetensors")
    return load_file(path)


def _by_diffusers(adapter: Path) -> Weights:
    """Return the weights that diffusers makes of the kohya file, by its own conversion of the names."""
    from diffusers.loaders import lora_conversion_utils as theirs

    unet = copy.deepcopy(_unet())
    tensors = theirs._maybe_map_sgm_blocks_to_diffusers(load_file(adapter), unet.config)
    tensors, alphas = theirs._convert_non_diffusers_lora_to_diffusers(tensors)
    unet.load_lora_adapter(tensors, network_alphas=alphas, prefix="unet")
    unet.fuse_lora()
    unet.unload_lora()
    return dict(unet.state_dict())


def _close(merged: Weights, expected: Weights) -> None:
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (merged[name] - tensor).abs().max() <= 1e-12, name


def test_a_unet_in_either_layout_takes_names_of_the_other(tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet, prefix = _unet(), "model.diffusion_model."
    weights = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    save_file(weights, tmp_path / "theirs.safetensors")
    original = {prefix + _original(name): tensor for name, tensor in weights.items()}
    save_file(original, tmp_path / "original.safetensors")
    back = convert_ldm_unet_checkpoint(dict(original), dict(unet.config))
    assert back.keys() == weights.keys()
    factors = _factors(unet)
    sgm = _kohya(
        tmp_path / "sgm.safetensors", factors, lambda name: _original(f"{name}.weight").removesuffix(".weight")
    )
    own = _kohya(tmp_path / "own.safetensors", factors, lambda name: name)
    expected = _by_diffusers(sgm)
    assert all((expected[f"{name}.weight"] - weights[f"{name}.weight"]).abs().max() > 1e-3 for name in factors)
    _close(_merged(tmp_path / "1", tmp_path / "theirs.safetensors", sgm), expected)
    renamed = {prefix + _original(name): tensor for name, tensor in expected.items()}
    _close(_merged(tmp_path / "2", tmp_path / "original.safetensors", own), renamed)


SIZES: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.mark.parametrize("name", SIZES)
def test_every_module_of_the_real_models_has_its_other_name(name: str) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SIZES[name])
    prefix, weights = "model.diffusion_model.", dict(unet.state_dict())
    others = {places[0].weight: f"{other}.weight" for other, places in other_names(_specs(weights)).items()}
    assert {name.rpartition(".")[0] for name in others} == {name.rpartition(".")[0] for name in weights}
    original = {}
    for parameter, tensor in weights.items():
        module, _, leaf = parameter.rpartition(".")
        original[f"{prefix}{others[f'{module}.weight'].removesuffix('weight')}{leaf}"] = tensor
    theirs = convert_ldm_unet_checkpoint(dict(original), dict(unet.config))
    assert {name: id(tensor) for name, tensor in theirs.items()} == {name: id(each) for name, each in weights.items()}
    back = {places[0].weight: f"{other}.weight" for other, places in other_names(_specs(original)).items()}
    assert back == {f"{prefix}{other}": f"{prefix}{own}" for own, other in others.items()}


def _specs(weights: Weights) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in weights.items()}


@cache
def _flux() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(1, 1, 2),
    )


def _fused_flux(weights: Weights) -> Weights:
    """Return the weights of Flux in its own layout, of those in diffusers'."""
    found: Weights = {}

    def put(name: str, *parts: str) -> None:
        for parameter in ("weight", "bias"):
            found[f"{name}.{parameter}"] = torch.cat([weights[f"{part}.{parameter}"] for part in parts])

    for n in range(2):
        block = f"transformer_blocks.{n}"
        for side, to, mod, ff, out in (
            ("img", ("to_q", "to_k", "to_v"), "norm1", "ff", "to_out.0"),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm1_context", "ff_context", "to_add_out"),
        ):
            put(f"double_blocks.{n}.{side}_attn.qkv", *(f"{block}.attn.{part}" for part in to))
            put(f"double_blocks.{n}.{side}_attn.proj", f"{block}.attn.{out}")
            put(f"double_blocks.{n}.{side}_mod.lin", f"{block}.{mod}.linear")
            put(f"double_blocks.{n}.{side}_mlp.0", f"{block}.{ff}.net.0.proj")
            put(f"double_blocks.{n}.{side}_mlp.2", f"{block}.{ff}.net.2")
        single = f"single_transformer_blocks.{n}"
        put(
            f"single_blocks.{n}.linear1",
            *(f"{single}.attn.{part}" for part in ("to_q", "to_k", "to_v")),
            f"{single}.proj_mlp",
        )
        put(f"single_blocks.{n}.linear2", f"{single}.proj_out")
        put(f"single_blocks.{n}.modulation.lin", f"{single}.norm.linear")
    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    for own, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        put(f"{own}_in.in_layer", f"time_text_embed.{theirs}_embedder.linear_1")
        put(f"{own}_in.out_layer", f"time_text_embed.{theirs}_embedder.linear_2")
    put("final_layer.linear", "proj_out")
    for parameter in ("weight", "bias"):
        scale, shift = weights[f"norm_out.linear.{parameter}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{parameter}"] = torch.cat([shift, scale])
    return found


def _random_factors(weights: Weights, rank: int = 2) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    generator = torch.Generator().manual_seed(2)
    found = {}
    for name, tensor in weights.items():
        if name.endswith(".weight") and tensor.dim() == 2:
            down, up = (
                torch.randn(shape, generator=generator) for shape in ((rank, tensor.shape[1]), (len(tensor), rank))
            )
            found[name.removesuffix(".weight")] = (down * 0.1, up, 1.0)
    return found


def _added(weights: Weights, factors: Mapping[str, Any]) -> Weights:
    found = {name: tensor.double() for name, tensor in weights.items()}
    for name, (down, up, alpha) in factors.items():
        found[f"{name}.weight"] = found[f"{name}.weight"] + alpha / len(down) * up.double() @ down.double()
    return found


def _near(merged: Weights, expected: Weights) -> None:
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (merged[name].double() - tensor).abs().max() <= 2e-7, name  # float32 rounds once


def test_flux_in_either_layout_takes_fused_and_split_projections(tmp_path: Path) -> None:
    norms = re.compile(r".*\.norm_(added_)?[qk]\.weight")  # of queries and keys: no linear layers
    weights = {name: tensor.clone() for name, tensor in _flux().state_dict().items() if not norms.fullmatch(name)}
    fused = _fused_flux(weights)
    save_file(weights, tmp_path / "theirs.safetensors")
    save_file(fused, tmp_path / "own.safetensors")
    factors = _random_factors(fused)
    kohya = _kohya(tmp_path / "kohya.safetensors", factors, lambda name: name)
    _near(_merged(tmp_path / "1", tmp_path / "own.safetensors", kohya), _added(fused, factors))
    merged = _merged(tmp_path / "2", tmp_path / "theirs.safetensors", kohya)
    assert merged.keys() == weights.keys()
    _near(_fused_flux(merged), _added(fused, factors))
    split = _random_factors(weights)
    alphas = {name: (*pair[:2], 1.0 + index % 3) for index, (name, pair) in enumerate(split.items())}
    theirs = _kohya(tmp_path / "split.safetensors", alphas, lambda name: name, "lora_transformer_")
    _near(_merged(tmp_path / "3", tmp_path / "theirs.safetensors", theirs), _added(weights, alphas))
    _near(_merged(tmp_path / "4", tmp_path / "own.safetensors", theirs), _fused_flux(_added(weights, alphas)))


def test_flux_modules_are_those_of_diffusers_own_conversion(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    names = [name.removesuffix(".weight") for name in _fused_flux(dict(_flux().state_dict())) if "blocks.0" in name]
    rows = {"qkv": 9216, "linear1": 21504}
    factors = {
        name: (torch.randn(1, 8), torch.randn(rows.get(name.rpartition(".")[2], 3072), 1), 1.0)
        for name in names
        if not name.endswith("bias")
    }
    path = _kohya(tmp_path / "flux.safetensors", factors, lambda name: name)
    theirs = _convert_kohya_flux_lora_to_diffusers(load_file(path))
    up = {name.removesuffix(".lora_B.weight"): tensor for name, tensor in theirs.items() if ".lora_B." in name}
    assert len(up) == len(factors) + 2 + 2 + 3
    specs = {f"{name}.weight": TensorSpec(f"{name}.weight", "F32", (len(tensor), 8)) for name, tensor in up.items()}
    updates = read_adapter(path).resolved(specs, None).updates
    assert updates.keys() == specs.keys()
    for name, tensor in up.items():
        update = updates[f"{name}.weight"]
        assert isinstance(update, LowRank)
        down = theirs[f"{name}.lora_A.weight"]
        assert torch.equal(update.scaling * update.lora_B.load() @ update.lora_A.load(), tensor @ down), name


def test_a_text_encoder_of_openclip_takes_the_names_of_clip(tmp_path: Path) -> None:
    root, layer = "conditioner.embedders.1.model.transformer", "text_model_encoder_layers_0"
    generator = torch.Generator().manual_seed(3)
    shapes = {"attn.in_proj_weight": (24, 8), "attn.in_proj_bias": (24,), "attn.out_proj.weight": (8, 8)}
    shapes |= {"mlp.c_fc.weight": (32, 8), "mlp.c_proj.weight": (8, 32)}
    base = {f"{root}.resblocks.0.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base["conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"] = torch.ones(8, 8)
    save_file(base, tmp_path / "base.safetensors")
    parts = {f"{layer}_self_attn_{part}": (8, 8) for part in ("q_proj", "v_proj", "out_proj")}
    parts |= {f"{layer}_mlp_fc1": (32, 8), f"{layer}_mlp_fc2": (8, 32)}
    factors = {
        name: (torch.randn(2, inputs, generator=generator), torch.randn(rows, 2, generator=generator), 2.0)
        for name, (rows, inputs) in parts.items()
    }
    path = _kohya(tmp_path / "te.safetensors", factors, lambda name: name, "lora_te2_")
    delta = {name: up.double() @ down.double() for name, (down, up, _) in factors.items()}
    zeros = torch.zeros(8, 8, dtype=torch.float64)
    attention = [delta.get(f"{layer}_self_attn_{part}", zeros) for part in ("q_proj", "k_proj", "v_proj")]
    changes = {
        "attn.in_proj_weight": torch.cat(attention),
        "attn.out_proj.weight": delta[f"{layer}_self_attn_out_proj"],
        "mlp.c_fc.weight": delta[f"{layer}_mlp_fc1"],
        "mlp.c_proj.weight": delta[f"{layer}_mlp_fc2"],
    }
    expected = {name: tensor.double() for name, tensor in base.items()}
    for name, change in changes.items():
        expected[f"{root}.resblocks.0.{name}"] += change
    merged = _merged(tmp_path / "home", tmp_path / "base.safetensors", path)
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor.float()), name


def test_what_cannot_be_cut_or_joined_is_refused(tmp_path: Path) -> None:
    weights = dict(_flux().state_dict())
    fused = _fused_flux(weights)
    specs = {"split": _specs(weights), "fused": _specs(fused)}

    def refused(kind: str, tensors: Weights, message: str) -> None:
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(IncompatibleError, match=message):
            read_adapter(tmp_path / "a.safetensors").resolved(specs[kind], None)

    qkv, to_q = "lora_unet_double_blocks_0_img_attn_qkv", "lora_transformer_transformer_blocks_0_attn_to_q"
    refused(
        "split", {f"{qkv}.lokr_w1": torch.ones(3, 2), f"{qkv}.lokr_w2": torch.ones(8, 4)}, "cannot be cut into rows"
    )
    pair = {f"{qkv}.lora_down.weight": torch.ones(2, 8), f"{qkv}.lora_up.weight": torch.ones(23, 2)}
    refused("split", pair, "24 rows, and the adapter's has another size")
    pair = {f"{to_q}.lora_down.weight": torch.ones(2, 8), f"{to_q}.lora_up.weight": torch.ones(8, 2)}
    refused("fused", pair | {f"{to_q}.dora_scale": torch.ones(8, 1)}, "DoRA on some of its rows only")
    refused("fused", {f"{to_q}.diff": torch.ones(8, 8)}, "only low-rank updates are joined")
