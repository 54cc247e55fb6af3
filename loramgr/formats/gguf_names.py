"""llama.cpp's names of a model's tensors, by the maps of the package `gguf`, and the order it keeps q and k in.

llama.cpp's converter (`convert_hf_to_gguf.py`) stores the rows of q and k of some architectures in the order that its
rotary embedding wants: pairs of one rotation beside each other, head by head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loramgr.errors import IncompatibleError

__all__ = ["ARCHITECTURES", "Architecture", "gguf_package", "names_of"]

# model_type of config.json → llama.cpp's architecture; those whose tensors are stored as they are, but for q and k
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "smollm3": "smollm3", "granite": "granite", "arcee": "arcee",
    "olmo": "olmo", "minicpm": "minicpm", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "gpt2": "gpt2", "bert": "bert", "phi": "phi2", "phi3": "phi3",
    "starcoder2": "starcoder2", "stablelm": "stablelm", "olmo2": "olmo2", "cohere": "command-r", "cohere2": "cohere2",
    "nomic_bert": "nomic-bert", "seed_oss": "seed_oss",
}  # fmt: skip
_PERMUTING = frozenset({"llama", "smollm3", "granite", "arcee", "olmo", "minicpm"})
_PREFIXES = ("", "model.", "transformer.", "language_model.")
_ROTATED = (".attn_q.weight", ".attn_k.weight")


def gguf_package() -> Any:
    """Return the package `gguf`; IncompatibleError where it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise IncompatibleError(
            "the names in GGUF files are those of the package gguf, which is not installed", "pip install loramgr[gguf]"
        ) from error
    return gguf


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of llama.cpp's with the numbers of heads of a base; None where its config.json has none."""

    name: str
    heads: int | None
    key_heads: int | None

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any] | None) -> Architecture:
        """Return the architecture of that name; IncompatibleError for one whose layout is not known here."""
        if name not in ARCHITECTURES.values():
            raise IncompatibleError(f"llama.cpp's architecture {name!r} is not known, nor the order it keeps rows in")
        heads = _count(config, "num_attention_heads")
        return cls(name, heads, _count(config, "num_key_value_heads") or heads)

    def rotated_heads(self, name: str) -> int | None:
        """Return the heads of a tensor whose rows are in llama.cpp's own order, None for every other tensor.

        Raises IncompatibleError where the base's config.json does not say how many there are.
        """
        if self.name not in _PERMUTING or not name.endswith(_ROTATED):
            return None
        heads = self.heads if name.endswith(_ROTATED[0]) else self.key_heads
        if heads is None:
            raise IncompatibleError(
                f"{name}: llama.cpp keeps its rows by heads, and no config.json says how many the base has",
                "give the base as a folder with its config.json",
            )
        return heads


def _count(config: Mapping[str, Any] | None, key: str) -> int | None:
    text = (config or {}).get("text_config")
    for level in (config or {}, text if isinstance(text, dict) else {}):
        value = level.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def names_of(architecture: str, tensors: Iterable[str]) -> dict[str, str]:
    """Return llama.cpp's name of each tensor of a model, leaving out those that it has none for.

    Raises IncompatibleError where two tensors would have one name, or `gguf` does not know the architecture.
    """
    package = gguf_package()
    known = {name: number for number, name in package.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise IncompatibleError(f"the package gguf does not know the architecture {architecture!r}")
    names = [*tensors]
    layers = 1 + max((int(part) for name in names for part in name.split(".") if part.isdecimal()), default=0)
    table = package.get_tensor_name_map(known[architecture], layers)
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name in names:
        mapped = _mapped(table, name)
        if mapped is None:
            continue
        if mapped in owners:
            raise IncompatibleError(f"{owners[mapped]} and {name} would both be {mapped} in llama.cpp")
        owners[mapped], found[name] = name, mapped
    return found


def _mapped(table: Any, name: str) -> str | None:
    for spelled in (*(f"{prefix}{name}" for prefix in _PREFIXES), name.partition(".")[2]):
        mapped = table.get_name(spelled, try_suffixes=(".weight", ".bias"))
        if mapped is not None:
            return str(mapped)
    return None
