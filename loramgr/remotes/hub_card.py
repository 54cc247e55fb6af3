"""The model card that stands on top of a hub's repository: what the newest version is, for people and for the hub.

Its metadata follows the hub's card format (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["CardFacts", "OwnCard", "hub_name", "model_card", "read_own_card"]

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_NOT_TEXT = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})  # what YAML takes for other things
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_LICENSE = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9.+-]{1,64})[\"']?[ \t]*$", re.MULTILINE)
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|!~$&])")
_UNWRITTEN = "[More Information Needed]"  # what the card that PEFT makes by itself is full of


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card tells of a version.

    `base_model` is the base's name on the hub, None where it has none; `base` the base digest, None for an unbound
    version; `rank` and `alpha` None for methods without them; `license` None where the version names none; `text` is
    what the version's own card says below its metadata.
    """

    repository: str
    name: str
    number: int
    digest: str
    method: str
    parameters: int
    base_model: str | None = None
    base: str | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: Sequence[str] = ()
    dtype: str = ""
    license: str | None = None
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Sequence[str] = ()
    removed: bool = False
    text: str = ""


@dataclass(frozen=True, slots=True)
class OwnCard:
    """What a version's own README.md says: a license, None where it names none, and its text."""

    license: str | None
    text: str


def model_card(facts: CardFacts) -> bytes:
    """Return the card; texts of others are escaped, so none of them becomes markup or metadata."""
    parts = [_metadata(facts), f"# {_escaped(facts.name)} v{facts.number}\n", _about(facts)]
    if facts.message:
        parts.append(f"{_escaped(facts.message)}\n")
    parts.append(_table(facts))
    if facts.metrics:
        rows = "".join(f"| {_escaped(key)} | {value:.10g} |\n" for key, value in sorted(facts.metrics.items()))
        parts.append(f"## Metrics\n\n| metric | value |\n|---|---|\n{rows}")
    parts.append(_loading(facts))
    if facts.text:
        parts.append(f"---\n\n{facts.text}\n")
    return "\n".join(parts).encode("utf-8", "replace")


def read_own_card(data: bytes) -> OwnCard:
    """Read a README.md as people write it; a card that nobody filled in has no text."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    metadata = ""
    if text.startswith("---\n") and (end := text.find("\n---", 3)) >= 0:
        metadata, text = text[:end], text[end + 4 :]
    found = _LICENSE.search(metadata)
    return OwnCard(found[1] if found else None, "" if _UNWRITTEN in text else text.strip())


def hub_name(text: object) -> str | None:
    """Return the text where it can be a model's name on a hub, None for a path or anything else."""
    return text if isinstance(text, str) and _HUB_NAME.fullmatch(text) and ".." not in text else None


def _metadata(facts: CardFacts) -> str:
    lines = ["---"]
    if facts.base_model:
        lines.append(f"base_model: {_scalar(facts.base_model)}")
    lines.append("library_name: peft")
    if facts.license:
        lines.append(f"license: {_scalar(facts.license)}")
    adapter_of = [f"base_model:adapter:{facts.base_model}"] if facts.base_model else []
    lines.append("tags:")
    lines += [f"- {_scalar(tag)}" for tag in (*adapter_of, facts.method, "loramgr")]
    return "\n".join([*lines, "---", ""])


def _scalar(text: str) -> str:
    """Write a text so that YAML reads a text: as it is where that is plain, else in JSON's quotes, which YAML knows."""
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT:
        return text
    quoted = json.dumps(text, ensure_ascii=False)  # YAML takes no pair of surrogates for one character
    return "".join(sign if sign.isprintable() or ord(sign) > 0xFFFF else f"\\u{ord(sign):04x}" for sign in quoted)


def _about(facts: CardFacts) -> str:
    base = f"`{facts.base_model}`" if facts.base_model else "the base below" if facts.base else "a base that it names"
    gone = f" Version {facts.number} was removed from its log." if facts.removed else ""
    return f"An adapter for {base}, one of the versions that loramgr keeps in this repository.{gone}\n"


def _table(facts: CardFacts) -> str:
    rows = {
        "base": facts.base_model,
        "base digest": facts.base,
        "method": facts.method,
        "rank": facts.rank,
        "alpha": facts.alpha,
        "targets": ", ".join(facts.targets),
        "parameters": f"{facts.parameters:,}",
        "dtype": facts.dtype,
        "version": facts.digest,
        "tags": ", ".join(facts.tags),
    }
    told = "".join(f"| {key} | {_escaped(str(value))} |\n" for key, value in rows.items() if value not in (None, ""))
    return f"| what | value |\n|---|---|\n{told}"


def _loading(facts: CardFacts) -> str:
    repository = json.dumps(facts.repository)
    return (
        "## Use\n\nWith `base` the model above, opened as usual:\n\n```python\nfrom peft import PeftModel\n\n"
        f'model = PeftModel.from_pretrained(base, {repository}, revision="v{facts.number}")\n```\n'
    )


def _escaped(text: str) -> str:
    """Return a text as one line of Markdown that shows it as it is."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return _SPECIAL.sub(r"\\\1", line)
