"""What a person should know about a PEFT adapter that is readable, but not what its configuration says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from loramgr.adapter import LowRank, Replacement, Rows, Shift, Update
from loramgr.formats.configuration import Fields
from loramgr.formats.peft_config import PeftSettings

__all__ = ["warnings"]

# names that PEFT adds by itself, one of which no model has
_DEFAULT_HEADS = frozenset({"classifier", "score", "qa_outputs"})


def warnings(settings: PeftSettings, updates: Mapping[str, Update]) -> tuple[str, ...]:
    """Return a sentence for everything that the configuration names and the file lacks, or that it says twice."""
    adapted = _modules(updates, LowRank, Rows)
    saved = _modules(updates, Replacement, Shift)
    missing = tuple(
        f"The configuration names {what}, and the file holds no tensors for it."
        for what in (
            *_missing_targets(settings, adapted),
            *_missing_saved(settings.fields, saved),
            *_missing_layers(settings.fields, adapted),
            *_missing_tokens(settings, updates),
        )
    )
    return (*missing, *_ambiguous_alphas(settings, updates))


def _ambiguous_alphas(settings: PeftSettings, updates: Mapping[str, Update]) -> Iterable[str]:
    """PEFT sorts the patterns when it saves, so that another one may have come first at training."""
    for name, update in updates.items():
        if settings.lora is None or not isinstance(update, LowRank):
            continue
        module = name.removesuffix(".weight")
        alphas = list(dict.fromkeys(settings.lora.alphas_of(module)))
        if len(alphas) > 1:
            yield (
                f"alpha_pattern gives {module} more than one alpha ({', '.join(f'{alpha:g}' for alpha in alphas)}); "
                f"{alphas[0]:g} is used, as PEFT does when it loads the file, but training may have used another."
            )


def _modules(updates: Mapping[str, Update], *kinds: type[Update]) -> list[str]:
    return [name.rpartition(".")[0] for name, update in updates.items() if isinstance(update, kinds)]


def _missing_targets(settings: PeftSettings, modules: list[str]) -> Iterable[str]:
    if (pattern := settings.target_pattern) is not None:
        found = any(re.fullmatch(pattern, module) for module in modules)
        return [] if found else [f"the target modules {pattern!r}"]
    names = [name for name in dict.fromkeys(settings.target_modules) if name != "all-linear"]
    return [
        f"the target module {name!r}"
        for name in names
        if not _ends_with(modules, name) and not _is_excluded(settings.fields, name)
    ]


def _is_excluded(fields: Fields, name: str) -> bool:
    """Say whether a target is one that exclude_modules takes out again, which PEFT leaves in the list."""
    value = fields.content.get("exclude_modules")
    if isinstance(value, str):
        return re.fullmatch(value, name) is not None
    return isinstance(value, list) and any(isinstance(each, str) and _ends_with([name], each) for each in value)


def _ends_with(modules: Iterable[str], name: str) -> bool:
    return any(f".{module}".endswith(f".{name}") for module in modules)


def _missing_saved(fields: Fields, modules: list[str]) -> Iterable[str]:
    names = dict.fromkeys(name for name in fields.names("modules_to_save") if name not in _DEFAULT_HEADS)
    paths = [".".join(parts[:end]) for parts in map(_split, modules) for end in range(1, len(parts) + 1)]
    return [f"the saved module {name!r}" for name in names if not any(path.endswith(name) for path in paths)]


def _split(module: str) -> list[str]:
    return module.split(".")


def _missing_layers(fields: Fields, modules: list[str]) -> Iterable[str]:
    value = fields.content.get("layers_to_transform")
    layers = [value] if isinstance(value, int) else value
    if not isinstance(layers, list):
        return []
    present = {part for module in modules for part in _split(module)}
    return [f"layer {layer}" for layer in layers if str(layer) not in present]


def _missing_tokens(settings: PeftSettings, updates: Mapping[str, Update]) -> Iterable[str]:
    has_rows = any(isinstance(update, Rows) for update in updates.values())
    return ["trained tokens"] if settings.token_indices and not has_rows else []
