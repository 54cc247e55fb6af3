"""The modules of a file whose tensors are told by their suffix, put together as an adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loramgr.adapter import Adapter, Decomposed, FileHash, LowRank, Opaque, Update
from loramgr.digests import is_digest
from loramgr.errors import IncompatibleError
from loramgr.formats.factored import Scaling
from loramgr.formats.files import AdapterFiles
from loramgr.formats.foreign_names import ForeignNames, component_of
from loramgr.formats.lycoris import Layer, layer_of
from loramgr.formats.suffixed_keys import Module
from loramgr.tensorfile import FLOAT_DTYPES, TensorView

__all__ = ["TASK_TYPE", "Source", "adapter_of", "checked_tensors"]

TASK_TYPE = "loramgr_task_type"  # metadata of files that loramgr wrote

_NUMBERED = re.compile(r".*_\d+_(?=.)")
_NUMBERS = frozenset({"I64", "I32", "I16", "I8", "U8", "BOOL"})
_SIDELINES = frozenset({"norm", "full"})  # what LyCORIS trains beside its algorithm: norms, small layers
_MANY = 2


@dataclass(frozen=True, slots=True)
class Source:
    """What a format knows beside its modules.

    `names_are_own` says that the modules have their names in the model, so that nothing is to be resolved; `config` is
    what the format parsed, None for the file's metadata as it is; `ranks` are those that something beside the shapes
    tells, None where all of them are told.
    """

    format: str
    files: AdapterFiles
    names_are_own: bool = False
    config: dict[str, Any] | None = None
    target_modules: tuple[str, ...] = ()
    ranks: frozenset[int] | None = frozenset()


def checked_tensors(files: AdapterFiles) -> dict[str, TensorView]:
    """Return the file's tensors; IncompatibleError, naming one, for a dtype that is no plain float or number."""
    for name, view in files.tensors.items():
        spec = view.spec
        if spec.dtype not in FLOAT_DTYPES and not (spec.dtype in _NUMBERS and spec.elements == 1):
            raise IncompatibleError(f"{files.weights}: tensor {name!r} has the dtype {spec.dtype}, not a plain float")
    return dict(files.tensors)


def adapter_of(source: Source, modules: Mapping[str, Module]) -> Adapter:
    """Put the modules together; raises as `layer_of`, and IncompatibleError for a file without any."""
    if not modules:
        raise IncompatibleError(f"{source.files.weights}: holds no tensors")
    layers = {name: layer_of(module) for name, module in sorted(modules.items())}
    if source.ranks is not None:
        for name, layer in layers.items():
            _refuse_swapped(modules[name], layer, source.ranks)
    updates = {name: update for module, layer in layers.items() for name, update in _named(module, layer)}
    scalings = [layer.scaling for layer in layers.values() if layer.scaling is not None]
    general = Counter((each.alpha, each.rank) for each in scalings).most_common(1)
    is_flat = not any("." in name for name in modules)
    metadata = dict(source.files.metadata)
    return Adapter(
        format=source.format,
        method=_method(layers.values(), source.format),
        config=metadata if source.config is None else source.config,
        updates=dict(sorted(updates.items())),
        tensors=dict(source.files.tensors),
        alpha=general[0][0][0] if general else None,
        scaling=general[0][0][0] / general[0][0][1] if general else None,
        target_modules=source.target_modules or _targets(modules, is_flat=is_flat),
        task_type=metadata.get(TASK_TYPE) or None,
        base_name=_base_name(metadata),
        base_digest=_base_digest(source.files, metadata),
        warnings=_warnings(layers, scalings),
        naming=None if source.names_are_own else ForeignNames(tuple(sorted(modules)), "_" if is_flat else "."),
        base_file=_base_file(metadata),
        obstacle=_obstacle(updates.values()),
    )


def _refuse_swapped(module: Module, layer: Layer, ranks: frozenset[int]) -> None:
    """Refuse a rank above both dimensions: exchanged projections of a square layer still fit each other."""
    update = layer.updates.get("weight")
    inner = update.inner if isinstance(update, Decomposed) else update
    if isinstance(inner, LowRank) and inner.rank not in ranks:
        inputs = inner.lora_A.spec.elements // inner.rank
        if inner.rank > max(inputs, inner.lora_B.spec.shape[0]):
            dimensions = f"{inputs} inputs and {inner.lora_B.spec.shape[0]} outputs"
            raise module.refused(
                f"the rank {inner.rank} is above its {dimensions}: its up and down projections look exchanged"
            )


def _obstacle(updates: Iterable[Update]) -> str | None:
    """Return why the adapter cannot be merged, None where it can."""
    return next((f"{each.method}: {each.reason}" for each in updates if isinstance(each, Opaque)), None)


def _named(module: str, layer: Layer) -> Iterable[tuple[str, Update]]:
    for parameter, update in layer.updates.items():
        yield (update.tensor.spec.name if isinstance(update, Opaque) else f"{module}.{parameter}"), update


def _method(layers: Iterable[Layer], format_name: str) -> str:
    """Return the method of the adapter: the commonest, where what is trained beside it does not count."""
    counts = Counter(layer.method for layer in layers)
    if format_name != "lycoris" and "locon" in counts:
        counts["lora"] += counts.pop("locon")  # LyCORIS' name for LoRA of convolutions
    main = {method: count for method, count in counts.items() if method not in _SIDELINES} or counts
    if len(main) > 1 and main.keys() <= {"lora", "locon", "dora"}:
        return "dora" if "dora" in main else "locon"
    return max(sorted(main), key=lambda method: main[method])


def _targets(modules: Iterable[str], *, is_flat: bool) -> tuple[str, ...]:
    """Return what PEFT would list, the last part of every name; of a flat name what is behind the last number."""
    if is_flat:
        return tuple(sorted({_NUMBERED.sub("", name.removeprefix(component_of(name))) for name in modules}))
    return tuple(sorted({_leaf(name) for name in modules}))


def _leaf(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _base_name(metadata: Mapping[str, str]) -> str | None:
    name = metadata.get("ss_sd_model_name", "").strip()
    if not name or name == "None":
        return None
    stem, _, suffix = name.rpartition(".")
    return stem if suffix in ("safetensors", "ckpt", "pt") else name


def _base_file(metadata: Mapping[str, str]) -> FileHash | None:
    """Return what sd-scripts noted of the base's file (`library/train_util.py`), None for nothing."""
    whole = _hexadecimal(metadata.get("ss_new_sd_model_hash"), 64)
    return None if whole is None else FileHash(whole, _hexadecimal(metadata.get("ss_sd_model_hash"), 8))


def _base_digest(files: AdapterFiles, metadata: Mapping[str, str]) -> str | None:
    recorded = metadata.get("base_digest")
    if recorded is not None and not is_digest(recorded):
        raise IncompatibleError(f"{files.weights}: base_digest {recorded!r} is not a digest, sha256: and 64 hex digits")
    return recorded


def _hexadecimal(text: str | None, size: int) -> str | None:
    text = (text or "").lower()
    return text if len(text) == size and set(text) <= set("0123456789abcdef") else None


def _warnings(layers: Mapping[str, Layer], scalings: Iterable[Scaling]) -> tuple[str, ...]:
    said = []
    assumed = [name for name, layer in layers.items() if layer.scaling is not None and layer.scaling.assumed]
    if assumed:
        said.append(f"No alpha, or one of 0, in {_listed(assumed)}: the format means the rank then, a scaling of 1.")
    kept = [name for name, layer in layers.items() if any(isinstance(each, Opaque) for each in layer.updates.values())]
    if kept:
        reason = next(each.reason for each in layers[kept[0]].updates.values() if isinstance(each, Opaque))
        said.append(f"Kept as they are and not merged, {_listed(kept)}: {reason}.")
    methods = Counter("lora" if layer.method == "locon" else layer.method for layer in layers.values())
    if len(methods) > 1:
        counted = ", ".join(f"{count} {name}" for name, count in sorted(methods.items()))
        said.append(f"Modules by method: {counted}.")
    return tuple(said)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return f"{len(names)} modules ({', '.join(names[:_MANY])}{more})" if len(names) > 1 else names[0]
