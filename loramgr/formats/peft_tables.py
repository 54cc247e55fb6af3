"""The whole tensors in a PEFT adapter: saved modules, biases, embeddings, by the parameter they replace."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from loramgr.errors import IncompatibleError
from loramgr.formats.peft_config import PeftSettings
from loramgr.formats.peft_keys import Key
from loramgr.tensorfile import TensorView

__all__ = ["refuse_unexplained", "tables_of"]

# modules whose whole weight PEFT saves when the vocabulary was resized or the embedding is a target
_EMBEDDINGS = (
    "embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "tok_embeddings",
    "predictions.decoder",
)  # fmt: skip
_MANY = 10


def tables_of(
    keys: Iterable[Key],
    tensors: Mapping[str, TensorView],
    modules: Collection[str],
    settings: PeftSettings,
    unexplained: list[str],
) -> dict[str, TensorView]:
    """Collect the whole tensors by the parameter they replace; what no rule explains goes to the list.

    `modules` are the names of those that have an update of their own.
    """
    tables: dict[str, TensorView] = {}
    for key in keys:
        if key.role not in ("base", "saved"):
            continue
        if not (key.module in modules if key.role == "base" else _is_expected(key, modules, settings)):
            unexplained.append(key.name)
        elif key.target in tables:
            raise IncompatibleError(f"{key.target}: two tensors of the file take its place")
        else:
            tables[key.target] = tensors[key.name]
    return tables


def _is_expected(key: Key, modules: Collection[str], settings: PeftSettings) -> bool:
    """Say whether the configuration explains that the parameter was saved whole."""
    if _is_saved_module(key.module, settings.saved_modules):
        return key.module not in modules
    if key.parameter == "bias" and settings.bias != "none":
        return settings.bias == "all" or key.module in modules
    return any(f".{key.module}".endswith(f".{name}") for name in _EMBEDDINGS)


def _is_saved_module(module: str, saved_modules: Iterable[str]) -> bool:
    """Say whether the module or one it lies in ends with one of the names: PEFT's rule, without a dot before it."""
    parts = module.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(path.endswith(tuple(saved_modules)) for path in paths)


def refuse_unexplained(unexplained: list[str]) -> None:
    """Raise IncompatibleError, naming them, where tensors are left that no rule explains."""
    if unexplained:
        more = f" and {len(unexplained) - _MANY} more" if len(unexplained) > _MANY else ""
        raise IncompatibleError(
            f"no rule explains these tensors: {', '.join(sorted(unexplained)[:_MANY])}{more}",
            "check modules_to_save and bias in adapter_config.json",
        )
