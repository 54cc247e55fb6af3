"""The names that a base's modules have in another layout of the same model, as adapters of that layout call them.

Stable Diffusion's UNet in diffusers' layout (`down_blocks.1.attentions.0`) and in the original (`input_blocks.4.1`),
Flux in diffusers' (`transformer_blocks`) and in its own (`double_blocks`), and OpenCLIP's text encoder under the names
of transformers' CLIP. Sources: CompVis/stable-diffusion `ldm/modules/diffusionmodules/openaimodel.py`, open_clip
`transformer.py`, black-forest-labs/flux `src/flux/model.py`; diffusers 0.42 `loaders/lora_conversion_utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from loramgr.tensorfile import TensorSpec

__all__ = ["Place", "other_names"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where outputs of a module that another layout has lie in the base: rows `start` to `stop` of the two parameters.

    `first` is the first of the other module's outputs that lie there; `stop` None means all of either side. `weight`
    and `bias` are the parameters' whole names in the base.
    """

    weight: str
    bias: str
    start: int = 0
    stop: int | None = None
    first: int = 0


Names = Iterator[tuple[str, tuple[Place, ...]]]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_SIDES = (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0))
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_UNET_ROOT = re.compile(r"(|.+\.)(?:down_blocks\.0\.resnets|input_blocks\.1\.0\.in_layers)\.\d+")
_OPENCLIP = re.compile(r"(?P<root>(?:.+\.)?)model\.transformer\.resblocks\.(?P<layer>\d+)\.(?P<part>.+)")
_OPENCLIP_PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
_CLIP_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_FLUX_ROOT = re.compile(r"(|.+\.)(?:single_transformer_blocks\.0\.proj_mlp|single_blocks\.0\.linear1)")
_FLUX_BLOCK = re.compile(
    r"(?P<block>double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)\.(?P<n>\d+)\.(?P<part>.+)"
)
_FLUX_PARTS = {
    "double_blocks": {
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
    },
    "single_blocks": {
        "modulation.lin": ("norm.linear",),
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
    },
}
_FLUX_THEIRS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_FLUX_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_FLUX_SWAPPED = ("final_layer.adaLN_modulation.1", "norm_out.linear")  # scale and shift stand in the other order


def other_names(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[Place, ...]]:
    """Return the modules that the base would have in another layout, and where each of them lies in the base.

    Names keep what stands before the model's own (`unet.`, `model.diffusion_model.`); nothing for a base of a model
    that has one layout only.
    """
    known = {name.rpartition(".")[0] for name in specs if "." in name}
    found: dict[str, tuple[Place, ...]] = {}
    for make in (_unet_names, _openclip_names, _flux_names):
        found |= {name: places for name, places in make(known, specs) if name not in known}
    return found


def _whole(module: str) -> tuple[Place, ...]:
    return (Place(f"{module}.weight", f"{module}.bias"),)


def _unet_names(known: Collection[str], specs: Mapping[str, TensorSpec]) -> Names:
    roots = {match[1] for name in known if (match := _UNET_ROOT.match(name))}
    for root in sorted(roots):
        inside = {name.removeprefix(root) for name in known if name.startswith(root)}
        folders = {".".join(name.split(".")[:end]) for name in inside for end in range(1, name.count(".") + 2)}
        is_original = "input_blocks.1" in folders
        if not folders >= ({"output_blocks.0"} if is_original else {"up_blocks.0"}):
            continue  # a ControlNet or a VAE
        layers = dict(_layers_of_original(folders) if is_original else _layers_of_diffusers(folders))
        turned = {original: theirs for theirs, original in layers.items()}
        for name in inside:
            other = _in_original(name, layers) if not is_original else _in_diffusers(name, turned)
            if other is not None:
                yield f"{root}{other}", _whole(f"{root}{name}")


def _layers_of_diffusers(folders: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield every layer's name in diffusers' layout with that in the original one, told by the former."""
    yield from _middle()
    for side, other, first in _SIDES:
        block, number = 0, first
        while f"{side}.{block}" in folders:
            here, layer = f"{side}.{block}", 0
            while f"{here}.resnets.{layer}" in folders:
                yield f"{here}.resnets.{layer}", f"{other}.{number}.0"
                yield f"{here}.attentions.{layer}", f"{other}.{number}.1"
                number, layer = number + 1, layer + 1
            if f"{here}.downsamplers.0" in folders:
                yield f"{here}.downsamplers.0.conv", f"{other}.{number}.0.op"
                number += 1
            if f"{here}.upsamplers.0" in folders:  # beside the block's last layer, behind its attention
                at = 2 if f"{here}.attentions.{layer - 1}" in folders else 1
                yield f"{here}.upsamplers.0.conv", f"{other}.{number - 1}.{at}.conv"
            block += 1


def _layers_of_original(folders: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the same, told by the names of the original layout."""
    yield from _middle()
    for side, other, first in _SIDES:
        block, layer, number = 0, 0, first
        while f"{other}.{number}" in folders:
            here = f"{other}.{number}"
            sampler = next((at for at in (f"{here}.0.op", f"{here}.1.conv", f"{here}.2.conv") if at in folders), None)
            if sampler is None or not sampler.endswith(".op"):
                yield f"{side}.{block}.resnets.{layer}", f"{here}.0"
                yield f"{side}.{block}.attentions.{layer}", f"{here}.1"
                layer += 1
            if sampler is not None:
                yield f"{side}.{block}.{side.removesuffix('_blocks')}samplers.0.conv", sampler
                block, layer = block + 1, 0
            number += 1


def _middle() -> Iterator[tuple[str, str]]:
    for theirs, original in _MIDDLE.items():
        yield f"mid_block.{theirs}", f"middle_block.{original}"


def _in_original(name: str, layers: Mapping[str, str]) -> str | None:
    """Return a module's name in the original layout, None where it has none there."""
    layer, rest = _split(name, layers)
    if layer is None:
        return _OUTSIDE.get(name)
    if ".resnets." not in layer:
        return layers[layer] + rest
    part = _RESNET.get(rest.removeprefix("."))
    return None if part is None else f"{layers[layer]}.{part}"


def _in_diffusers(name: str, layers: Mapping[str, str]) -> str | None:
    """Return a module's name in diffusers' layout, None where it has none there."""
    layer, rest = _split(name, layers)
    if layer is None:
        return next((theirs for theirs, original in _OUTSIDE.items() if original == name), None)
    if ".resnets." not in layers[layer]:
        return layers[layer] + rest
    part = next((theirs for theirs, original in _RESNET.items() if f".{original}" == rest), None)
    return None if part is None else f"{layers[layer]}.{part}"


def _split(name: str, layers: Mapping[str, str]) -> tuple[str | None, str]:
    """Return the longest of the layers that the name is of, None for none, and what of the name is behind it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        layer = ".".join(parts[:end])
        if layer in layers:
            return layer, name.removeprefix(layer)
    return None, name


def _openclip_names(known: Collection[str], specs: Mapping[str, TensorSpec]) -> Names:
    for name in known:
        match = _OPENCLIP.fullmatch(name)
        if match is None:
            continue
        layer = f"{match['root']}transformer.text_model.encoder.layers.{match['layer']}"
        if match["part"] in _OPENCLIP_PARTS:
            yield f"{layer}.{_OPENCLIP_PARTS[match['part']]}", _whole(name)
        fused = specs.get(f"{name}.in_proj_weight")
        if match["part"] == "attn" and fused is not None:
            size = fused.shape[0] // len(_CLIP_PROJECTIONS)
            for index, part in enumerate(_CLIP_PROJECTIONS):
                place = Place(fused.name, f"{name}.in_proj_bias", index * size, (index + 1) * size)
                yield f"{layer}.self_attn.{part}", (place,)


def _flux_names(known: Collection[str], specs: Mapping[str, TensorSpec]) -> Names:
    for root in sorted({match[1] for name in known if (match := _FLUX_ROOT.fullmatch(name))}):
        is_original = f"{root}single_blocks.0.linear1" in known
        inside = {name.removeprefix(root) for name in known if name.startswith(root)}
        numbers = {match.group("block", "n") for name in inside if (match := _FLUX_BLOCK.fullmatch(name))}
        make = _from_fused if is_original else _from_split
        for own, theirs in _FLUX_THEIRS.items():
            here = sorted(n for block, n in numbers if block == (own if is_original else theirs))
            for n in here:
                for part, others in _FLUX_PARTS[own].items():
                    pieces = [f"{root}{theirs}.{n}.{other}" for other in others]
                    yield from make(f"{root}{own}.{n}.{part}", pieces, specs)
        for part, other in _FLUX_OUTSIDE.items():
            yield from make(root + part, [root + other], specs)
        ours, their = (root + each for each in _FLUX_SWAPPED)
        yield from _swapped(*((their, ours) if is_original else (ours, their)), specs)


def _from_split(whole: str, parts: list[str], specs: Mapping[str, TensorSpec]) -> Names:
    """Yield the fused module, of a base that has its parts."""
    rows = [_rows(part, specs) for part in parts]
    if len(parts) == 1 and rows[0]:
        yield whole, _whole(parts[0])
    elif all(rows):
        starts = [sum(rows[:index]) for index in range(len(rows))]
        yield (
            whole,
            tuple(
                Place(f"{part}.weight", f"{part}.bias", 0, size, first)
                for part, size, first in zip(parts, rows, starts, strict=True)
            ),
        )


def _from_fused(whole: str, parts: list[str], specs: Mapping[str, TensorSpec]) -> Names:
    """Yield the parts, of a base that has them fused: each as many rows as there are inputs, the last one the rest."""
    rows = _rows(whole, specs)
    if len(parts) == 1 and rows:
        yield parts[0], _whole(whole)
    elif rows:
        size = specs[f"{whole}.weight"].shape[-1]
        for index, part in enumerate(parts):
            stop = rows if index == len(parts) - 1 else (index + 1) * size
            yield part, (Place(f"{whole}.weight", f"{whole}.bias", index * size, stop),)


def _swapped(other: str, name: str, specs: Mapping[str, TensorSpec]) -> Names:
    rows = _rows(name, specs)
    half = rows // 2
    if rows:
        weight, bias = f"{name}.weight", f"{name}.bias"
        yield other, (Place(weight, bias, half, rows, 0), Place(weight, bias, 0, half, half))


def _rows(module: str, specs: Mapping[str, TensorSpec]) -> int:
    """Return how many outputs a module of the base has, 0 where the base has none of that name."""
    spec = specs.get(f"{module}.weight")
    return 0 if spec is None or not spec.shape else spec.shape[0]
