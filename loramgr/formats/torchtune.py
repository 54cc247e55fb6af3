"""Adapters in torchtune's own names: `layers.0.attn.q_proj.lora_a.weight`, with its configuration or without.

Source: torchtune `models/convert_weights.py`, `modules/peft`. Its rotary embedding wants the rows of q and k in pairs,
so they, and DoRA's magnitudes of them, are in another order than transformers'; Qwen's are not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loramgr.adapter import Adapter, LowRank, Naming, Update
from loramgr.errors import IncompatibleError, UsageError
from loramgr.formats.configuration import Fields
from loramgr.formats.evidence import Evidence, counted
from loramgr.formats.files import AdapterFiles
from loramgr.formats.gguf import reordered
from loramgr.formats.gguf_names import Architecture
from loramgr.formats.hints import ReadHints, unscaled
from loramgr.formats.layers import checked_tensors
from loramgr.formats.resolving import resolved_names
from loramgr.tensorfile import TensorSpec, TensorView

__all__ = ["detect", "read_torchtune"]

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<role>lora_a\.weight|lora_b\.weight|magnitude)")
_MODULES = {
    "tok_embeddings": "model.embed_tokens", "output": "lm_head", "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj", "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj", "mlp.w3": "mlp.up_proj", "mlp.w2": "mlp.down_proj",
}  # fmt: skip
_PAIRED = frozenset({"llama", "mistral", "gemma", "gemma2"})
_PLAIN = frozenset({"qwen2", "qwen3"})
_MANY = 5


def detect(files: AdapterFiles) -> Evidence | None:
    """Return what was seen of torchtune's names, None where there are none."""
    factors = [] if files.gguf is not None else [name for name in files.tensors if _is_factor(name)]
    if not factors:
        return None
    return Evidence("torchtune", None, (counted(factors, "named as torchtune does"),), read_torchtune)


def _is_factor(name: str) -> bool:
    return name.endswith((".lora_a.weight", ".lora_b.weight"))


def read_torchtune(files: AdapterFiles, hints: ReadHints) -> Adapter:
    """Read the adapter; its names stay torchtune's until it meets a base.

    UsageError where neither a configuration nor a hint says alpha, unless the adapter is only looked at;
    IncompatibleError for tensors that no rule explains and shapes that do not multiply.
    """
    tensors = checked_tensors(files)
    fields = files.configuration
    alpha = hints.alpha if fields is None or "lora_alpha" not in fields.content else fields.number("lora_alpha")
    if alpha is None and not hints.is_looked_at:
        raise UsageError(
            f"{files.weights}: no configuration beside it says alpha, and the scaling is alpha / r", "--alpha N"
        )
    updates = {f"{name}.weight": _low_rank(name, roles, alpha) for name, roles in _modules(files, tensors).items()}
    if fields is not None and "r" in fields.content and {each.rank for each in updates.values()} != {fields.rank("r")}:
        raise IncompatibleError(f"{files.weights}: its rank is not the {fields.rank('r')} of its configuration")
    if fields is not None:
        _check_settings(fields, has_magnitudes=any(update.magnitude for update in updates.values()))
    scalings = {update.scaling for update in updates.values()}
    return Adapter(
        format="torchtune",
        method="dora" if any(update.magnitude for update in updates.values()) else "lora",
        config=fields.content if fields is not None else {} if alpha is None else {"lora_alpha": alpha},
        updates=dict(updates),
        tensors=tensors,
        alpha=alpha,
        scaling=scalings.pop() if len(scalings) == 1 and alpha is not None else None,
        target_modules=tuple(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in updates})),
        base_name=None if fields is None else fields.text("base_model_name_or_path"),
        naming=_TorchtuneNames(),
        hints={"alpha": alpha} if fields is None and alpha is not None else {},
        **unscaled("torchtune", alpha),
    )


def _check_settings(fields: Fields, *, has_magnitudes: bool) -> None:
    """Raise IncompatibleError for what PEFT's configuration can say and torchtune's layers do not have."""
    for key in ("use_rslora", "rank_pattern", "alpha_pattern"):
        if fields.content.get(key):
            raise IncompatibleError(
                f"{fields.path}: {key} is {fields.content[key]!r}, and torchtune scales every module by alpha / r"
            )
    if fields.flag("use_dora") and not has_magnitudes:
        raise IncompatibleError(f"{fields.path}: use_dora is true, and the file holds no magnitude")


def _modules(files: AdapterFiles, tensors: Mapping[str, TensorView]) -> dict[str, dict[str, TensorView]]:
    modules: dict[str, dict[str, TensorView]] = {}
    left = []
    for name, view in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            left.append(name)
        else:
            modules.setdefault(match["module"], {})[match["role"].removesuffix(".weight")] = view
    if left:
        raise IncompatibleError(f"{files.weights}: no rule explains these tensors: {', '.join(sorted(left)[:_MANY])}")
    return dict(sorted(modules.items()))


def _low_rank(name: str, roles: Mapping[str, TensorView], alpha: float | None) -> LowRank:
    if "lora_a" not in roles or "lora_b" not in roles:
        raise IncompatibleError(f"module {name}: only one of lora_a and lora_b is there")
    first, second = roles["lora_a"], roles["lora_b"]
    shapes = first.spec.shape, second.spec.shape
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][0] != shapes[1][1]:
        raise IncompatibleError(f"module {name}: lora_a {list(shapes[0])} and lora_b {list(shapes[1])} do not multiply")
    magnitude = roles.get("magnitude")
    if magnitude is not None and magnitude.spec.shape != shapes[1][:1]:
        raise IncompatibleError(f"module {name}: magnitude {list(magnitude.spec.shape)} for {shapes[1][0]} outputs")
    rank = shapes[0][0]
    alpha = rank if alpha is None else alpha
    return LowRank("linear", first, second, rank, alpha, alpha / rank, magnitude=magnitude)


@dataclass(frozen=True, slots=True)
class _TorchtuneNames(Naming):
    """torchtune's names of a decoder's modules, and its order of the rows of q and k."""

    @property
    def described(self) -> str:
        """Whose names they are, for a person."""
        return "the names of torchtune"

    @property
    def is_needed(self) -> bool:
        """Whether the updates mean nothing before."""
        return True

    def resolve(
        self, updates: Mapping[str, Update], specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> dict[str, Update]:
        """Return the updates by the base's names, the rows of q and k in its order; see `Naming`."""
        model_type = (config or {}).get("model_type")
        if model_type not in _PAIRED | _PLAIN:
            raise IncompatibleError(
                f"the order in which torchtune keeps the rows of q and k of a {model_type!r} is not known",
                "give a base whose config.json says its model_type: llama, mistral, gemma or qwen2",
            )
        return resolved_names(updates, specs, _module, lambda name, update: _ordered(name, update, config))


def _ordered(name: str, update: Update, config: Mapping[str, Any] | None) -> Update:
    gguf_name = f".attn_{name.split('.')[-2][0]}.weight"
    if (config or {}).get("model_type") in _PLAIN or not isinstance(update, LowRank):
        return update
    heads = Architecture.of("llama", config).rotated_heads(gguf_name) if name.endswith(_ROTATED) else None
    if heads is None:
        return update
    magnitude = None if update.magnitude is None else reordered(update.magnitude, heads, to_llama=False)
    return replace(update, lora_B=reordered(update.lora_B, heads, to_llama=False), magnitude=magnitude)


_ROTATED = (".q_proj.weight", ".k_proj.weight")


def _module(name: str) -> str | None:
    """Return transformers' name of a parameter, None for one that torchtune's conversion does not know."""
    module = name.removesuffix(".weight")
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    found = _MODULES.get(layer[2] if layer else module)
    if found is None:
        return None
    return f"model.layers.{layer[1]}.{found}.weight" if layer else f"{found}.weight"
