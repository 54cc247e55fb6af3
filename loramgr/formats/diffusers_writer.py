"""Writes an adapter as diffusers does today: PEFT's names beneath the component, the configuration in the header.

Source: diffusers 0.42 `loaders/lora_base.py` (`save_lora_weights`) and `loaders/peft.py` (`save_lora_adapter`). The
configuration has a rank and an alpha for every module that differs, so that rsLoRA and patterns are right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loramgr.adapter import Adapter, Decomposed, LowRank, Shift, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.diffusers import ADDED, METADATA
from loramgr.formats.factor_views import reshaped
from loramgr.formats.foreign_names import component_of
from loramgr.formats.layers import TASK_TYPE
from loramgr.formats.peft_writer import WrittenTensor, patterned
from loramgr.tensorfile import TensorSpec, TensorView, encode_header

__all__ = ["write_diffusers"]

FILE = "pytorch_lora_weights.safetensors"
# the first part of a module's name in the models of a pipeline, and the component that the model is there
_MODELS = {
    "down_blocks": "unet.",
    "up_blocks": "unet.",
    "mid_block": "unet.",
    "transformer_blocks": "transformer.",
    "single_transformer_blocks": "transformer.",
    "text_model": "text_encoder.",
}


def write_diffusers(adapter: Adapter, folder: Path, base_digest: str | None = None) -> list[str]:
    """Write the adapter for `load_lora_weights` or `load_lora_adapter`; return notes for a person.

    `base_digest` is noted in the metadata, None for none. Names that lie in no component get that of the model they are
    of, where it is one of a pipeline. Raises IncompatibleError, naming the parameter, for what the format cannot hold:
    everything but LoRA and DoRA on linear layers and convolutions, with or without lora_bias.
    """
    factors = {name.removesuffix(".weight"): _factors(name, each) for name, each in _weights(adapter)}
    biases = {name.removesuffix(".bias"): _bias(name, each, factors) for name, each in _others(adapter)}
    if not factors:
        raise IncompatibleError("there is nothing to write: the adapter has no low-rank update")
    added = _component(factors)
    tensors = [
        tensor
        for module, update in factors.items()
        for tensor in _tensors(f"{added}{module}", update, biases.get(module))
    ]
    recorded = base_digest or adapter.base_digest
    metadata = _metadata(adapter, factors, added, has_biases=bool(biases)) | (
        {} if recorded is None else {"base_digest": recorded}
    )
    with (folder / FILE).open("wb") as file:
        file.write(encode_header([each.spec for each in tensors], metadata))
        for tensor in tensors:
            file.write(tensor.make())
    components = sorted({component_of(f"{added}{module}", ".") for module in factors})
    return [_note(component) for component in components]


def _note(component: str) -> str:
    if component:
        return f"The names are those of the pipeline's {component.rstrip('.')}: load_lora_weights reads them."
    return "The names have no component: load_lora_adapter(DIR, prefix=None) of the model reads them."


def _weights(adapter: Adapter) -> list[tuple[str, Update]]:
    return [(name, update) for name, update in adapter.updates.items() if name.endswith(".weight")]


def _others(adapter: Adapter) -> list[tuple[str, Update]]:
    return [(name, update) for name, update in adapter.updates.items() if not name.endswith(".weight")]


def _factors(name: str, update: Update) -> LowRank:
    """Return the low-rank update with its magnitude, one per output, whatever the layer."""
    found = update
    if isinstance(update, Decomposed) and isinstance(update.inner, LowRank) and not update.by_input:
        ones = (1,) * (len(update.inner.lora_A.spec.shape) - 2)
        magnitude = reshaped(update.magnitude, (1, update.magnitude.spec.elements, *ones))
        found = update if update.epsilon else replace(update.inner, magnitude=magnitude)
    if not isinstance(found, LowRank) or found.kind == "embedding" or found.table is not None or found.fan_in_fan_out:
        raise _refused(name, update)
    return found


def _bias(name: str, update: Update, factors: Mapping[str, LowRank]) -> TensorView:
    module = name.removesuffix(".bias")
    if not isinstance(update, Shift) or update.table is not None or module not in factors:
        raise _refused(name, update)
    if update.scaling != factors[module].scaling:
        raise IncompatibleError(f"{name}: its scaling {update.scaling} is not its module's, which diffusers takes")
    return update.vector


def _component(factors: Mapping[str, LowRank]) -> str:
    """Return the component to put before the names: that of the model they are of, empty where they have one."""
    found = {_MODELS.get(module.partition(".")[0], "") for module in factors} - {""}
    if any(component_of(module, ".") for module in factors) or len(found) != 1:
        return ""
    return found.pop()


def _tensors(module: str, update: LowRank, bias: TensorView | None) -> list[WrittenTensor]:
    views = {"lora_A.weight": update.lora_A, "lora_B.weight": update.lora_B}
    if bias is not None:
        views["lora_B.bias"] = bias
    if (
        update.magnitude is not None
    ):  # transformers, which reads those of text encoders, takes the parameter's whole name
        is_text = component_of(module, ".").startswith("text_encoder")
        views["lora_magnitude_vector" + (".weight" if is_text else "")] = update.magnitude
    return [
        WrittenTensor(TensorSpec(f"{module}.{end}", view.spec.dtype, view.spec.shape), view.read_bytes)
        for end, view in views.items()
    ]


def _metadata(adapter: Adapter, factors: Mapping[str, LowRank], added: str, *, has_biases: bool) -> dict[str, str]:
    components = sorted({component_of(f"{added}{module}", ".") for module in factors})
    configuration: dict[str, Any] = {}
    for component in components:
        own = {
            f"{added}{module}".removeprefix(component): update
            for module, update in factors.items()
            if component_of(f"{added}{module}", ".") == component
        }
        content = _configuration(adapter, own, has_biases=has_biases)
        configuration |= {f"{component}{key}": value for key, value in content.items()}
    said = {
        "format": "pt",
        METADATA: json.dumps(configuration, indent=2, sort_keys=True),
        ADDED: added,
        TASK_TYPE: adapter.task_type or "",
    }
    return {key: value for key, value in said.items() if value}


def _configuration(adapter: Adapter, factors: Mapping[str, LowRank], *, has_biases: bool) -> dict[str, Any]:
    with_magnitude = {update.magnitude is not None for update in factors.values()}
    if len(with_magnitude) > 1:
        raise IncompatibleError("some modules have a magnitude (DoRA) and others none, and diffusers has one switch")
    return {
        **patterned(factors),
        "base_model_name_or_path": adapter.base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": has_biases,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "target_modules": sorted(factors),
        "task_type": None,
        "use_dora": with_magnitude == {True},
    }


def _refused(name: str, update: Update) -> IncompatibleError:
    reasons = {
        "LowRank": "an embedding, a layer stored as (in, out) or one with a whole table",
        "Shift": "a change of a bias without factors of its module",
        "Replacement": "a whole tensor",
        "Rows": "trained token rows",
    }
    kind = type(update).__name__
    what = reasons.get(kind, f"an update of the kind {kind}")
    return IncompatibleError(f"{name}: diffusers' format cannot hold {what}", "export it as --format peft")
