"""Checkpoints of loralib, the LoRA paper's own library: `X.lora_A`, `X.lora_B`, no configuration and no alpha.

Source: microsoft/LoRA `loralib/layers.py`, `utils.py`, `examples/NLG`. Three layers have a layout of their own:
MergedLinear, whose lora_B are slices of the fused weight's outputs; ConvLoRA, whose product is viewed as the kernel;
Embedding, whose product is transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loramgr.adapter import Adapter, LowRank, LowRankKind, Naming, Replacement, Update
from loramgr.errors import IncompatibleError, UsageError
from loramgr.formats.evidence import Evidence, counted
from loramgr.formats.files import AdapterFiles
from loramgr.formats.hints import ReadHints, unscaled
from loramgr.formats.layers import checked_tensors
from loramgr.formats.loralib_layers import convolution, is_embedding, merged_linear
from loramgr.tensorfile import TensorSpec, TensorView

__all__ = ["detect", "read_loralib"]

_ENDS = (".lora_A", ".lora_B")
_ALPHA = ("lora_alpha", "alpha")


def detect(files: AdapterFiles) -> Evidence | None:
    """Return what was seen of loralib's names, None where there are none or a configuration says another format."""
    if files.gguf is not None or (files.configuration is not None and "peft_type" in files.configuration.content):
        return None
    factors = [name for name in files.tensors if name.endswith(_ENDS)]
    if not factors or any(".lora_E" in name or name.endswith(".lora_embedding_A") for name in files.tensors):
        return None
    return Evidence(
        "loralib", None, (counted(factors, "named as loralib's parameters, without .weight"),), read_loralib
    )


def read_loralib(files: AdapterFiles, hints: ReadHints) -> Adapter:
    """Read the checkpoint, headers only where it is safetensors.

    UsageError where nobody said alpha, unless the adapter is only looked at; IncompatibleError for half a pair and
    shapes that do not multiply.
    """
    tensors = checked_tensors(files)
    alpha = hints.alpha
    if alpha is None and not hints.is_looked_at:
        raise UsageError(
            f"{files.weights}: loralib does not store alpha, and the scaling is alpha / r",
            "say it with --alpha N: the value of lora_alpha at training",
        )
    modules = sorted({name[: -len(_ENDS[0])] for name in tensors if name.endswith(_ENDS)})
    updates: dict[str, Update] = {f"{module}.weight": _low_rank(module, tensors, alpha) for module in modules}
    for name, view in tensors.items():
        if not name.endswith(_ENDS):
            module, _, leaf = name.rpartition(".")
            if "lora_" in name or name in updates or (leaf != "bias" and f"{module}.weight" in updates):
                raise IncompatibleError(f"{files.weights}: no rule of loralib's explains the tensor {name}")
            updates[name] = Replacement(view)
    pairs = [update for update in updates.values() if isinstance(update, LowRank)]
    scalings = {update.scaling for update in pairs}
    used: dict[str, Any] = {} if alpha is None else {"alpha": alpha}
    if hints.enable_lora is not None and any(_is_merged(update) for update in pairs):
        used["enable_lora"] = list(hints.enable_lora)
    return Adapter(
        format="loralib",
        method="lora",
        config=dict(used),
        updates=dict(sorted(updates.items())),
        tensors=tensors,
        alpha=alpha,
        scaling=scalings.pop() if len(scalings) == 1 and alpha is not None else None,
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in modules})),
        naming=_Layers(hints.enable_lora, any(_is_merged(update) for update in pairs)),
        hints=used,
        **unscaled("loralib", alpha),
    )


def _is_merged(update: LowRank) -> bool:
    """Say whether the factors are those of several slices of a fused weight: more rows than loralib's r."""
    return update.lora_A.spec.shape[0] != update.lora_B.spec.shape[1]


def _low_rank(module: str, tensors: Mapping[str, TensorView], alpha: float | None) -> LowRank:
    pair = [tensors.get(f"{module}{end}") for end in _ENDS]
    first, second = pair
    if first is None or second is None:
        raise IncompatibleError(f"module {module}: only one of lora_A and lora_B is there")
    shapes = first.spec.shape, second.spec.shape
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][0] % shapes[1][1]:
        raise IncompatibleError(
            f"module {module}: lora_A {list(shapes[0])} and lora_B {list(shapes[1])} do not multiply: lora_A is "
            "(r, in), lora_B (out, r)"
        )
    slices, rank = shapes[0][0] // shapes[1][1], shapes[1][1]
    if shapes[1][0] % slices:
        raise IncompatibleError(f"module {module}: {shapes[1][0]} rows of lora_B are not those of {slices} slices")
    kind: LowRankKind = "embedding" if is_embedding(module) else "linear"
    alpha = rank if alpha is None else alpha
    return LowRank(kind, first, second, rank, alpha, alpha / rank)


@dataclass(frozen=True, slots=True)
class _Layers(Naming):
    """Which of loralib's layers a module is, as far as only the base's weight can tell."""

    enable_lora: tuple[bool, ...] | None
    has_slices: bool

    @property
    def described(self) -> str:
        """Whose names they are, for a person."""
        return "the slices of loralib's MergedLinear"

    @property
    def is_needed(self) -> bool:
        """Whether the updates mean nothing before."""
        return self.has_slices

    def resolve(
        self, updates: Mapping[str, Update], specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
    ) -> dict[str, Update]:
        """Return the updates in the layouts of PEFT; see `Naming`. Names stay as they are."""
        resolved = dict(updates)
        for name, update in updates.items():
            spec = _weight(name, specs) if isinstance(update, LowRank) else None
            if isinstance(update, LowRank) and spec is not None:
                resolved[name] = self._layer(name, update, spec)
        return resolved

    def _layer(self, name: str, update: LowRank, spec: TensorSpec) -> LowRank:
        if len(spec.shape) > 2:
            return convolution(name, update, spec)
        outputs, inputs = update.lora_B.spec.shape[0], update.lora_A.spec.shape[1]
        if _is_merged(update) or {outputs, inputs} != {*spec.shape}:
            return merged_linear(name, update, spec, self.enable_lora)
        return replace(update, kind="embedding") if is_embedding(name.removesuffix(".weight")) else update


def _weight(name: str, specs: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """Return the base's weight of that name, its prefix aside; None where there is none or several differ in shape."""
    parts = name.split(".")
    for start in range(len(parts) - 1):
        rest = ".".join(parts[start:])
        found = [spec for known, spec in specs.items() if known == rest or known.endswith(f".{rest}")]
        if found:
            return found[0] if len({spec.shape for spec in found}) == 1 else None
        if parts[start].isdigit():
            break
    return None
