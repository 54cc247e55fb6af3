"""Adapters of mlx-lm: adapters.safetensors and an adapter_config.json of its own, with `fine_tune_type`.

Source: mlx-lm `tuner/{lora,dora,utils}.py`. lora_a is (in, r), lora_b (r, out), and the scale is a plain factor, not
alpha / r; of a switch layer's experts lora_a is (experts, r, in) and lora_b (experts, out, r); DoRA's `m` is (out,).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loramgr.adapter import Adapter, Experts, LowRank, LowRankKind, Replacement, Update
from loramgr.errors import IncompatibleError
from loramgr.formats.configuration import Fields
from loramgr.formats.evidence import Evidence, counted
from loramgr.formats.files import AdapterFiles
from loramgr.formats.hints import ReadHints
from loramgr.formats.layers import checked_tensors
from loramgr.formats.loralib_layers import is_embedding
from loramgr.formats.mlx_names import SWITCH, SwitchNames
from loramgr.tensorfile import TensorView
from loramgr.views import transposed

__all__ = ["DEFAULT_SCALE", "detect", "read_mlx"]

DEFAULT_SCALE = 20.0
_ENDS = (".lora_a", ".lora_b", ".m")
_KINDS = ("lora", "dora", "full")
_MANY = 5


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the configuration says; `rank` None where it says none, `scale` assumed where that is so."""

    kind: str
    scale: float
    rank: int | None
    warnings: list[str] = field(default_factory=list)


def detect(files: AdapterFiles) -> Evidence | None:
    """Return what was seen of mlx-lm's names or configuration, None where there is neither, or it is PEFT's."""
    fields = files.configuration
    if files.gguf is not None or (fields is not None and "peft_type" in fields.content):
        return None
    said = []
    if fields is not None and "fine_tune_type" in fields.content:
        said.append(f"{fields.path.name} has fine_tune_type {fields.content['fine_tune_type']!r} and no peft_type")
    factors = [name for name in files.tensors if name.endswith(_ENDS[:2])]
    if factors:
        said.append(counted(factors, "named as mlx-lm does"))
    return Evidence("mlx", None, tuple(said), read_mlx) if said else None


def read_mlx(files: AdapterFiles, hints: ReadHints) -> Adapter:
    """Read the adapter, headers only; hints are not needed.

    Raises IncompatibleError for a missing configuration, which has the scale, another kind of fine-tuning, a rank that
    the configuration contradicts, tensors that no rule explains, and shapes that do not multiply.
    """
    fields = files.configuration
    if fields is None:
        raise IncompatibleError(
            f"{files.weights}: no adapter_config.json beside it, and mlx-lm keeps the scale there",
            f"name the folder: {files.folder}",
        )
    settings, tensors = _settings(fields), checked_tensors(files)
    if not tensors:
        raise IncompatibleError(f"{files.weights}: holds no tensors")
    updates = _whole(files, tensors) if settings.kind == "full" else _updates(files, tensors, settings)
    experts = any(isinstance(update, Experts) for update in updates.values())
    return Adapter(
        format="mlx",
        method="full" if settings.kind == "full" else settings.kind,
        config=fields.content,
        updates=dict(sorted(updates.items())),
        tensors=tensors,
        alpha=None if settings.rank is None or settings.kind == "full" else settings.scale * settings.rank,
        scaling=None if settings.kind == "full" else settings.scale,
        target_modules=tuple(sorted({_leaf(name) for name, each in updates.items() if not _is_saved(each)})),
        base_name=fields.text("model"),
        warnings=tuple(settings.warnings),
        naming=SwitchNames() if experts else None,
    )


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _is_saved(update: Update) -> bool:
    return isinstance(update, Replacement)


def _settings(fields: Fields) -> _Settings:
    kind = fields.text("fine_tune_type") or "lora"
    if kind not in _KINDS:
        raise fields.refused("fine_tune_type", f"one of {', '.join(_KINDS)}")
    inner = Fields(fields.path, fields.mapping("lora_parameters"))
    settings = _Settings(kind, _scale(inner), None if inner.content.get("rank") is None else inner.rank("rank"))
    if kind != "full" and "scale" not in inner.content:
        settings.warnings.append(f"The configuration has no scale: mlx-lm's default of {DEFAULT_SCALE:g} is used.")
    return settings


def _scale(inner: Fields) -> float:
    if "scale" in inner.content:
        return inner.number("scale")
    if "alpha" in inner.content:
        raise IncompatibleError(
            f"{inner.path}: lora_parameters has an alpha and no scale, and mlx-lm reads only a scale"
        )
    return DEFAULT_SCALE


def _whole(files: AdapterFiles, tensors: Mapping[str, TensorView]) -> dict[str, Update]:
    left = [name for name in tensors if name.endswith((*_ENDS, ".scales", ".biases"))]
    if left:
        raise IncompatibleError(f"{files.weights}: no rule explains these tensors: {', '.join(sorted(left)[:_MANY])}")
    return {name: Replacement(view) for name, view in tensors.items()}


def _updates(files: AdapterFiles, tensors: Mapping[str, TensorView], settings: _Settings) -> dict[str, Update]:
    """Turn the factors, and the parameters that mlx-lm saves beside them, into updates."""
    modules: dict[str, dict[str, TensorView]] = {}
    updates: dict[str, Update] = {}
    for name, view in tensors.items():
        end = next((end for end in _ENDS if name.endswith(end)), None)
        if end is not None:
            modules.setdefault(name.removesuffix(end), {})[end] = view
        elif name.endswith((".weight", ".bias")) and "lora" not in name:
            updates[name] = Replacement(view)
        else:
            raise IncompatibleError(f"{files.weights}: no rule of mlx-lm's explains the tensor {name}")
    for module, parts in modules.items():
        if f"{module}.weight" in updates:
            raise IncompatibleError(
                f"module {module}: factors and the whole weight, which mlx-lm does not save together"
            )
        updates[f"{module}.weight"] = _update(module, parts, settings)
    return updates


def _update(module: str, parts: Mapping[str, TensorView], settings: _Settings) -> Update:
    first, second, magnitude = (parts.get(end) for end in _ENDS)
    if first is None or second is None:
        raise IncompatibleError(f"module {module}: only one of lora_a and lora_b is there")
    if (magnitude is not None) is not (settings.kind == "dora"):
        raise IncompatibleError(f"module {module}: fine_tune_type is {settings.kind}, and its m says another")
    shapes = first.spec.shape, second.spec.shape
    if len(shapes[0]) == len(shapes[1]) == 3:
        return _experts(module, first, second, settings)
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][1] != shapes[1][0]:
        raise IncompatibleError(
            f"module {module}: lora_a {list(shapes[0])} and lora_b {list(shapes[1])} do not multiply"
        )
    kind: LowRankKind = "embedding" if is_embedding(module) else "linear"
    if magnitude is not None and kind == "embedding":
        raise IncompatibleError(f"module {module}: mlx-lm's DoRA of an embedding, normed row by row, is not read")
    if magnitude is not None and magnitude.spec.shape != shapes[1][1:]:
        raise IncompatibleError(f"module {module}: m is {list(magnitude.spec.shape)} for {shapes[1][1]} outputs")
    rank = _rank(module, shapes[0][1], settings)
    alpha = settings.scale * rank
    return LowRank(kind, transposed(first), transposed(second), rank, alpha, settings.scale, magnitude=magnitude)


def _experts(module: str, first: TensorView, second: TensorView, settings: _Settings) -> Experts:
    (count, rank, _), (others, _, columns) = first.spec.shape, second.spec.shape
    if SWITCH not in module or count != others or rank != columns or 0 in (*first.spec.shape, *second.spec.shape):
        raise IncompatibleError(
            f"module {module}: lora_a {list(first.spec.shape)} and lora_b {list(second.spec.shape)} do not multiply"
        )
    rank = _rank(module, rank, settings)
    return Experts(first, second, rank, settings.scale * rank, settings.scale)


def _rank(module: str, rank: int, settings: _Settings) -> int:
    if settings.rank not in (None, rank):
        raise IncompatibleError(f"module {module}: its rank is {rank}, and the configuration says {settings.rank}")
    return rank
