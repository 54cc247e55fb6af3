"""What PEFT has put around the layers of a model in memory: the base's names beneath it, and adapters of its own.

PEFT's modules are told by what they carry, so that nothing is imported: a model may come from any of its versions. A
dictionary of tensors has no modules, and every function here takes it for one without PEFT.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loramgr.errors import ConflictError, IncompatibleError

if TYPE_CHECKING:
    import torch

    Model = torch.nn.Module | Mapping[str, torch.Tensor]

__all__ = ["base_name", "refuse_active", "refuse_changed_base", "refuse_merged", "refuse_wrapped_names", "wrapped"]

_COMPILED = "_orig_mod"
_INNER = ("token_adapter", "base_layer", "original_module")
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights, as they begin
_MARKS = (".base_layer.", ".original_module.", ".lora_A.", ".lora_embedding_A.")


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer that PEFT wrapped, by the base's name, and PEFT's adapters that are in its weights or act beside them."""

    name: str
    merged: tuple[str, ...]
    active: tuple[str, ...]


def wrapped(model: Model) -> dict[str, str]:
    """Return the path of every module of PEFT's, each with its child that leads on to the base's own modules."""
    if isinstance(model, Mapping) or "peft" not in sys.modules:
        return {}
    inner = {path: _inner(module) for path, module in model.named_modules(remove_duplicate=False)}
    return {path: child for path, child in inner.items() if child is not None}


def base_name(name: str, wrappers: Mapping[str, str]) -> str | None:
    """Return a tensor's name without what torch.compile and PEFT put into it; None for a tensor of PEFT's own."""
    kept, path = [], ""
    for part in name.split("."):
        inner = wrappers.get(path)
        if inner is None:
            kept += [part] if part != _COMPILED else []
        elif part != inner:
            return None
        path = f"{path}.{part}" if path else part
    return ".".join(kept)


def refuse_merged(model: Model, names: Collection[str] | None = None) -> None:
    """Raise ConflictError when PEFT itself has merged adapters into layers; `names` are the tensors that matter."""
    for layer in _layers(model):
        inside = names is None or any(name.startswith(f"{layer.name}.") for name in names)
        if layer.merged and inside:
            raise ConflictError(
                f"PEFT has merged {' + '.join(layer.merged)} into {layer.name} itself",
                "model.unmerge_adapter() first; to have the base's very bits, load it again",
            )


def refuse_active(model: Model) -> None:
    """Raise ConflictError when an adapter of PEFT's acts beside the weights: the model would be the sum of both."""
    for layer in _layers(model):
        if layer.active:
            raise ConflictError(
                f"PEFT's adapter {' + '.join(layer.active)} is active in {layer.name}: the model would compute with it "
                "as well, or instead",
                "with model.disable_adapter(): …, or model.base_model.disable_adapter_layers() first",
            )


def refuse_changed_base(model: Model) -> None:
    """Raise IncompatibleError when one of PEFT's adapters brought weights or biases of its own into the base's."""
    if isinstance(model, Mapping) or not wrapped(model):
        return
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, dict) else ():
            initial, bias = _setting(config, "init_lora_weights"), _setting(config, "bias")
            if initial.lower().startswith(_BASE_CHANGING):
                raise _changed_base(name, f"init_lora_weights={initial!r}", "weights")
            if bias in ("all", "lora_only"):
                raise _changed_base(name, f"bias={bias!r}", "biases")


def refuse_wrapped_names(names: Collection[str]) -> None:
    """Raise IncompatibleError for a dictionary of a model that PEFT wrapped, which cannot say what is merged."""
    name = next((name for name in names if any(mark in f".{name}" for mark in _MARKS)), None)
    if name is not None:
        raise IncompatibleError(f"{name} is of a layer that PEFT wrapped", "attach to the model, not to its state_dict")


def _inner(module: torch.nn.Module) -> str | None:
    children = module._modules
    if isinstance(getattr(type(module), "adapter_layer_names", None), tuple):
        return next((name for name in _INNER if children.get(name) is not None), None)
    if hasattr(module, "peft_config"):
        for name, mark in (("base_model", "get_base_model"), ("model", "inject_adapter")):
            if children.get(name) is not None and hasattr(type(module), mark):
                return name
    return None


def _layers(model: Model) -> Iterator[_Layer]:
    if isinstance(model, Mapping):
        return
    wrappers = wrapped(model)
    for path, inner in wrappers.items():
        module: Any = model.get_submodule(path)
        if inner in ("base_layer", "original_module"):
            name = base_name(f"{path}.{inner}" if path else inner, wrappers)
            merged = tuple(map(str, getattr(module, "merged_adapters", ())))
            yield _Layer(name or type(model).__name__, merged, _active(module))


def _active(module: Any) -> tuple[str, ...]:
    """Return the adapters that the layer computes with beside its weights, or in their place."""
    if module.disable_adapters or getattr(module, "merged_adapters", ()):
        return ()
    held = {name for part in module.adapter_layer_names for name in getattr(module, part, ())}
    return tuple(name for name in module.active_adapters if name in held)


def _setting(config: Any, key: str) -> str:
    value = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
    return value if isinstance(value, str) else ""


def _changed_base(name: str, setting: str, what: str) -> IncompatibleError:
    return IncompatibleError(
        f"PEFT's adapter {name} has {setting}: {what} of the base were changed for it",
        "load the base without PEFT, or force=True where you know better",
    )
